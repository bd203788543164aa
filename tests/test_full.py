"""Full: a method without a rank, through the command and its files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from models import logits, make, perturb
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from served import dude
from tiny import save_tiny, tiny_llama, write_rows
from transformers import AutoModelForCausalLM

from dude_peft import DudeConfig, load_adapter, method_table
from dude_peft.core.reference import reference_direction, reference_linear
from dude_peft.errors import ConfigError
from dude_peft.tuner.layer import DudeLinear

WEIGHTS = "adapter_model.safetensors"
STOCK = """
import sys
from transformers import AutoModelForCausalLM
import peft
assert "dude_peft" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
peft.PeftModel.from_pretrained(model, sys.argv[2])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of four steps, with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("full")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 16)
    write_rows(folder / "test.jsonl", 6, start=100)
    (folder / "run.yaml").write_text(
        f"model: {{name_or_path: {folder / 'model'}}}\nadapter: {{method: full}}\n"
        f"data: {{train: {folder / 'train.jsonl'}, test: {folder / 'test.jsonl'}}}\n"
        "train: {learning_rate: 1.0e-3, max_steps: 4, logging_steps: 2, save_steps: 2, movement_steps: 2}\n"
        "evaluation: {rows: 2, max_new_tokens: 3}\n"
    )
    done = dude("train", folder / "run.yaml", "--output-dir", folder / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def adapted(dtype=torch.float32, **settings):
    return get_peft_model(
        make("mistral-gqa", dtype), DudeConfig(method="full", target_modules="all-linear", **settings)
    )


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DudeLinear)]


def test_the_command_trains_it_and_resumes_bit_by_bit(trained):
    report = json.loads((trained / "out/report.json").read_text())
    shapes = [p.numel() for name, p in tiny_llama().named_parameters() if "proj" in name]
    assert report["trainable_parameters"] == sum(shapes)
    assert report["after"]["loss"] < report["before"]["loss"]
    moved = [line["movement"] for line in map(json.loads, (trained / "out/metrics.jsonl").open()) if "movement" in line]
    assert moved
    again = shutil.copytree(trained / "out", trained / "again")
    for part in ("adapter", "checkpoints/step-00000004"):
        shutil.rmtree(again / part)
    (again / "report.json").unlink()
    done = dude("train", trained / "run.yaml", "--output-dir", again)
    assert "resuming from the checkpoint of step 2" in done.stdout, done.stdout + done.stderr
    one, two = (load_file(trained / name / "adapter" / WEIGHTS) for name in ("out", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_stock_peft_refuses_its_files(trained):
    command = [sys.executable, "-c", STOCK, trained / "model", trained / "out/adapter"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert "DUDE" in done.stderr.strip().splitlines()[-1]


def test_with_dude_imported_peft_loads_them_natively(trained):
    base = AutoModelForCausalLM.from_pretrained(trained / "model")
    loaded = PeftModel.from_pretrained(base, trained / "out/adapter")
    assert layers_of(loaded)
    again = load_adapter(AutoModelForCausalLM.from_pretrained(trained / "model"), trained / "out/adapter")
    assert torch.equal(logits(loaded.eval()), logits(again.eval()))


@pytest.mark.slow
def test_what_the_commands_do_with_it(trained):
    adapter = trained / "out/adapter"
    done = dude("verify", adapter)
    assert done.returncode == 0
    assert "full, no rank, 14 layers" in done.stdout
    assert "stock PEFT refuses an adapter of method full" in " ".join((done.stdout + done.stderr).split())
    done = dude("merge", adapter, "-o", trained / "merged")
    assert done.returncode == 0, done.stdout + done.stderr
    live = load_adapter(AutoModelForCausalLM.from_pretrained(trained / "model"), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(trained / "merged").eval()
    assert (logits(merged) - logits(live)).abs().max() <= 1e-5 * logits(live).abs().max()
    done = dude("export", adapter, "--to", "lora:32", "-o", trained / "lora")
    assert done.returncode == 0, done.stdout + done.stderr
    for words, command in {
        "trains whole matrices, which a stock adapter cannot hold": ["export", adapter, "--to", "peft"],
        "not full; choose one of": [
            "init",
            trained / "model",
            "--method",
            "full",
            "--quantize",
            "nf4",
            "--residual",
            trained / "residual",
        ],
    }.items():
        done = dude(*command, "-o", trained / "refused")
        assert done.returncode == 2, done.stdout + done.stderr
        assert words in " ".join(done.stderr.split())
        assert not (trained / "refused").exists()


def test_plan_and_methods_count_it(trained):
    done = dude("plan", trained / "out/config.yaml", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((trained / "out/report.json").read_text())
    planned = json.loads(done.stdout)
    assert planned["parameters"]["trainable"] == report["trainable_parameters"]
    assert planned["memory"]["trained"] == 4 * report["trainable_parameters"]
    assert planned["disk"]["adapter"] == pytest.approx((trained / "out/adapter" / WEIGHTS).stat().st_size, rel=0.2)
    row = next(row for row in method_table(str(trained / "model"), r=4).rows if row.name == "full")
    assert (row.trained, row.kept, row.bytes) == (
        report["trainable_parameters"],
        0,
        16 * report["trainable_parameters"],
    )
    row = next(row for row in method_table().rows if row.name == "full")
    assert (row.trained, row.kept) == ("out in", "0")


def test_it_has_no_rank():
    for settings in ({"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}):
        with pytest.raises(ConfigError, match="method 'full' has no rank and no alpha"):
            DudeConfig(method="full", **settings)
    model = adapted(r=100, lora_alpha=7)  # more than a layer could have, and a scaling other than 1
    assert {layer.scaling["default"] for layer in layers_of(model)} == {1.0}
    model.add_adapter("lora", DudeConfig(method="lora", r=4, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="method full, which has no rank"):
        model.base_model.add_weighted_adapter(["default", "lora"], [1.0, 1.0], "sum")


def test_dropout_and_input_gradients_are_the_textbooks():
    model = adapted(torch.float64, lora_dropout=0.5).train()
    perturb(model)
    layer = layers_of(model)[0]
    x = torch.randn(5, layer.in_features, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(4)
    y = layer(x)
    torch.manual_seed(4)
    seen = layer.lora_dropout["default"](x)
    dW, base = layer.lora_t["default"]["dW"], layer.get_base_layer()
    expected = reference_linear(
        x, base.weight, None, reference_direction(base.weight, None, dW, 1.0), None, x_change=seen
    )
    assert torch.allclose(y, expected, rtol=1e-10)
    dy = torch.randn_like(y)
    for found, wanted in zip(
        torch.autograd.grad(y, [x, dW], dy), torch.autograd.grad(expected, [x, dW], dy), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_how_far_it_moved():
    model = adapted(torch.float64)
    perturb(model)
    layer = layers_of(model)[0]
    W0 = layer.get_base_layer().weight
    cosine = torch.nn.functional.cosine_similarity(layer.effective_weight(), W0)
    assert torch.allclose(layer.movement("default")["direction"], 1 - cosine, rtol=1e-9)
