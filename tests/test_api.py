"""The Python interface: every public function's own example runs, prints nothing, and gives a typed result."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import numpy as np
import peft
import pytest
import yaml
from tiny import save_tiny, write_rows
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import dude_peft
from dude_peft.config.reading import load_config
from dude_peft.errors import ConfigError

# In the order in which each finds what it needs.
FUNCTIONS = (
    "check_data", "method_table", "plan", "train", "compare", "generate", "verify", "merge", "export", "evaluate",
    "report",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the examples name: run.yaml, mine.jsonl, my-model, runs/mine/adapter."""
    folder = tmp_path_factory.mktemp("api")
    save_tiny(folder / "my-model")
    write_rows(folder / "mine.jsonl", 24)
    (folder / "general.txt").write_text("some general text\n" * 40)
    settings = {
        "model": {"name_or_path": "my-model"},
        "adapter": {"r": 4},
        "data": {"train": "mine.jsonl", "test": 0.25},
        "train": {"max_steps": 2, "learning_rate": 0.01},
        "evaluation": {"rows": 2, "max_new_tokens": 4},
        "output_dir": "runs/mine",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    grid = {
        "run": "run.yaml",
        "methods": ["lora"],
        "learning_rates": [0.01],
        "extend": 0,
        "tuning_seeds": [0],
        "final_seeds": [1],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({**grid, "output_dir": "runs/compared"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        dude_peft.train("run.yaml")
    return folder


def example(function) -> str:
    """The indented block behind the first paragraph of a docstring."""
    body = inspect.getdoc(function).partition("\n\n")[2]
    block = re.match(r"((?: {4}.*\n|\n)+)", body)
    assert block, f"{function.__name__} has no example"
    return textwrap.dedent(block[1])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("compare", "merge", "export"))) for name in FUNCTIONS],
)
def test_the_example_of_every_function_runs(place, monkeypatch, capfd, name):
    if name == "evaluate":
        pytest.importorskip("lm_eval", reason="dude eval needs lm_eval, which is not installed here")
    monkeypatch.chdir(place)
    code = example(getattr(dude_peft, name))
    capfd.readouterr()
    names = {"dude_peft": dude_peft, "print": lambda *values: None}
    exec(compile(code, name, "exec"), names)
    assert capfd.readouterr().out == ""
    results = [value for key, value in names.items() if key in ("report", "plan", "found", "made")]
    for result in results:
        assert dataclasses.is_dataclass(result)
        assert result._repr_html_().startswith("<table>")


@pytest.mark.parametrize("name", ["DudeConfig", "load_adapter", "MovementCallback"])
def test_the_examples_of_peft_s_own_way_run(place, monkeypatch, capfd, name):
    monkeypatch.chdir(place)
    loaded = AutoModelForCausalLM.from_pretrained("my-model")
    adapted = peft.get_peft_model(loaded, dude_peft.DudeConfig(r=2, target_modules="all-linear"))
    arguments = TrainingArguments(
        "trainer", max_steps=1, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    names = {
        "dude_peft": dude_peft, "peft": peft, "AutoModelForCausalLM": AutoModelForCausalLM, "Trainer": Trainer,
        "model": AutoModelForCausalLM.from_pretrained("my-model") if name == "DudeConfig" else adapted,
        "arguments": arguments, "rows": [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8, "print": lambda *_: None,
    }  # fmt: skip
    exec(compile(example(getattr(dude_peft, name)), name, "exec"), names)
    if name == "MovementCallback":
        assert len(names["movement"].layers) == 14


def test_all_names_are_there_and_come_when_they_are_asked_for():
    assert set(FUNCTIONS) < set(dude_peft.__all__)
    assert dir(dude_peft) == sorted(dude_peft.__all__)
    for name in dude_peft.__all__:
        assert getattr(dude_peft, name) is not None


def test_a_configuration_is_a_file_or_its_content_or_itself(place, monkeypatch):
    monkeypatch.chdir(place)
    content = yaml.safe_load(Path("run.yaml").read_text())
    ways = [dude_peft.plan(given) for given in ("run.yaml", Path("run.yaml"), content, load_config("run.yaml"))]
    assert len({str(made.as_dict()["memory"]["activations"]) for made in ways}) == 1
    assert dude_peft.plan(content, ["train.max_steps=7"]).steps == 7


def test_a_mistake_in_a_dict_is_told_by_its_key():
    with pytest.raises(ConfigError, match=r"configuration: key 'train.learning_rat' is unknown; closest"):
        dude_peft.plan({"model": {"name_or_path": "x"}, "train": {"learning_rat": 1}})


def test_completions_are_records_and_lines(place, monkeypatch):
    monkeypatch.chdir(place)
    found = dude_peft.generate("runs/mine/adapter", ["<b>say</b> 1"], max_new_tokens=2)
    assert found[0]["prompt"] == "<b>say</b> 1"
    assert found.lines().count(b"\n") == 1
    assert "<b>say" not in found._repr_html_()
    assert "&lt;b&gt;say" in found._repr_html_()


def test_the_options_are_those_of_the_command():
    """By name: an option of the command is a parameter of its function, but for what only a command has."""
    import typer

    from dude_peft import cli

    commands = typer.main.get_command(cli.app).commands
    commands = {**commands, "check_data": commands["data"].commands["check"], "evaluate": commands["eval"]}
    commands["method_table"] = commands["methods"]
    only_here = {"debug", "as_json", "help", "strategy", "processes", "config"}
    only_here |= {"dry_run", "print_commands", "one"}
    renamed = {"weight": "weights"}
    for name in FUNCTIONS:
        ours = set(inspect.signature(getattr(dude_peft, name)).parameters)
        theirs = {renamed.get(p.name, p.name) for p in commands[name].params} - only_here
        assert theirs <= ours, f"{name}: {theirs - ours}"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dude_peft.load_adapter("my-model", "runs/mine/adapter"), "needs a loaded model"),
        (lambda: dude_peft.check_data([{"prompt": "a"}], "my-model"), "rows are read from a file"),
        (lambda: dude_peft.plan("mine.jsonl"), "dude config new mine.jsonl"),
        (lambda: dude_peft.verify("runs/mine"), "give the adapter inside it, runs/mine/adapter"),
    ],
)
def test_a_wrong_kind_is_told_what_to_do(place, monkeypatch, call, words):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match=words):
        call()


