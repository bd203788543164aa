"""Adapters that stock PEFT makes, trained by `dude train` and taken by the other commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from models import logits
from night import some_by_day
from peft import PeftModel
from safetensors.torch import load_file, save_file
from served import dude
from tiny import save_tiny, write_rows
from transformers import AutoModelForCausalLM

from dude_peft import load_adapter
from dude_peft.errors import ArtifactError
from dude_peft.tuner.foreign import load_foreign

WEIGHTS = "adapter_model.safetensors"
QV = {"target_modules": ["q_proj", "v_proj"]}
TYPES = {
    "OFT": {"oft_block_size": 8, **QV},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "VERA": {"r": 4, **QV},
    "BOFT": {"boft_block_size": 4, **QV},
    "RANDLORA": {"r": 4, **QV},
    "MISS": {"r": 4, **QV},
    "HIRA": {"r": 4, **QV},
    "LOHA": {"r": 4, **QV},
    "LOKR": {"r": 4, **QV},
    "LORA": {"r": 4, **QV},
    "HRA": {"r": 4, **QV},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "FOURIERFT": {"n_frequency": 50, **QV},
}
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
import peft
assert "dude_peft" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).eval()
torch.save(model(torch.arange(3, 15)[None]).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 16)
    write_rows(folder / "test.jsonl", 6, start=100)
    return folder


def write_run(place, name, settings, **sections):
    file = place / f"{name}.json"
    if settings is not None:
        file.write_text(json.dumps(settings))
    run = {
        "model": {"name_or_path": str(place / "model")},
        "adapter": {"method": f"peft:{file}"},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl")},
        "train": {"learning_rate": 0.01, "max_steps": 4, "logging_steps": 2, "save_steps": 2},
        "evaluation": {"rows": 2, "max_new_tokens": 3},
        "output_dir": str(place / name),
    }
    run = {key: {**value, **sections.get(key, {})} if isinstance(value, dict) else value for key, value in run.items()}
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def train(place, name, settings, **sections):
    done = dude("train", write_run(place, name, settings, **sections))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(place, settings, words, code=2, **sections):
    done = dude("train", write_run(place, "refused", settings, **sections))
    assert done.returncode == code, done.stdout + done.stderr
    text = " ".join(done.stderr.split())
    assert words in text, text
    assert "Traceback" not in text
    assert not (place / "refused").exists()


@pytest.fixture(scope="module")
def oft(place):
    train(place, "oft", {"peft_type": "OFT", **TYPES["OFT"]})
    return place / "oft"


def base(place):
    return AutoModelForCausalLM.from_pretrained(place / "model")


@pytest.mark.parametrize("kind", some_by_day(TYPES, ["OFT"]))
def test_it_trains_resumes_bit_by_bit_and_loads(place, kind):
    name = kind.lower() + "-run"
    train(place, name, {"peft_type": kind, **TYPES[kind]})
    out = place / name
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == f"peft:{kind}"
    assert report["config"]["adapter"] == {"method": f"peft:{kind}", "peft": {"peft_type": kind, **TYPES[kind]}}
    assert report["after"]["loss"] != report["before"]["loss"]

    first = shutil.copytree(out, place / f"{name}-first")
    for part in ("adapter", "checkpoints/step-00000004"):
        shutil.rmtree(out / part)
    (out / "report.json").unlink()
    done = dude("train", place / f"{name}.yaml")
    assert "resuming from the checkpoint of step 2" in done.stdout, done.stdout + done.stderr
    one, two = (load_file(folder / "adapter" / WEIGHTS) for folder in (first, out))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[tensor], two[tensor]) for tensor in one)

    ours = load_foreign(base(place), out / "adapter").eval()
    stock = PeftModel.from_pretrained(base(place), out / "adapter").eval()
    assert torch.equal(logits(ours), logits(stock))
    assert not torch.equal(logits(ours), logits(base(place)))


@pytest.mark.slow
def test_stock_peft_loads_it_without_dude(place, oft):
    command = [sys.executable, "-c", STOCK, place / "model", oft / "adapter", place / "stock.pt"]
    subprocess.run(command, check=True, capture_output=True)
    ours = load_foreign(base(place), oft / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(torch.load(place / "stock.pt"), ours(torch.arange(3, 15)[None]).logits)


def test_its_own_configuration_repeats_the_run_without_the_file(place, oft):
    done = dude("train", oft / "config.yaml", "--output-dir", place / "oft-again")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(folder / "adapter" / WEIGHTS) for folder in (oft, place / "oft-again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_content_is_another_run_and_another_name_is_not(place, oft):
    file = place / "moved.json"
    path = write_run(place, "oft", {"peft_type": "OFT", **TYPES["OFT"]}, adapter={"method": f"peft:{file}"})
    file.write_text(json.dumps({"peft_type": "OFT", **TYPES["OFT"]}, indent=3))
    assert "this run is finished" in dude("train", path).stdout
    file.write_text(json.dumps({"peft_type": "OFT", **TYPES["OFT"], "oft_block_size": 4}))
    done = dude("train", path)
    assert done.returncode == 2
    assert "adapter.peft.oft_block_size: 8 -> 4" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_the_commands_take_it(place, oft):
    adapter = oft / "adapter"
    done = dude("verify", adapter, "--base", place / "model")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "peft:OFT, an adapter of stock PEFT" in done.stdout
    assert "the ones the adapter was trained on" in done.stdout
    done = dude("generate", adapter, "Who are you?", "--max-new-tokens", "4", "--base-too")
    assert done.returncode == 0, done.stdout + done.stderr
    done = dude("merge", adapter, "-o", place / "merged")
    assert done.returncode == 0, done.stdout + done.stderr
    live = load_foreign(base(place), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(place / "merged").eval()
    assert (logits(merged) - logits(live)).abs().max() <= 1e-4 * logits(live).abs().max()
    assert json.loads((place / "merged/dude_export.json").read_text())["adapters"][0]["method"] == "peft:OFT"
    done = dude("export", adapter, "--to", "peft", "-o", place / "exported")
    assert done.returncode == 2
    assert "an adapter of stock PEFT already" in " ".join(done.stderr.split())
    done = dude("merge", adapter, adapter.parent / "checkpoints/step-00000004/adapter", "-o", place / "two")
    assert done.returncode == 2
    assert "is merged by PEFT, alone" in " ".join(done.stderr.split())
    with pytest.raises(ArtifactError, match=r"an adapter of stock PEFT \(peft:OFT\)"):
        load_adapter(base(place), adapter)


def test_eval_takes_it(place, oft):
    (place / "text.txt").write_text("the answer is always the same word. " * 20)
    done = dude("eval", oft / "adapter", "--text", place / "text.txt", "-o", place / "scores")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_damaged_file_and_another_base_are_told(place, oft):
    damaged = shutil.copytree(oft / "adapter", place / "damaged")
    tensors = load_file(damaged / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, damaged / WEIGHTS, {"format": "pt"})
    assert dude("verify", damaged).returncode == 4
    forged = shutil.copytree(oft / "adapter", place / "forged")
    config = json.loads((forged / "adapter_config.json").read_text())
    (forged / "adapter_config.json").write_text(json.dumps({**config, "oft_block_size": 4}))
    done = dude("generate", forged, "hello")
    assert done.returncode == 4
    assert "was changed after saving" in " ".join(done.stderr.split())
    save_tiny(place / "other", seed=5)
    done = dude("generate", oft / "adapter", "hello", "--base", place / "other")
    assert done.returncode == 4
    assert "--base" in " ".join(done.stderr.split())


def test_a_start_that_is_not_the_base_is_told(place):
    settings = {"peft_type": "LORA", "r": 4, "init_lora_weights": False, **QV}
    done = train(place, "off", settings)
    text = " ".join((done.stdout + done.stderr).split())
    assert "the start of peft:LORA is not the base model: it changes the logits by up to" in text
    assert "the start is not the base model bit by bit" in text


OFT = {"peft_type": "OFT", **TYPES["OFT"]}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "NONSENSE", **QV}, "this PEFT has no type 'NONSENSE'"),
        ({**QV}, "key 'peft_type' is None"),
        ({"peft_type": "OFT", "blocks": 3, **QV}, "PEFT's OFTConfig has no key 'blocks'"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "learns a prompt, which changes the length"),
        ({"peft_type": "ADAPTION_PROMPT", "adapter_len": 2, "adapter_layers": 1}, "learns a prompt"),
        ({"peft_type": "ADALORA", "total_step": 9, **QV}, "ADALORA calls PEFT in every step"),
        ({"peft_type": "DUDE", **QV}, "is a method of DuDe"),
        ({**OFT, "auto_mapping": {"base_model_class": "x"}}, "key 'auto_mapping' would run other code"),
        ({**OFT, "base_model_name_or_path": "somebody/else"}, "the run's model is"),
        ({"peft_type": "LORA", "init_lora_weights": "eva", **QV}, "key 'init_lora_weights' 'eva' needs data"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa", **QV}, "key 'init_lora_weights' 'pissa' needs data"),
        ({"peft_type": "LORA", "megatron_config": {"a": 1}, **QV}, "key 'megatron_config' would run other code"),
        ({"peft_type": "LORA", "r": 10**9, **QV}, "key 'r' is 1000000000; no adapter has such a size"),
        ({"peft_type": "LORA", "r": 4, "rank_pattern": {"q_proj": 10**9}, **QV}, "key 'rank_pattern' is 1000000000"),
        ({**OFT, "target_modules": ["nowhere"]}, "PEFT's OFT refuses this model"),
        ({**OFT, "target_modules": "([a-z_.0-9]+)+!"}, "takes longer than 2 s"),
        ([1, 2], "holds no JSON object"),
    ],
)
def test_what_a_run_does_not_do_is_refused_by_name(place, settings, words):
    refused(place, settings, words)


def test_biases_of_the_base_model_are_not_trained(place):
    save_tiny(place / "biased", attention_bias=True)
    settings = {"peft_type": "LORA", "r": 4, "bias": "all", **QV}
    words = "LORA trains 'base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias' of the base model itself"
    refused(place, settings, words, model={"name_or_path": str(place / "biased")})


def test_what_is_no_such_file_is_refused(place):
    file = place / "refused.json"
    for text, words in (
        ("{", "cannot be read"),
        ('{"a": 1, "a": 2}', "appears twice"),
        ("[" * 100 + "]" * 100, "deeper"),
    ):
        file.write_text(text)
        refused(place, None, words)
    file.write_text(" " * (1 << 20) + "{}")
    refused(place, None, "larger than 1 MiB")
    file.unlink()
    refused(place, None, "No such file")
    os.mkfifo(file)
    refused(place, None, "is a FIFO")
    file.unlink()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"adapter": {"r": 16}}, "key 'adapter.r' has no effect beside"),
        ({"adapter": {"norm_gradient": "exact"}}, "key 'adapter.norm_gradient' has no effect beside"),
        ({"train": {"learning_rate": None}}, "key 'train.learning_rate' is missing"),
        ({"train": {"magnitude_lr_ratio": 2.0}}, "key 'train.magnitude_lr_ratio' has no effect"),
        ({"train": {"movement_steps": 2}}, "the movement of peft:OFT cannot be measured"),
    ],
)
def test_keys_that_cannot_apply_are_refused_by_name(place, sections, words):
    refused(place, OFT, words, **sections)


@pytest.mark.slow
def test_the_plan_counts_it(place):
    done = dude("plan", write_run(place, "planned", OFT), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["method"] == "peft:OFT"
    assert told["memory"]["trained"] > 0
    assert told["memory"]["activations"] > 0


def test_settings_without_the_method_are_refused(place):
    refused(place, OFT, "key 'adapter.peft': adapter.method is dude", adapter={"method": "dude", "peft": OFT})
