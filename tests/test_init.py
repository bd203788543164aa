"""`dude init`: the bytes of an adapter made in memory, from a streamed checkpoint, whatever interrupts it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from method_rows import each_kind
from models import logits, make
from night import by_night
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from served import dude
from test_cli import assert_refused
from test_cli import interrupted as stopped_by_ctrl_c

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.durable import locked
from dude_peft.artifact.manifest import read_manifest
from dude_peft.errors import ArtifactError, BusyError, ConfigError, DudeError, NumericsError, ResourceError
from dude_peft.init import run as init_run
from dude_peft.init.options import module_names, pattern
from dude_peft.init.run import initialise

WEIGHTS, CONFIG, PARTS = "adapter_model.safetensors", "adapter_config.json", ".dude-init"
INDEX = "model.safetensors.index.json"
SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def saved(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Path:
    make(architecture, dtype).save_pretrained(folder, max_shard_size="50KB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A sharded checkpoint; tests that spoil it take `spoilt`."""
    return saved(tmp_path_factory.mktemp("checkpoint") / "model", "mistral-gqa")


@pytest.fixture(scope="module")
def adapter(checkpoint) -> Path:
    return init(checkpoint, checkpoint.parent / "adapter")


@pytest.fixture
def spoilt(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "spoilt"))


def init(model: Path, output: Path, **options: object) -> Path:
    settings = {**SETTINGS, **options.pop("settings", {})}
    return initialise(str(model), output, settings, **{"workers": 1, "quiet": True, **options})


def in_memory(model: Path, output: Path, seed: int = 0, dtype: str = "auto", **settings: object) -> Path:
    base = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype)
    config = DudeConfig(**{**SETTINGS, **settings}, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    get_peft_model(base, config).save_pretrained(output, save_embedding_layers=False)
    return output


def assert_same(one: Path, other: Path) -> None:
    for file in (WEIGHTS, CONFIG):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


# --- the same bytes -----------------------------------------------------------------------------------------------


@each_kind
def test_the_files_are_those_of_an_adapter_made_in_memory(method, checkpoint, tmp_path):
    init(checkpoint, tmp_path / "streamed", settings={"method": method}, seed=5)
    in_memory(checkpoint, tmp_path / "memory", seed=5, method=method)
    assert_same(tmp_path / "streamed", tmp_path / "memory")
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    ("architecture", "dtype", "settings"),
    [
        ("llama", torch.bfloat16, {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"up_proj": 3}}),
        ("gpt2-conv1d", torch.float32, {}),
        *by_night(
            ("gemma3-tied", torch.float32, {"target_modules": ["lm_head", "q_proj"]}),
            ("opt-bias", torch.float64, {"exclude_modules": ["k_proj"]}),
            ("qwen3", torch.float16, {"method": "rslora", "rank_pattern": {"q_proj": 7}}),
        ),
    ],
)
def test_architectures_dtypes_and_patterns(architecture, dtype, settings, tmp_path):
    model = saved(tmp_path / "model", architecture, dtype)
    init(model, tmp_path / "streamed", settings=settings)
    in_memory(model, tmp_path / "memory", **settings)
    assert_same(tmp_path / "streamed", tmp_path / "memory")


def test_zero_rows_and_a_zero_weight(tmp_path):
    model = make("llama")
    model.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    init(tmp_path / "model", tmp_path / "streamed")
    in_memory(tmp_path / "model", tmp_path / "memory")
    assert_same(tmp_path / "streamed", tmp_path / "memory")


def test_the_dtype_is_that_of_the_model_in_use(checkpoint, tmp_path):
    init(checkpoint, tmp_path / "streamed", dtype="bfloat16")
    in_memory(checkpoint, tmp_path / "memory", dtype="bfloat16")
    assert_same(tmp_path / "streamed", tmp_path / "memory")


def test_a_checkpoint_without_the_models_prefix(checkpoint, adapter, tmp_path):
    tensors = {}
    for shard in checkpoint.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(shard)
    (tmp_path / "model").mkdir()
    shutil.copy(checkpoint / "config.json", tmp_path / "model")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(bare, tmp_path / "model/model.safetensors")
    init(tmp_path / "model", tmp_path / "streamed")
    with safe_open(tmp_path / "streamed" / WEIGHTS, "pt") as ours, safe_open(adapter / WEIGHTS, "pt") as expected:
        assert all(torch.equal(ours.get_tensor(name), expected.get_tensor(name)) for name in expected.keys())  # noqa: SIM118