def test_an_override_replaces_its_rival_and_results_are_short(place, monkeypatch):
    monkeypatch.chdir(place)
    made = dude_peft.plan("run.yaml", ["train.num_train_epochs=2"])
    assert made.config.train.max_steps is None
    assert len(repr(made)) < 200


@pytest.mark.parametrize(
    "call",
    [
        lambda: dude_peft.plan(None),
        lambda: dude_peft.plan(b"x"),
        lambda: dude_peft.plan("run.yaml", None),
        lambda: dude_peft.plan("run.yaml", [1]),
        lambda: dude_peft.verify("runs/mine/adapter", base=1),
        lambda: dude_peft.check_data("mine.jsonl", True),
        lambda: dude_peft.check_data("mine.jsonl", "my-model", columns=["x"]),
        lambda: dude_peft.check_data("mine.jsonl", "my-model", seed=1.5),
        lambda: dude_peft.check_data("mine.jsonl", "my-model", upft=True),
        lambda: dude_peft.generate("runs/mine/adapter", ["x"], temperature=None),
        lambda: dude_peft.generate("runs/mine/adapter", ["x"], output=True),
        lambda: dude_peft.merge([1], "merged-1"),
    ],
)
def test_a_wrong_kind_is_one_line(place, monkeypatch, call):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)


LONG = "x" * 300


@pytest.mark.parametrize("path", ["a\0b", "\ud800", LONG, f"{LONG}/adapter", "/x" * 3000])
@pytest.mark.parametrize(
    "call",
    [
        lambda path: dude_peft.merge(path, "merged-1"),
        lambda path: dude_peft.merge("runs/mine/adapter", path),
        lambda path: dude_peft.merge(["runs/mine/adapter", path], "merged-1"),
        lambda path: dude_peft.export("runs/mine/adapter", "peft", Path(path)),
        lambda path: dude_peft.evaluate("my-model", "scores", text=path),
        lambda path: dude_peft.evaluate("my-model", path, text="general.txt"),
        lambda path: dude_peft.generate("my-model", ["x"], output=path),
        lambda path: dude_peft.method_table(path),
        lambda path: dude_peft.report("runs/mine", path),
        lambda path: dude_peft.report(path, "page.html"),
    ],
)
def test_a_path_that_no_file_can_have_is_one_line(place, monkeypatch, path, call):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError) as caught:
        call(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"model": ""}, "empty"),
        ({"target_modules": ["q_proj"]}, "only with a model"),
        ({"gguf_file": "model.gguf"}, "only with a model"),
        ({"model": "my-model", "target_modules": ["\x1b[2J"]}, "not a module"),
        ({"model": "my-model", "target_modules": "x" * 5000}, "matches no layer"),
    ],
)
def test_a_table_of_methods_that_cannot_be_is_one_line(place, monkeypatch, options, part):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match=part) as caught:
        dude_peft.method_table(**options)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_samples_have_a_limit(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match="10,000"):
        dude_peft.generate("my-model", ["x"], samples=10**9, temperature=0.5)


def test_numbers_of_numpy_are_numbers(place, monkeypatch):
    monkeypatch.chdir(place)
    found = dude_peft.check_data("mine.jsonl", "my-model", seed=np.int64(3), max_length=np.int32(64))
    assert found.examples == 24
    content = yaml.safe_load(Path("run.yaml").read_text())
    content["train"]["learning_rate"] = np.float32(0.5)
    assert dude_peft.plan(content).config.train.learning_rate == 0.5


def test_a_configuration_that_holds_itself_ends():
    loop: dict = {"model": {}}
    loop["model"]["name_or_path"] = loop
    with pytest.raises(ConfigError, match="nested deeper"):
        dude_peft.plan(loop)
