"""`dude data check`: what it shows of a data set, without weights and without the network."""

import functools
import json
from pathlib import Path

import pytest
import yaml
from served import dude
from tiny import tiny_tokenizer
from transformers import LlamaConfig

from dude_peft.config.reading import load_config
from dude_peft.errors import ConfigError, DataError
from dude_peft.training.data_check import check_data
from dude_peft.training.run_data import read

check = functools.partial(check_data, quiet=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path) -> str:
    """A folder with a tokenizer and a configuration, and no weights."""
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=261).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


TURNS = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b\x1b[31m")]
ROWS = [
    {"prompt": "one", "completion": "yes"},
    {"prompt": "one", "completion": "yes"},
    {"prompt": "long", "completion": "x" * 80},
    {"messages": [{"role": role, "content": text} for role, text in TURNS]},
]


def test_it_shows_what_is_trained(tmp_path, model, capsys):
    train = write(tmp_path / "train.jsonl", ROWS)
    test = write(
        tmp_path / "test.jsonl", [{"prompt": "one", "completion": "no"}, {"prompt": "two", "completion": "no"}]
    )
    check(train, model, test=test, max_length=60)
    out = capsys.readouterr().out
    for line in (
        "format: prompt + completion, messages",
        "template: chat; the end token is '<|end|>'",
        "rows: 4; examples: 3; duplicates: 1",
        "max_length is 60",
        "answers with a trained end: 3 of 3 examples",
        "warning: 1 of 4 rows are longer than max_length 60 and are left out (1 would lose only the end of their ",
        "warning: 1 of 2 held-out examples repeat the question of a training example",
        f"example 3, {train}:4; trained tokens are between « and »:",
        "<|user|>q<|end|>\n<|assistant|>«a<|end|>»\n<|user|>r<|end|>\n<|assistant|>«b\\x1b[31m<|end|>»",
    ):
        assert line in out
    assert "\x1b" not in out


def test_the_middle_of_a_long_example_is_left_out(tmp_path, model, capsys):
    check(write(tmp_path / "t.jsonl", [{"text": "a" * 400 + "b" * 400}]), model, max_length=900)
    out = capsys.readouterr().out
    assert "a»\n…\n«b" in out
    assert out.count("a" * 140) == out.count("b" * 140) == 1
    assert "a" * 160 not in out


@pytest.mark.parametrize(
    ("count", "options", "section"),
    [
        (3, {}, {"data": {"template": "chat"}, "evaluation": {"enabled": False}}),
        (30, {}, {"data": {"template": "chat", "test": 0.2}}),
        (60, {}, {"data": {"template": "chat", "test": 0.1}}),
        (30, {"test": "0.2", "seed": 3}, {"data": {"template": "chat", "test": 0.2, "seed": 3}}),
        (3, {"template": "plain", "max_length": 64}, {"data": {"template": "plain", "max_length": 64}}),
    ],
)
def test_it_ends_with_yaml_that_works(tmp_path, model, capsys, count, options, section):
    train = write(tmp_path / "a: #b\u00e9.jsonl", [{"ask": f"q{n}", "completion": "a"} for n in range(count)])
    check(train, model, columns={"prompt": "ask"}, **options)
    out = capsys.readouterr().out
    text = out.partition("\nfor CONFIG.yaml:\n")[2].partition("next:")[0]
    found = yaml.safe_load(text)
    assert found["data"] == {"train": train, "columns": {"prompt": "ask"}, **section["data"]}
    assert list(found) == list(section) or "evaluation" in found
    (tmp_path / "run.yaml").write_text(f"model: {{name_or_path: {model}}}\noutput_dir: out\n{text}")
    data = read(load_config(tmp_path / "run.yaml"), tiny_tokenizer())
    assert len(data.train) + (len(data.held_out.examples) if data.held_out else 0) == count


def test_wrong_options_and_rows_are_ours(tmp_path, model):
    good = write(tmp_path / "t.jsonl", ROWS)
    with pytest.raises(ConfigError, match="template is 'x'"):
        check(good, model, template="x")
    with pytest.raises(ConfigError, match="train_on is 'x'"):
        check(good, model, train_on="x")
    with pytest.raises(ConfigError, match="--model is empty"):
        check(good, "")
    with pytest.raises(DataError, match=r":1: no known format"):
        check(write(tmp_path / "u.jsonl", [{"a": 1}]), model)


def test_the_command(tmp_path, model):
    bad = write(tmp_path / "t.jsonl", [{"prompt": "q"}])
    done = dude("data", "check", bad, "--model", model)
    assert done.returncode == 3
    assert done.stderr.startswith(f"dude: error[data]: {bad}:1: 'prompt' without 'completion'")


@pytest.mark.parametrize(
    ("special_tokens", "line"),
    [
        ("text", "warning: 1 of 2 rows spells special tokens, which are plain text there; special_tokens: allow"),
        ("allow", "warning: 1 of 2 rows spells special tokens; they are read as those tokens"),
    ],
)
def test_rows_that_spell_special_tokens_are_counted(tmp_path, model, capsys, special_tokens, line):
    rows = [{"prompt": "say <|user|>", "completion": "<|user|>no"}, {"prompt": "say", "completion": "yes"}]
    check(write(tmp_path / "t.jsonl", rows), model, special_tokens=special_tokens)
    out = capsys.readouterr().out
    assert line in out
    assert "«<|user|>no<|end|>»" in out
    trained = (1 if special_tokens == "allow" else 8) + 3 + 4
    assert f", {trained} of them trained" in out
