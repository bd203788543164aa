"""QLoRA with `--launch fsdp2`: one process quantises, all have a share of the packed weights, and they train as one."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from served import dude
from test_launch import FSDP2, environment, losses
from tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows

from dude_peft.config.schema import ModelSection, QuantizationSection
from dude_peft.errors import ConfigError
from dude_peft.model.load import load_empty, load_model
from dude_peft.model.packed import UnpackedLinear, unpack_
from dude_peft.training.strategy import check_packed

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; install dude-peft[quant]")

DOUBLE = {"method": "nf4", "double_quantization": True}
FORMATS: dict[str, Any] = {"nf4": "nf4", "nf4-double": DOUBLE, "fp4": "fp4", "int8": "int8"}


def launched(strategy: str, processes: int) -> tuple[str, ...]:
    return () if processes == 1 else ("--launch", strategy, "--processes", str(processes))


TWO = launched("fsdp2", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model with biases whose inputs are no multiples of 64 everywhere, and rows."""
    folder = tmp_path_factory.mktemp("launch-quantised")
    model = tiny_llama(intermediate_size=172, attention_bias=True, mlp_bias=True)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", 48)
    write_rows(folder / "test.jsonl", 6, start=100)
    return folder


def section_of(place: Path, quantization: Any, dtype: str = "auto") -> ModelSection:
    asked = quantization if isinstance(quantization, dict) else {"method": quantization}
    return ModelSection(name_or_path=str(place / "model"), dtype=dtype, quantization=QuantizationSection(**asked))


