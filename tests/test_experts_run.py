"""Runs and commands with adapters of experts: train, resume, plan, verify, merge, export, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from served import dude
from test_train_resume import _CutError, cut_at
from tiny import tiny_tokenizer, write_rows

import dude_peft
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.training import run as run_module
from dude_peft.training.run import run

STEPS = 6


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    common = {
        "vocab_size": 261, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "eos_token_id": 256,
        "pad_token_id": 257, "bos_token_id": None,
    }  # fmt: skip
    made = {
        "qwen3-moe": hf.Qwen3MoeConfig(**common, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        "gpt-oss": hf.GptOssConfig(
            **common, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32, sliding_window=16
        ),
        "mixtral": hf.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32),
    }
    for name, settings in made.items():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(settings)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "experts" in parameter_name or parameter_name.endswith("bias"):
                    parameter.normal_(std=0.05)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "train.jsonl", 16)
    write_rows(folder / "test.jsonl", 2, start=100)
    return folder


def settings(places: Path, out: Path, model: str = "qwen3-moe", **adapter: object) -> dict:
    return {
        "model": {"name_or_path": str(places / model)},
        "adapter": {
            "r": 2,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            **adapter,
        },
        "data": {"train": str(places / "train.jsonl"), "test": str(places / "test.jsonl"), "template": "plain"},
        "train": {"learning_rate": 0.01, "max_steps": STEPS, "per_device_train_batch_size": 4, "save_steps": 1},
        "evaluation": {"rows": 1, "max_new_tokens": 2},
        "output_dir": str(out),
    }


@pytest.fixture(scope="module")
def trained(places) -> Path:
    out = places / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "loss_curve", lambda *_: b"")
        found = run(RunConfig(**settings(places, out)), quiet=True)
    assert found.after.loss < found.before.loss - 0.3
    return out


def test_an_interrupted_run_goes_on_to_the_same_bits(places, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")
    wanted = RunConfig(**settings(places, tmp_path / "out"))
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(_CutError):
            run(wanted, quiet=True)
    run(wanted, quiet=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.slow
def test_the_plan_counts_what_the_run_trains(places, trained):
    report = json.loads((trained / "report.json").read_text())
    wanted = settings(places, places / "planned")
    wanted["model"]["dtype"] = "bfloat16"  # float32 experts cannot be traced
    found = dude_peft.plan(wanted)
    assert found.cost.static.trainable_parameters == report["trainable_parameters"]
    assert not found.cost.uncounted
    # The effective stacks of a layer live at once: two of 4 x 96 x 48 numbers in bfloat16.
    wanted["adapter"]["target_parameters"] = None
    plain = dude_peft.plan(wanted)
    assert found.cost.bill.total - plain.cost.bill.total >= 2 * 4 * 96 * 48


def test_verify_and_the_page_know_experts(places, trained):
    found = dude_peft.verify(trained / "adapter", base=str(places / "qwen3-moe"))
    assert found.layers == 6
    assert "experts" in (found.stock_refusal or "")
    made = dude_peft.report(trained, trained / "again.html")
    assert "experts.down_proj" in made.path.read_text()


def test_a_damaged_adapter_of_experts_is_refused(trained, tmp_path):
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="differs from what was saved"):
        dude_peft.verify(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("adapter", "train", "words"),
    [
        ({"lora_dropout": 0.1}, {}, "'adapter.target_parameters' and 'adapter.lora_dropout'"),
        ({"bias": "all"}, {}, "'adapter.target_parameters' and 'adapter.bias'"),
        ({"budget": {"parameters": 10_000}}, {}, "'adapter.target_parameters' and 'adapter.budget'"),
        ({"target_modules": [], "target_parameters": None}, {}, "'adapter.target_modules' is empty"),
        ({"method": "lora-xs"}, {}, "method 'lora-xs' has no factors A and B for every expert"),
        ({}, {"orthogonality": 0.1}, "'train.orthogonality' is for layers alone"),
    ],
)
def test_what_a_run_cannot_have_is_refused_before_it_begins(places, tmp_path, adapter, train, words):
    wanted = settings(places, tmp_path / "out", **adapter)
    wanted["train"] |= train
    with pytest.raises((ConfigError, ValueError), match=words):
        RunConfig(**wanted).resolved()
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_experts_has_no_lora(trained, tmp_path):
    for target, words in {
        "lora:8": "is no linear layer, and no program serves a LoRA of it",
        "peft": "gives experts a magnitude, which stock PEFT's target_parameters have not",
    }.items():
        with pytest.raises(ConfigError, match=words):
            dude_peft.export(trained / "adapter", target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3-moe", "gpt-oss", "mixtral"])
def test_merged_and_stock_exports_are_the_live_adapter(places, model, tmp_path):
    """`dude merge` writes the base's own layout, experts one by one; `--to peft` is what stock PEFT computes."""
    for method, targets in {"dude": ["merged"], "pissa": ["merged", "peft"]}.items():
        out = tmp_path / f"{method}-run"
        path = tmp_path / f"{method}.yaml"
        path.write_text(json.dumps(settings(places, out, model, method=method)))
        done = dude("train", path)
        assert done.returncode == 0, done.stderr
        for target in targets:
            made = dude_peft.export(out / "adapter", target, tmp_path / f"{method}-{target}")
            assert made.record["difference"]["kl_tuned_export"] <= 1e-9
            assert made.record["difference"]["kl_tuned_base"] >= 1e-4
        merged = tmp_path / f"{method}-merged/model.safetensors"
        with safe_open(merged, "pt") as ours, safe_open(places / model / "model.safetensors", "pt") as theirs:
            assert sorted(ours.keys()) == sorted(theirs.keys())
    several = dude_peft.merge([tmp_path / "dude-run/adapter", tmp_path / "pissa-run/adapter"], tmp_path / "both")
    assert several.record["difference"]["kl_tuned_export"] <= 1e-9


@pytest.mark.slow
def test_two_processes_train_experts(places, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings(places, tmp_path / "out")))
    done = dude("train", path, "--launch", "ddp", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert dude_peft.verify(tmp_path / "out/adapter").layers == 6
    done = dude("train", path, "--launch", "fsdp2", "--processes", "2", "--overwrite")
    assert done.returncode == 2
    assert "needs whole weights" in " ".join((done.stdout + done.stderr).split())