def test_the_number_of_workers_does_not_matter(checkpoint, adapter, tmp_path):
    assert_same(init(checkpoint, tmp_path / "two", workers=2), adapter)


def test_in_memory_the_number_of_threads_does_not_matter(checkpoint, adapter, tmp_path):
    for threads in (3, 1):
        torch.set_num_threads(threads)
        try:
            assert_same(in_memory(checkpoint, tmp_path / str(threads)), adapter)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)


def test_the_adapter_loads_without_an_svd_and_changes_nothing(checkpoint, adapter, monkeypatch):
    import dude_peft.methods.splits as splits

    monkeypatch.setattr(splits, "top_svd", lambda *_, **__: pytest.fail("an SVD ran"))
    expected = logits(make("mistral-gqa"))
    model = load_adapter(make("mistral-gqa"), adapter, is_trainable=True)
    assert torch.equal(logits(model.eval()), expected)
    assert any(parameter.requires_grad for parameter in model.parameters())
    stock = PeftModel.from_pretrained(make("mistral-gqa"), adapter)
    assert torch.allclose(logits(stock), expected, atol=1e-5)


# --- interruptions ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_time_the_same_call_goes_on(checkpoint, adapter, tmp_path):
    output, dice = tmp_path / "adapter", random.Random(0)
    for _ in range(6):
        child = os.fork()
        if child == 0:
            try:  # whatever happens, the child must not go on as a second pytest
                with contextlib.suppress(BusyError):  # the workers of the one killed before live a moment longer
                    init(checkpoint, output, workers=2)
            finally:
                os._exit(0)
        time.sleep(dice.uniform(0.05, 3.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (output / CONFIG).exists():
            read_manifest(output)
            assert_same(output, adapter)
        elif (output / WEIGHTS).exists():
            assert (output / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    deadline = time.monotonic() + 30
    while not (output / CONFIG).exists() or (output / PARTS).exists():
        try:
            init(checkpoint, output)
        except BusyError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert_same(output, adapter)
    assert sorted(path.name for path in output.iterdir()) == [CONFIG, WEIGHTS]


@pytest.fixture
def interrupted(checkpoint, tmp_path, monkeypatch) -> Path:
    """An init whose layers are all done but not put together."""
    with monkeypatch.context() as patch:
        patch.setattr(init_run, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            init(checkpoint, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_only_what_is_missing_or_damaged_is_computed(checkpoint, adapter, interrupted, monkeypatch):
    parts = sorted((interrupted / PARTS).glob("*.part"))
    assert len(parts) == 14
    parts[2].unlink()
    data = bytearray(parts[5].read_bytes())
    data[len(data) // 2] ^= 1
    parts[5].write_bytes(data)
    parts[7].write_bytes(b"")
    shutil.copy(parts[0], parts[9])
    (interrupted / PARTS / ".dude-half-written").write_bytes(b"x")
    import dude_peft.init.workers as workers

    done, original = [], workers.run_layers

    def spy(tasks, *rest):
        done.extend(index for index, _ in tasks)
        return original(tasks, *rest)

    monkeypatch.setattr(workers, "run_layers", spy)
    init(checkpoint, interrupted)
    assert done == [2, 5, 7, 9]
    assert_same(interrupted, adapter)


def test_parts_with_odd_headers_and_a_right_seal_are_made_again(checkpoint, adapter, interrupted):
    def resealed(path, change):
        data = path.read_bytes()[32:]
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        body = len(text).to_bytes(8, "little") + text + data[8 + length :]
        path.write_bytes(hashlib.sha256(body).digest() + body)

    def tensor_of(header):
        return next(entry for name, entry in header.items() if name != "__metadata__")

    changes = [
        lambda header: header["__metadata__"].update(base="true"),
        lambda header: header["__metadata__"].update(base="{}"),
        lambda header: header["__metadata__"].update(captured='{"a": {}}'),
        lambda header: header["__metadata__"].pop("settings"),
        lambda header: header.update(__metadata__=1),
        lambda header: header.update(zzz=1),
        lambda header: tensor_of(header).update(shape="x"),
        lambda header: tensor_of(header).update(dtype=7),
        lambda header: tensor_of(header).update(data_offsets=[0, 10**9]),
    ]
    parts = sorted((interrupted / PARTS).glob("*.part"))
    for path, change in zip(parts, changes, strict=False):
        resealed(path, change)
    parts[-1].write_bytes(hashlib.sha256(b"").digest())
    parts[-2].write_bytes(hashlib.sha256(b"\xff" * 100).digest() + b"\xff" * 100)
    init(checkpoint, interrupted)
    assert_same(interrupted, adapter)


def test_parts_of_other_settings_are_not_mixed_in(checkpoint, interrupted, tmp_path):
    with pytest.raises(ConfigError, match="other settings or another checkpoint"):
        init(checkpoint, interrupted, settings={"r": 5})
    init(checkpoint, interrupted, settings={"r": 5}, overwrite=True)
    in_memory(checkpoint, tmp_path / "memory", r=5)
    assert_same(interrupted, tmp_path / "memory")


def test_parts_of_another_checkpoint_are_not_mixed_in(checkpoint, tmp_path, spoilt):
    output = tmp_path / "adapter"
    shard = next(spoilt.glob("*-of-*.safetensors"))
    (output / PARTS).mkdir(parents=True)
    (output / PARTS / "settings.json").write_text('{"settings": "of another"}')
    with pytest.raises(ConfigError, match="another checkpoint"):
        init(spoilt, output)
    os.utime(shard, (1, 1))
    with pytest.raises(ConfigError, match="another checkpoint"):
        init(spoilt, output)


def test_a_removal_of_the_parts_that_was_cut_short(checkpoint, adapter, interrupted):
    for file in (WEIGHTS, CONFIG):
        shutil.copy(adapter / file, interrupted)
    next((interrupted / PARTS).glob("*.part")).unlink()
    init(checkpoint, interrupted)
    assert sorted(path.name for path in interrupted.iterdir()) == [CONFIG, WEIGHTS]


def test_a_folder_with_something_in_it_is_left_alone(checkpoint, adapter, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        init(checkpoint, tmp_path)
    shutil.copy(adapter / CONFIG, tmp_path)
    assert_same(init(checkpoint, tmp_path, overwrite=True), adapter)
    assert (tmp_path / "precious.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="is a file"):
        init(checkpoint, tmp_path / "precious.txt")


def test_two_at_a_time_do_not_share_a_folder(checkpoint, tmp_path):
    (tmp_path / "adapter").mkdir()
    with locked(tmp_path / "adapter"), pytest.raises(BusyError, match="another process"):
        init(checkpoint, tmp_path / "adapter")
    init(checkpoint, tmp_path / "adapter")


def test_too_little_disk_is_noticed_before_the_work(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="are needed"):
        init(checkpoint, tmp_path / "adapter")


# --- checkpoints that cannot be used ------------------------------------------------------------------------------


def refused(model: Path, tmp_path: Path, error: type[DudeError], *parts: str, **options: object) -> None:
    with pytest.raises(error) as caught:
        init(model, tmp_path / "refused", **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    assert not (tmp_path / "refused" / WEIGHTS).exists()


def _changed_index(spoilt, change):
    index = json.loads((spoilt / INDEX).read_text())
    change(index["weight_map"])
    (spoilt / INDEX).write_text(json.dumps(index))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


ELSEWHERE = [
    "../escape.safetensors",
    "/etc/passwd",
    "sub/x.safetensors",
    "..\\x.safetensors",
    "",
    "x" * 300 + ".safetensors",
]


@pytest.mark.parametrize("file", ELSEWHERE)
def test_an_index_that_points_elsewhere_is_refused(file, spoilt, tmp_path):
    _changed_index(spoilt, lambda places: places.update({Q_PROJ: file}))
    refused(spoilt, tmp_path, ArtifactError, INDEX, Q_PROJ)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", INDEX),
        ("[]", INDEX),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"metadata": {}}', "weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
    ],
)
def test_a_broken_index_is_refused(text, part, spoilt, tmp_path):
    (spoilt / INDEX).write_text(text)
    refused(spoilt, tmp_path, ArtifactError, part)


def test_missing_shards_and_tensors_are_refused(spoilt, tmp_path):
    _changed_index(spoilt, lambda places: places.pop(Q_PROJ))
    refused(spoilt, tmp_path, ArtifactError, Q_PROJ, "no tensor")
    _changed_index(spoilt, lambda places: places.update({"more": next(iter(places.values()))}))
    refused(spoilt, tmp_path, ArtifactError, "'more' is not in")
    next(spoilt.glob("*-of-*.safetensors")).unlink()
    refused(spoilt, tmp_path, ArtifactError, "is missing", "download")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_not_adapted_has_to_be_there_too(name, spoilt, tmp_path):
    _changed_index(spoilt, lambda places: places.pop(name))
    refused(spoilt, tmp_path, ArtifactError, name, "lacks 1 tensors")


@pytest.mark.parametrize(("key", "value"), [("intermediate_size", 3), ("vocab_size", 90), ("attention_bias", True)])
def test_settings_of_another_model_are_refused_where_no_adapted_layer_shows_them(key, value, tmp_path):
    architecture = "llama" if key == "attention_bias" else "mistral-gqa"
    model = saved(tmp_path / "model", architecture)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, key: value}))
    refused(model, tmp_path, ArtifactError, "lacks 8" if value is True else "config.json needs")


@pytest.mark.parametrize(("method", "part"), [("olora", "factors"), ("dora", "row norms"), ("dude", "q_proj")])
def test_a_start_that_overflows_is_refused(method, part, spoilt, tmp_path):
    _rewritten(spoilt, lambda t: torch.full_like(t, 2e38))
    refused(spoilt, tmp_path, NumericsError, "layers.1.self_attn.q_proj", part, settings={"method": method})


def test_a_configuration_of_a_thousand_million_labels_ends(spoilt, tmp_path):
    settings = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps({**settings, "num_labels": 10**9}))
    refused(spoilt, tmp_path, ArtifactError, "num_labels")


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1, -1000])
def test_a_truncated_shard_is_refused(cut, spoilt, tmp_path):
    shard = sorted(spoilt.glob("*-of-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:cut])
    refused(spoilt, tmp_path, ArtifactError, shard.name, "download")


def _rewritten(spoilt, change, name=Q_PROJ):
    place = json.loads((spoilt / INDEX).read_text())["weight_map"][name]
    tensors = safetensors.torch.load_file(spoilt / place)
    tensors[name] = change(tensors[name]).contiguous()
    safetensors.torch.save_file(tensors, spoilt / place, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        (lambda t: t[:-1], ArtifactError, (Q_PROJ, "shape", "config.json")),
        (lambda t: t.to(torch.int8), ConfigError, (Q_PROJ, "I8", "quantised")),
        (
            lambda t: t.index_fill(0, torch.tensor([2]), float("nan")),
            NumericsError,
            ("layers.1.self_attn.q_proj", "nan"),
        ),
        (lambda t: t.index_fill(0, torch.tensor([2]), float("inf")), NumericsError, ("[2, 0]", "inf")),
    ],
)
def test_a_weight_that_cannot_be_used_is_refused(change, error, parts, spoilt, tmp_path):
    _rewritten(spoilt, change)
    refused(spoilt, tmp_path, error, *parts)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_tensor_beside_the_adapted_ones_that_holds_no_floats_is_refused(dtype, spoilt, tmp_path):
    _rewritten(spoilt, lambda t: t.to(dtype), "model.norm.weight")
    refused(spoilt, tmp_path, ConfigError, "model.norm.weight", "no float dtype")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_what_is_not_adapted_is_finite_too(name, spoilt, tmp_path):
    _rewritten(spoilt, lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), name)
    refused(spoilt, tmp_path, NumericsError, name, "NaN or Inf")


