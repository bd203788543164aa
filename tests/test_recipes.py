"""The recipes: each is read as it stands, its small twin is the same but for its size, and the twin trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from night import some_by_day
from served import dude
from tiny import save_tiny

from dude_peft.comparison.cells import Grid
from dude_peft.config.reading import load_config, load_grid
from dude_peft.data.formats import Message, Row
from dude_peft.data.template import Template

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.parent.name for path in ROOT.glob("recipes/*/run.yaml"))
SIZE = {
    "adapter.r", "adapter.lora_alpha", "data.train", "data.test", "data.test.share", "data.train_rows",
    "train.max_steps", "train.num_train_epochs", "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps", "train.warmup_steps", "train.logging_steps", "train.save_steps", "output_dir",
}  # fmt: skip
PEFT = """
{"model_id": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "max_seq_length": 768, "batch_size": 4,
 "batch_size_eval": 50, "max_steps": 5000, "seed": 0, "grad_norm_clip": 1.0,
 "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}, "lr_scheduler": "cosine",
 "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
 "query_template": "Question: {query} Think step by step.\\nAnswer:"}
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Where the commands in the files are run."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024)


def flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def written(tokenizer, *, answer="Six.\n#### 6"):
    row = Row((Message("user", "What is 2 * 3?"), Message("assistant", answer)), "here")
    return "".join(Template(tokenizer, "chat").render(row))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_and_so_is_its_grid(name):
    run = load_config(f"recipes/{name}/run.yaml")
    assert run.resolved().adapter.method == "dude"
    config, own = load_grid(f"recipes/{name}/grid.yaml")
    grid = Grid(config, own)
    grid.check(None)
    assert {each.name for each in grid.contestants} == {"dude", "dora", "pissa", "lora"}
    listed = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    assert f"[{name}]({name}/run.yaml)" in listed
    assert f"{grid.runs} runs" in listed


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_is_its_recipe_but_for_the_size(name):
    run, twin = (load_config(f"recipes/{name}/{file}.yaml") for file in ("run", "twin"))
    one, two = (dict(flat(config.model_dump(mode="json"))) for config in (run, twin))
    differ = {key for key in one if one[key] != two[key] and not key.startswith(("model.", "evaluation."))}
    assert differ <= SIZE
    assert twin.adapter.lora_alpha / twin.adapter.r == run.adapter.lora_alpha / run.adapter.r


@pytest.mark.parametrize("name", some_by_day(RECIPES, ["peft-metamathqa"]))
def test_a_twin_trains_two_steps(name, tiny, tmp_path):
    options = [f"model.name_or_path={tiny}", "model.gguf_file=null", "model.dtype=auto", "train.max_steps=2"]
    options += ["adapter.r=2", "adapter.lora_alpha=2", "data.max_length=768", "evaluation.max_new_tokens=4"]
    options += ["evaluation.rows=2"]
    given = [word for option in options for word in ("--set", option)]
    done = dude("train", f"recipes/{name}/twin.yaml", *given, "--output-dir", tmp_path / "out", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 2
    assert report["data"]["template"] == "chat"
    assert "longer than max_length" not in done.stdout + done.stderr


def test_the_peft_recipe_has_the_numbers_of_peft():
    theirs, ours = json.loads(PEFT), load_config("recipes/peft-metamathqa/run.yaml")
    assert ours.model.name_or_path == theirs["model_id"]
    assert ours.model.dtype == theirs["dtype"]
    assert ours.data.max_length == theirs["max_seq_length"]
    train, evaluation = ours.train, ours.evaluation
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (theirs["batch_size"], 1)
    assert (train.max_steps, train.seed) == (theirs["max_steps"], theirs["seed"])
    assert train.max_grad_norm == theirs["grad_norm_clip"]
    assert (train.learning_rate, train.weight_decay) == tuple(theirs["optimizer_kwargs"].values())
    assert (train.lr_scheduler_type, train.warmup_steps) == (theirs["lr_scheduler"], 0.1)
    assert evaluation.batch_size == theirs["batch_size_eval"]
    assert evaluation.max_new_tokens == theirs["generation_kwargs"]["max_new_tokens"]


def test_the_templates_write_what_their_sources_write(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.bos_token = "<|system|>"
    alpaca = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{query}\n\n### Response:"
    )
    sources = {
        "peft-metamathqa": (json.loads(PEFT)["query_template"], ""),
        "metamathqa-7b": (alpaca, "\n"),
        "commonsense-170k": (f"{alpaca}\n", ""),
        "alpaca-mmlu": (alpaca, ""),
    }
    assert sorted(sources) == RECIPES
    for name, (prompt, end) in sources.items():
        tokenizer.chat_template = load_config(f"recipes/{name}/run.yaml").data.chat_template
        expected = prompt.format(query="What is 2 * 3?")
        assert written(tokenizer) == f"<|system|>{expected}Six.\n#### 6{end}<|end|>"


def test_commands_in_the_files_name_files_that_are_there():
    for path in ROOT.glob("recipes/**/*.*"):
        for name in re.findall(r"recipes/[\w./-]+\.(?:yaml|jsonl)", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path}: {name}"
