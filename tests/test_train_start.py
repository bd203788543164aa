"""`adapter.start`: a run that begins with a saved adapter, `dude init`'s file above all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from served import dude
from test_cli import assert_refused
from test_train_resume import _CutError, cut_at, result
from tiny import save_tiny, write_rows

from dude_peft.artifact.manifest import read_manifest
from dude_peft.config.reading import load_config
from dude_peft.errors import ArtifactError
from dude_peft.training import run as run_module
from dude_peft.training import start as start_module
from dude_peft.training.run import run

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, rows, and the start that `dude init` makes of the model."""
    folder = tmp_path_factory.mktemp("start")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 22)
    write_rows(folder / "test.jsonl", 4, start=100)
    done = dude("init", folder / "model", "-o", folder / "start", "--r", 2, "--lora-alpha", 3)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def folded(place) -> Path:
    """The folder of a start in the folded form; its base is beside it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; install dude-peft[quant]")
    arguments = ("--r", 4, "--quantize", "nf4", "--residual", place / "residual")
    done = dude("init", place / "model", "-o", place / "folded", *arguments)
    assert done.returncode == 0, done.stderr
    return place / "folded"


def write_yaml(place: Path, name: str, adapter: dict[str, Any], model: str = "model", **sections: Any) -> Path:
    settings: dict[str, Any] = {
        "model": {"name_or_path": str(place / model)},
        "adapter": adapter,
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl"), "template": "plain"},
        "train": {
            "learning_rate": 0.01,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "logging_steps": 4,
            "save_steps": 2,
        },
        "evaluation": {"rows": 2, "max_new_tokens": 3, "eval_steps": 3},
        "output_dir": str(place / name),
    }
    for section, changes in sections.items():
        settings[section] |= changes
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def start(file: Path, *sets: str, **options: Any) -> Any:
    return run(load_config(file, sets), quiet=True, **options)


def trained(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / name / "adapter" / WEIGHTS)


def test_it_is_the_run_that_makes_its_start_itself(place, monkeypatch):
    """Bit by bit, without an SVD, and with the settings of the file where the run has none."""
    own = write_yaml(place, "own", {"r": 2, "lora_alpha": 3, "lora_dropout": 0.1})
    start(own)
    given = write_yaml(place, "given", {"start": str(place / "start"), "lora_dropout": 0.1})
    monkeypatch.setattr("dude_peft.tuner.model.compute_starts", lambda *_: pytest.fail("an SVD was run"))
    report = start(given)
    assert (report.config["adapter"]["r"], report.config["adapter"]["lora_alpha"]) == (2, 3)
    ours, theirs = trained(place, "given"), trained(place, "own")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    recorded = read_manifest(place / "given" / "adapter").config
    assert recorded["base_model_name_or_path"] == str(place / "model")
    assert recorded["lora_dropout"] == 0.1
    assert sorted(path.name for path in (place / "start").iterdir()) == ["adapter_config.json", WEIGHTS]


def test_keys_that_agree_with_the_file_are_accepted(place):
    adapter = {"start": str(place / "start"), "method": "dude", "r": 2, "target_modules": "all-linear"}
    done = dude("train", write_yaml(place, "agreeing", adapter))
    assert done.returncode == 0, done.stderr
    assert f"started from {place / 'start'}" in done.stdout
    done = dude("plan", place / "agreeing.yaml", "--set", f"output_dir={place / 'planned'}")
    assert done.returncode == 0, done.stderr


def test_interrupted_and_resumed_it_is_the_same_bit_by_bit(place, monkeypatch):
    adapter = {"start": str(place / "start"), "lora_dropout": 0.2}
    start(write_yaml(place, "whole", adapter))
    cut = write_yaml(place, "cut", adapter)
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(_CutError):
            start(cut)
    start(cut)
    assert result(place / "cut") == result(place / "whole")


def test_another_start_is_another_run(place, tmp_path):
    file = write_yaml(place, "print", {"start": str(place / "start")})
    start(file, "train.max_steps=2")
    moved = tmp_path / "moved"
    shutil.copytree(place / "start", moved)
    again = start(file, "train.max_steps=2", f"adapter.start={moved}")  # the same file in another place
    assert again.steps == 2
    other = tmp_path / "other"
    done = dude("init", place / "model", "-o", other, "--r", 2, "--lora-alpha", 3, "--svd-seed", 5)
    assert done.returncode == 0, done.stderr
    sets = ("--set", "train.max_steps=2", "--set", f"adapter.start={other}")
    line = assert_refused(dude("train", file, *sets), 2, "config")
    assert "adapter.svd_seed: 0 -> 5" in line or "not the one that this run began with" in line


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"method": "pissa"}, "adapter.method: pissa, but the start"),
        ({"method": "peft:oft.json"}, "adapter.method: peft:oft.json, but the start"),
        ({"r": 3}, "adapter.r: 3, but the start"),
        ({"lora_alpha": 4}, "adapter.lora_alpha: 4, but the start"),
        ({"target_modules": ["q_proj"]}, "adapter.target_modules: 2 layers, but the start"),
        ({"exclude_modules": ["q_proj"]}, "adapter.target_modules: 12 layers, but the start"),
        ({"start": "nowhere"}, "adapter.start: no folder nowhere; make it with: dude init"),
    ],
)
def test_what_contradicts_the_file_is_refused_in_one_line(place, adapter, words):
    file = write_yaml(place, "refused", {"start": str(place / "start"), **adapter})
    assert words in assert_refused(dude("train", file), 2, "config")
    assert not (place / "refused").exists()


def test_another_base_and_damaged_files_are_refused_in_one_line(place, tmp_path):
    save_tiny(tmp_path / "model", seed=7)
    file = write_yaml(tmp_path, "out", {"start": str(place / "start")}, **data_of(place))
    line = assert_refused(dude("train", file), 4, "artifact")
    assert "different base weights" in line
    assert f"adapter.start needs the model that it was made for, {place / 'model'}" in line
    broken = tmp_path / "broken"
    shutil.copytree(place / "start", broken)
    content = bytearray((broken / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (broken / WEIGHTS).write_bytes(content)
    file = write_yaml(place, "damaged", {"start": str(broken)})
    assert "differs from what was saved" in assert_refused(dude("train", file), 4, "artifact")
    (broken / WEIGHTS).unlink()
    assert "is missing" in assert_refused(dude("train", file), 4, "artifact")


def data_of(place: Path) -> dict[str, Any]:
    return {"data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl")}}


# --- the folded form, and adapters that were trained ------------------------------------------------------------------


@pytest.mark.slow
def test_a_folded_start_trains_on_its_residual_and_is_measured_as_it_begins(place, folded, monkeypatch):
    own = write_yaml(place, "unfolded", {"r": 4})
    before = start(own, "train.max_steps=2").before
    file = write_yaml(place, "qpissa", {"start": str(folded)}, model="residual")
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(_CutError):
            start(file)
    done = dude("train", file)
    assert done.returncode == 0, done.stderr
    report = json.loads((place / "qpissa" / "report.json").read_text())
    # The residual alone is far from the model; with its adapter it is nearly the model.
    assert abs(report["before"]["loss"] - before.loss) < 0.02
    assert report["after"]["loss"] < report["before"]["loss"] - 0.2
    start(write_yaml(place, "qpissa-whole", {"start": str(folded)}, model="residual"))
    ours, theirs = trained(place, "qpissa"), trained(place, "qpissa-whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    merged = dude("merge", place / "qpissa" / "adapter", "-o", place / "qpissa-merged")
    assert merged.returncode == 0, merged.stderr


def test_a_folded_start_on_the_full_model_is_refused(place, folded):
    file = write_yaml(place, "misplaced", {"start": str(folded)})
    line = assert_refused(dude("train", file), 4, "artifact")
    assert "different base weights" in line
    assert str(place / "residual") in line
    file = write_yaml(place, "misnamed", {"start": str(folded), "method": "dude"}, model="residual")
    assert "adapter.method: dude, but the start" in assert_refused(dude("train", file), 2, "config")


def test_losses_that_need_the_base_model_refuse_a_start_that_is_another_one(place, folded):
    general = {"general": str(place / "train.jsonl")}
    file = write_yaml(place, "mol", {"start": str(folded)}, model="residual", data=general, train={"objective": "mol"})
    line = assert_refused(dude("train", file), 2, "config")
    assert "train.objective: mol compares with the base model" in line


def test_lost_scores_of_a_start_are_not_measured_on_another_model(place, folded, monkeypatch):
    file = write_yaml(place, "lost", {"start": str(folded)}, model="residual")
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(_CutError):
            start(file)
    (place / "lost" / "before.json").unlink()
    report = start(file)
    assert report.before is None
    assert any("scores from before training are lost" in text for text in report.warnings)


def test_a_trained_adapter_can_be_a_start(place):
    first = write_yaml(place, "first", {"r": 2})
    after = start(first).after
    report = start(write_yaml(place, "second", {"start": str(place / "first" / "adapter")}))
    assert report.before.loss == after.loss
    assert report.after.loss < after.loss


def test_the_start_is_read_once_and_is_whole(place, monkeypatch):
    """A folder without a manifest is refused before anything is created."""
    stripped = place / "stripped"
    shutil.copytree(place / "start", stripped)
    (stripped / "adapter_config.json").unlink()
    config = load_config(write_yaml(place, "stripped-run", {"start": str(stripped)}))
    with pytest.raises(ArtifactError, match="is missing"):
        start_module.with_start(config)
