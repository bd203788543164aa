"""`dude train --launch`: two CPU processes (gloo) train as one, and end as one."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import served
import torch
from night import some_by_day
from safetensors.torch import load_file
from tiny import save_tiny, write_rows
from transformers import PreTrainedModel

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


@FSDP2
def test_the_model_is_really_sharded():
    """Every parameter of a model that `shard` has seen is a share of itself, in a group of one process as well."""
    program = """
import os, torch
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from peft import get_peft_model
from torch.distributed.fsdp import FSDPModule
from dude_peft import DudeConfig
from dude_peft.machine.sharding import shard
from tiny import tiny_llama
model = get_peft_model(tiny_llama(), DudeConfig(r=2, target_modules="all-linear"))
shard(model)
assert all(hasattr(p, "device_mesh") for p in model.parameters())
assert sum(isinstance(m, FSDPModule) for m in model.modules()) == 3  # two blocks and the rest
print("sharded")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip().endswith("sharded"), done.stderr


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
