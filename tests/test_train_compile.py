"""`train.torch_compile`: a graph for each shape, few shapes, resumed bit by bit, refused where it cannot work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from tiny import save_tiny
from torch._dynamo.utils import counters

from dude_peft.config.reading import load_config
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.training import run as run_module
from dude_peft.training import trainer as trainer_module
from dude_peft.training.compiled import padded
from dude_peft.training.run import run

WEIGHTS = "adapter_model.safetensors"


class _CutError(Exception):
    pass


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Rows of several lengths, one layer."""
    folder = tmp_path_factory.mktemp("compile")
    save_tiny(folder / "model", num_hidden_layers=1)
    rows = [{"prompt": f"say {'o' * (60 if number < 2 else 10)}", "completion": "yes"} for number in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


def settings(places: Path, out: Path, backend: str | None = "aot_eager", **train: object) -> dict:
    extra = {} if backend is None else {"extra_arguments": {"torch_compile_backend": backend}}
    return {
        "model": {"name_or_path": str(places / "model")},
        "adapter": {"r": 2, "lora_dropout": 0.2, "target_modules": ["q_proj"]},
        "data": {"train": str(places / "train.jsonl"), "template": "plain"},
        "train": {
            "learning_rate": 0.01, "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
            "save_steps": 1, "torch_compile": True, **extra, **train,
        },
        "evaluation": {"enabled": False},
        "output_dir": str(out),
    }  # fmt: skip


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def interrupted(wanted: dict, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer_module.RunTrainer._save_checkpoint

    def save(self, *args):
        original(self, *args)
        if self.state.global_step == step:
            raise _CutError

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.RunTrainer, "_save_checkpoint", save)
        with pytest.raises(_CutError):
            run(RunConfig(**wanted), quiet=True)


def test_a_length_is_one_of_eight_and_never_above_the_longest():
    for longest in (1, 5, 8, 63, 512):
        seen = {padded(length, longest) for length in range(1, longest + 1)}
        assert len(seen) <= 8
        assert max(seen) == longest
        assert all(padded(length, longest) >= length for length in range(1, longest + 1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", None])
def test_a_compiled_run_resumes_bit_by_bit(places, tmp_path, monkeypatch, backend):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    counters.clear()
    run(RunConfig(**settings(places, whole, backend)), quiet=True)
    assert 2 <= counters["stats"]["unique_graphs"] <= 3
    interrupted(settings(places, cut, backend), 2, monkeypatch)
    torch.manual_seed(999)
    run(RunConfig(**settings(places, cut, backend)), quiet=True)
    assert losses(cut) == losses(whole)
    one, two = (load_file(out / "adapter" / WEIGHTS) for out in (whole, cut))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    with safe_open(cut / "checkpoints/step-00000004/adapter" / WEIGHTS, "pt") as file:
        assert not any("_orig_mod" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_the_run_beside_it_is_not_compiled_and_computes_the_same(places, tmp_path):
    """Without dropout, whose masks would have another shape in padded batches."""
    plain = {"max_steps": 2, "torch_compile": False}
    compiled = settings(places, tmp_path / "compiled", "eager", max_steps=2)
    run(RunConfig(**compiled | {"adapter": {"method": "lora"}}), quiet=True)
    assert counters["stats"]["unique_graphs"]
    counters.clear()
    run(RunConfig(**settings(places, tmp_path / "plain", None, **plain) | {"adapter": {"method": "lora"}}), quiet=True)
    assert not counters["stats"]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"packing": True}),
        ("data", {"general": "g.jsonl"}),
        ("train", {"trainer": "trl"}),
        ("train", {"gradient_checkpointing": True}),
    ],
)
def test_what_has_too_many_shapes_is_refused(places, tmp_path, section, values):
    wanted = settings(places, tmp_path / "out")
    wanted[section] |= values
    if "general" in values:
        wanted["train"]["objective"] = "mol"
    with pytest.raises(ConfigError, match=r"keys 'train\.torch_compile' and ") as caught:
        load_config(wanted)
    assert "\n" not in str(caught.value)


def test_a_compiler_that_fails_is_one_line(places, tmp_path, monkeypatch, capsys):
    from torch._dynamo import exc

    def fails(*_, **__):
        raise exc.Unsupported("no\nway")

    monkeypatch.setattr("dude_peft.training.trainer.Trainer.training_step", fails)
    with pytest.raises(ConfigError, match="torch_compile does not work on this model and device") as caught:
        run(RunConfig(**settings(places, tmp_path / "out")), quiet=False)
    assert "\n" not in str(caught.value)
    assert "compiling: the first step of every batch length takes longer" in capsys.readouterr().out


def test_without_a_compiler_it_is_refused_before_the_model_is_loaded(places, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def absent():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", absent)
    monkeypatch.setattr("dude_peft.training.loading.load_model", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(ConfigError, match="install g"):
        run(RunConfig(**settings(places, tmp_path / "out", None)), quiet=True)


def test_several_processes_are_refused(places, tmp_path, monkeypatch):
    monkeypatch.setattr("dude_peft.machine.processes.count", lambda: 2)
    with pytest.raises(ConfigError, match=r"train\.torch_compile works in one process"):
        run(RunConfig(**settings(places, tmp_path / "out")), quiet=True)


def test_tf32_is_refused_on_a_cpu(places, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    wanted = settings(places, tmp_path / "out", None, torch_compile=False, tf32=True)
    with pytest.raises(ConfigError, match=r"train\.tf32 needs an NVIDIA GPU"):
        run(RunConfig(**wanted), quiet=True)