def test_models_that_cannot_be_used_are_refused(spoilt, tmp_path):
    refused(spoilt, tmp_path, ConfigError, "not a module", settings={"target_modules": ["q_porj"]})
    refused(spoilt, tmp_path, ConfigError, "more than layer", settings={"r": 40, "target_modules": ["k_proj"]})
    refused(tmp_path / "nowhere", tmp_path, ConfigError, "not a folder")
    settings = json.loads((spoilt / "config.json").read_text())
    quantised = {**settings, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (spoilt / "config.json").write_text(json.dumps(quantised))
    refused(spoilt, tmp_path, ConfigError, "quantised", "gptq")
    (spoilt / "config.json").write_text(json.dumps({"model_type": "no-such"}))
    refused(spoilt, tmp_path, ConfigError, "config.json")
    (spoilt / "config.json").write_text(json.dumps(settings))
    (spoilt / INDEX).unlink()
    refused(spoilt, tmp_path, ConfigError, "only safetensors")


# --- memory -------------------------------------------------------------------------------------------------------

_MEASURED = """
import os, sys, threading, time
from dude_peft.init.run import initialise

# VmHWM, since ru_maxrss counts what the process was forked from.
def peak_kib(pid):
    return int(next(line for line in open(f"/proc/{pid}/status") if line.startswith("VmHWM")).split()[1])

peaks = {}
def watch():
    own = os.getpid()
    while True:
        for pid in [own, *open(f"/proc/{own}/task/{own}/children").read().split()]:
            try:
                peaks[pid] = peak_kib(pid)
            except (OSError, StopIteration):
                pass
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
initialise(sys.argv[1], sys.argv[2], {"r": 16, "target_modules": ["up_proj", "down_proj"]}, workers=1, quiet=True)
assert len(peaks) >= 2
print(max(peaks.values()))
"""


@pytest.mark.slow
def test_no_process_needs_more_than_three_of_the_largest_tensor(tmp_path):
    large = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 1, "num_attention_heads": 32}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=1, dtype="bfloat16", **large)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).state_dict().items()}
    row = torch.randn(1 << 16)
    tensors = {}
    for name, shape in shapes.items():  # random enough, and quick to make: a row is rolled and scaled
        count = shape.numel()
        flat = row.repeat(count // len(row) + 1)[:count] * torch.linspace(1, 2, count).sin()
        tensors[name] = flat.reshape(shape).bfloat16()
    config.save_pretrained(tmp_path / "model")
    safetensors.torch.save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    largest = max(tensor.nbytes for tensor in tensors.values())
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, tmp_path / "model", tmp_path / "adapter"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak = 1024 * int(done.stdout.split()[-1])
    assert largest == 96 << 20
    assert peak <= 3 * largest + (512 << 20), f"{peak >> 20} MiB"


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command(checkpoint, adapter, tmp_path):
    options = ("--r", 4, "--lora-alpha", 6, "--workers", 2)
    done = dude("init", checkpoint, "-o", tmp_path / "adapter", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "14 layers" in done.stdout
    assert "captured energy" in done.stdout
    assert "\x1b" not in done.stdout
    assert_same(tmp_path / "adapter", adapter)
    start = time.perf_counter()
    line = assert_refused(dude("init", checkpoint, "-o", tmp_path / "adapter", *options), 2, "config")
    assert "--overwrite" in line
    assert time.perf_counter() - start < 5  # before torch is imported


def test_the_command_exits_with_5_on_nan(spoilt, tmp_path):
    _rewritten(spoilt, lambda t: t * float("nan"))
    assert "q_proj" in assert_refused(dude("init", spoilt, "-o", tmp_path / "adapter"), 5, "numerics")


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_the_command_resumes(checkpoint, adapter, tmp_path):
    arguments = ["init", checkpoint, "-o", tmp_path / "adapter", "-r", "4", "--lora-alpha", "6", "--workers", "1"]
    code, errors = stopped_by_ctrl_c(arguments, "DuDe")
    assert code == 130, errors
    assert "run the same command again" in errors
    assert dude(*arguments).returncode == 0
    assert_same(tmp_path / "adapter", adapter)


def test_how_options_are_read():
    assert module_names("all-linear") == "all-linear"
    assert module_names("q_proj, v_proj") == ["q_proj", "v_proj"]
    assert module_names("q_proj") == ["q_proj"]
    assert module_names(r".*\.[qv]_proj") == r".*\.[qv]_proj"
    assert module_names(None) is None
    assert pattern("--rank-pattern", '{"q_proj": 8}') == {"q_proj": 8}
    assert pattern("--rank-pattern", None) == {}
    for text in ("q_proj=8", "[1]"):
        with pytest.raises(ConfigError, match="--rank-pattern"):
            pattern("--rank-pattern", text)