def write_yaml(place: Path, out: Path, quantization: Any, rows: int, **train: object) -> Path:
    settings = {
        "model": {"name_or_path": str(place / "model"), "quantization": quantization},
        "adapter": {"r": 4, "lora_alpha": 6},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl")},
        "train": {
            "learning_rate": 0.003,
            "max_steps": 8,
            "logging_steps": 1,
            "per_device_train_batch_size": rows,
            "save_steps": 3,
            **train,
        },
        "evaluation": {"rows": 5, "max_new_tokens": 2, "eval_steps": 4},
        "output_dir": str(out),
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def alone(place) -> Any:
    """Format -> the folder of its run in one process."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            out = place / f"alone-{name}"
            done = dude("train", write_yaml(place, out, FORMATS[name], 6))
            assert done.returncode == 0, done.stderr
            made[name] = out
        return made[name]

    return get


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_unpacked_layers_compute_the_same_bits(place, name, dtype):
    model = load_model(section_of(place, FORMATS[name], dtype), str(place / "model"))
    ids = torch.arange(3, 40)[None]
    x = model.get_input_embeddings()(ids).detach()
    found = []
    for _ in range(2):
        inner = x.clone().requires_grad_()
        for mode in (True, False):
            logits = model.train(mode)(inputs_embeds=inner).logits
        logits.float().square().sum().backward()
        found.append((logits, inner.grad))
        unpack_(model)  # for the second time around
    layers = [module for module in model.modules() if isinstance(module, UnpackedLinear)]
    assert len(layers) == 14
    assert all(layer.bias.dtype == getattr(torch, dtype) for layer in layers)
    for packed, unpacked in zip(*found, strict=True):
        assert torch.equal(packed, unpacked)
    assert all(
        type(tensor) in (torch.nn.Parameter, torch.Tensor) for tensor in model.state_dict(keep_vars=True).values()
    )


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_nothing_keeps_the_packed_layers(place, name):
    """A packed weight knows its layer: the first process would hold all of them until a collection, sent or not."""
    model = load_model(section_of(place, name), str(place / "model"))
    gone = [weakref.ref(module) for module in model.modules() if type(module).__module__.startswith("bitsandbytes")]
    assert gone
    gc.disable()
    try:
        unpack_(model)
        assert not any(each() for each in gone)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_the_others_have_the_same_layers_without_a_value(place, name):
    section = section_of(place, FORMATS[name])
    whole, empty = load_model(section, str(place / "model")), load_empty(section, str(place / "model"))
    assert all(parameter.is_meta for parameter in empty.parameters())
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (whole, empty)]
    assert kinds[0] == kinds[1]
    assert empty.config.quantization_config.to_dict() == whole.config.quantization_config.to_dict()


def test_formats_that_are_not_cut_are_refused():
    check_packed("ddp", 2, "torchao:int8_weight_only")
    check_packed("fsdp2", 1, "torchao:int8_weight_only")
    check_packed("fsdp2", 2, "fp4")
    with pytest.raises(ConfigError, match="torchao:int8_weight_only cannot be split; use --launch ddp"):
        check_packed("fsdp2", 2, "torchao:int8_weight_only")
    with pytest.raises(ConfigError, match="use --launch fsdp2 or ddp"):
        check_packed("zero3", 2, "nf4")


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize("name", FORMATS)
def test_two_processes_train_as_one_and_the_file_is_the_same_adapter(place, alone, name):
    out = place / f"two-{name}"
    done = dude("train", write_yaml(place, out, FORMATS[name], 3), *TWO)
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(alone(name)), abs=1e-5)
    found, wanted = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (out, alone(name)))
    assert found.keys() == wanted.keys()
    starts = [key for key in wanted if key.endswith(("A0", "m0"))]
    assert starts
    assert all(torch.equal(found[key], wanted[key]) for key in starts)
    for key, tensor in wanted.items():
        # Adam makes steps of 0.003 of gradients that are nearly zero; unquantised runs differ by 1.4e-4 here.
        assert torch.allclose(found[key], tensor, atol=3e-4), key
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (alone(name), out))
    assert two["total_parameters"] == one["total_parameters"]
    assert two["after"]["loss"] == pytest.approx(one["after"]["loss"], abs=1e-5)
    done = dude("verify", out / "adapter")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@FSDP2
@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
@pytest.mark.parametrize(("name", "first", "then"), [("nf4-double", 2, 3), ("nf4", 2, 1), ("int8", 1, 2)])
def test_killed_and_resumed_with_another_number_of_processes(place, tmp_path, name, first, then):
    """The same checkpoint goes on with ddp, where every process has a base of its own."""
    config = write_yaml(place, tmp_path / "out", FORMATS[name], 3)
    command = [sys.executable, "-m", "dude_peft.cli", "train", str(config), *launched("fsdp2", first)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment())
    end = time.monotonic() + 200
    while time.monotonic() < end and not list(tmp_path.glob("out/checkpoints/step-*/manifest.json")):
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if first == 1 else int(children[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if first == 1 else 137), errors
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    found = []
    for strategy, folder in (("fsdp2", "out"), ("ddp", "copy")):
        done = dude("train", config, "--output-dir", tmp_path / folder, *launched(strategy, then))
        assert done.returncode == 0, done.stderr
        assert "resuming from the checkpoint of step " in done.stdout
        found.append(losses(tmp_path / folder))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    done = dude("verify", tmp_path / "out/adapter")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@FSDP2
def test_a_checkpoint_that_is_stored_quantised_is_cut_as_well(place, alone, tmp_path):
    load_model(section_of(place, DOUBLE), str(place / "model")).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for file in ("train.jsonl", "test.jsonl"):
        (tmp_path / file).write_bytes((place / file).read_bytes())
    done = dude("train", write_yaml(tmp_path, tmp_path / "out", None, 3), *TWO)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(alone("nf4-double")), abs=1e-5)


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize("train", [{"gradient_checkpointing": True}, {"bf16": True}, {"objective": "dpo"}])
def test_other_ways_to_train_work_split_as_well(place, tmp_path, train):
    save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    write_rows(tmp_path / "test.jsonl", 6, start=100)
    rows = [{"prompt": f"say {n}", "chosen": "yes", "rejected": "no"} for n in range(24)]
    for file in ("train.jsonl", "test.jsonl"):
        if "objective" in train:
            (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            write_rows(tmp_path / file, 24)
    for name, count, arguments in (("one", 6, ()), ("two", 3, TWO)):
        done = dude("train", write_yaml(tmp_path, tmp_path / name, "nf4", count, **train), *arguments)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=5e-3)
