"""`train.fp16`: float16 autocast with a scaler. No GPU is here: a scaler on the CPU stands for accelerate's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from served import dude
from test_train_resume import _CutError, cut_at
from tiny import save_tiny, write_rows

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.training import fit
from dude_peft.training import run as run_module
from dude_peft.training.run import run

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 16)
    write_rows(folder / "test.jsonl", 4, start=100)
    return folder


def settings(place: Path, out: Path, train: dict[str, Any], **model: Any) -> dict[str, Any]:
    usual = {"learning_rate": 0.01, "max_steps": 16, "save_steps": 3, "per_device_train_batch_size": 4}
    return {
        "model": {"name_or_path": str(place / "model"), **model},
        "adapter": {"r": 4},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl")},
        "train": {**usual, "logging_steps": 1, **train},
        "evaluation": {"rows": 2, "max_new_tokens": 3},
        "output_dir": str(out),
    }


def scale(monkeypatch: pytest.MonkeyPatch, first: float) -> None:
    """accelerate works in float16 on this CPU, its scaler begins with `first`."""
    original = accelerate.Accelerator.__init__

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        half = options.get("mixed_precision") == "fp16"
        original(self, *arguments, **(options | {"mixed_precision": "no"} if half else options))
        if half:
            self.state._mixed_precision, self.native_amp = "fp16", True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=4)

    monkeypatch.setattr(accelerate.Accelerator, "__init__", made)
    monkeypatch.setattr(fit, "check_half", lambda *_: None)
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


def start(*arguments: Any, quiet: bool = True) -> Any:
    return run(RunConfig(**settings(*arguments)), quiet=quiet)


def test_steps_that_overflow_are_skipped_and_a_resumed_run_repeats_them(place, tmp_path, monkeypatch, capsys):
    scale(monkeypatch, 2.0**30)
    report = start(place, tmp_path / "whole", {"fp16": True}, quiet=False)
    told = capsys.readouterr().out
    assert "step 1: the gradient overflows float16 at scale 1.07374e+09; the step is skipped" in told
    assert report.after.loss < report.before.loss
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert norms[0] == 0
    assert norms[-1] > 0
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(_CutError):
            start(place, tmp_path / "cut", {"fp16": True})
    start(place, tmp_path / "cut", {"fp16": True})
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_run_whose_every_gradient_overflows_ends(place, tmp_path, monkeypatch):
    scale(monkeypatch, 2.0**100)
    with pytest.raises(NumericsError, match=r"in 31 steps in a row, up to step 31; lower .*train\.bf16"):
        start(place, tmp_path / "out", {"fp16": True, "max_steps": 40})


def test_a_loss_that_is_no_number_is_no_overflow(place, tmp_path, monkeypatch):
    scale(monkeypatch, 2.0**10)
    monkeypatch.setattr(
        "dude_peft.training.trainer.Trainer.compute_loss",
        lambda self, model, inputs, *_, **__: (
            next(p for p in model.parameters() if p.requires_grad).sum() * float("nan")
        ),
    )
    with pytest.raises(NumericsError, match="the training loss is nan at step 1"):
        start(place, tmp_path / "out", {"fp16": True})


def test_on_a_cpu_it_is_refused_with_what_to_use_instead(place, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings(place, tmp_path / "out", {"fp16": True})))
    done = dude("train", path)
    assert done.returncode == 2
    assert "train.fp16 needs a GPU: CPUs have float16 autocast only in part; set train.bf16: true" in done.stderr


def test_with_what_has_no_scaler_it_is_refused_when_it_is_read(place, tmp_path):
    for other in ({"bf16": True}, {"torch_compile": True}, {"orthogonality": 0.1}, {"objective": "dpo"}):
        with pytest.raises((ConfigError, ValueError), match=r"keys 'train\.fp16' and 'train\."):
            RunConfig(**settings(place, tmp_path / "out", {"fp16": True, **other}))


def test_a_base_in_float16_trains_a_float32_adapter_and_is_warned_of(place, tmp_path):
    report = run(RunConfig(**settings(place, tmp_path / "out", {}, dtype="float16")), quiet=True)
    assert report.after.loss < report.before.loss
    assert any("the base model is in float16, in which small gradients become 0" in line for line in report.warnings)
