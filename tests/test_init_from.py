"""`adapter.init_from`: on a quantised base the factors of the full-precision weights; refused where it has no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from night import NIGHT, some_by_day
from safetensors.torch import load_file, save_file
from served import dude
from test_cli import assert_refused
from test_train_quantised import start, write_yaml
from test_train_resume import _CutError, cut_at
from tiny import save_tiny, write_rows

from dude_peft.config.reading import load_config
from dude_peft.errors import ConfigError
from dude_peft.training import run as run_module
from dude_peft.training.run import run
from dude_peft.tuner import starts

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; install dude-peft[quant]")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, a wider one, one with other weights, and rows."""
    folder = tmp_path_factory.mktemp("init-from")
    save_tiny(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    for name, changes in {
        "other": {},
        "shallow": {"num_hidden_layers": 1},
        "wider": {"intermediate_size": 192},
    }.items():
        file = save_tiny(folder / name, **changes) / "model.safetensors"
        made = load_file(file)
        same = {key: weights[key] if weights[key].shape == tensor.shape else tensor for key, tensor in made.items()}
        if name == "other":
            same = {key: tensor.flip(0) for key, tensor in same.items()}
        save_file(same, file, {"format": "pt"})
    write_rows(folder / "train.jsonl", 14)
    write_rows(folder / "test.jsonl", 4, start=100)
    return folder


def from_model(place: Path, name: str, quantization: Any, source: str = "model", **adapter: Any) -> Path:
    adapter = {"init_from": str(place / source), **adapter}
    return write_yaml(place, name, quantization, adapter=adapter, train={"max_steps": 4}, evaluation={"rows": 1})


@pytest.mark.parametrize(
    ("quantization", "method"),
    some_by_day(
        [("nf4", "dude"), ("int8", "pissa"), ("torchao:int8_weight_only", "milora"), ("nf4", "lora-xs")],
        [("nf4", "dude")],
    ),
)
def test_the_factors_are_those_of_the_full_precision_weights(
    place, tmp_path, capsys, monkeypatch, quantization, method
):
    if quantization.startswith("torchao"):
        pytest.importorskip("torchao", reason="torchao is not installed")
    given: dict[str, torch.Tensor] = {}
    original = starts.start_of

    def seen(spec: Any, W0: torch.Tensor, r: int, scaling: float, options: Any, layer: str) -> Any:
        given[layer] = W0.clone()
        return original(spec, W0, r, scaling, options, layer)

    monkeypatch.setattr(starts, "start_of", seen)
    file = from_model(place, f"{quantization[:4]}-{method}", quantization, method=method)
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(_CutError):
            run(load_config(file), quiet=False)
    told = " ".join(capsys.readouterr().out.split())
    assert "the base's weights differ from its by" in told
    assert "the start equals the base model bit by bit" in told
    full = load_file(place / "model" / "model.safetensors")
    assert len(given) == 14
    for layer, W0 in given.items():
        assert torch.equal(W0, full[f"{layer}.weight"])
    given.clear()
    start(file)  # goes on from its checkpoint, where the factors are
    assert not given
    if NIGHT:
        assert_fine(dude("verify", place / file.stem / "adapter", "--base", place / "model"))
        assert_fine(dude("merge", place / file.stem / "adapter", "-o", tmp_path / "merged"))


def assert_fine(done: Any) -> None:
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("quantization", "source", "adapter", "words"),
    [
        (None, "model", {}, "the base model is not quantised"),
        ("nf4", "model", {"method": "lora"}, "the start of method 'lora' takes nothing of the weights"),
        ("nf4", "model", {"start": "model"}, "adapter.start has its factors already"),
        ("nf4", "nowhere", {}, "is not a folder"),
    ],
)
def test_what_has_no_use_is_refused_before_the_model_is_loaded(place, quantization, source, adapter, words):
    file = from_model(place, "refused", quantization, source, **adapter)
    for command in ("train", "plan"):
        assert words in assert_refused(dude(command, file), 2, "config")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "wider",
            r"has shape \(192, 64\), the base's \(\d+, 64\); give the checkpoint that the base was quantised from",
        ),
        ("shallow", r"has no layer 'model\.layers\.1\.self_attn\.q_proj'"),
        ("other", "which is no rounding; give the checkpoint"),
    ],
)
def test_another_model_is_refused(place, source, words):
    file = from_model(place, f"of-{source}", "nf4", source)
    with pytest.raises(ConfigError, match=words) as caught:
        start(file)
    assert "\n" not in str(caught.value)
    assert not (place / file.stem / "adapter").exists()
