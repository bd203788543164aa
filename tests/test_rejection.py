"""Rejection sampling, `dude generate --as-rows --keep correct`: what is kept, what is refused, and training on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from served import dude
from test_preference import settings, start
from tiny import save_tiny, write_rows

from dude_peft import generate
from dude_peft.answer import decode
from dude_peft.answer.decode import Completion
from dude_peft.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_right_answers_that_ended_are_kept_once(checkpoint, tmp_path, monkeypatch, capsys):
    rows = [{"question": f"{n} + 4?", "answer": f"so\n#### {n + 4}"} for n in (3, 5)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [
        Completion("3 + 4 = 7\n#### 7", "end"),
        Completion("3 + 4 = 7\n#### 7 ", "end"),
        Completion("It is 7.", "end"),
        Completion("#### 7", "length"),
        *[Completion(text, "end") for text in ("#### 8", "9 or 8", " ", "#### 9.5")],
    ]
    monkeypatch.setattr(decode, "decode_all", lambda *_, **__: answers)
    found = generate(str(checkpoint), file=file, as_rows=True, keep="correct", samples=4, temperature=1.0, quiet=False)
    assert [record["completion"] for record in found] == ["3 + 4 = 7\n#### 7", "It is 7."]
    assert {record["prompt"] for record in found} == {"3 + 4?"}
    told = "3 of 8 completions are right, for 1 of 2 prompts; 2 different ones are kept"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": "best", "as_rows": True, "file": "x.jsonl"}, "--keep best: there is one choice, correct"),
        ({"keep": "correct", "file": "x.jsonl"}, "--keep correct needs --as-rows"),
        ({"keep": "correct", "as_rows": True, "prompts": ["a"]}, "--keep correct needs --as-rows, and --file"),
        ({"keep": "correct", "as_rows": True, "file": "x.txt"}, "rows that have answers"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_loading(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        generate(tmp_path, **options)


def test_rows_without_an_answer_are_refused_with_their_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no answer to compare with; --keep correct"):
        generate(tmp_path, file=file, as_rows=True, keep="correct")


@pytest.mark.slow
def test_the_command_samples_and_sft_learns_of_it(tmp_path):
    """A model that says yes, sampled twice a prompt: what is kept trains another run."""
    rows = write_rows(tmp_path / "train.jsonl", 12)
    places = tmp_path / "places"
    places.mkdir()
    data = {"train": str(rows), "test": str(rows)}
    train = {"objective": "sft", "max_steps": 60, "learning_rate": 0.02, "save_steps": 60}
    save_tiny(tmp_path / "model", initializer_range=0.1)  # one whose logits are large enough to be changed
    model = {"name_or_path": str(tmp_path / "model")}
    made = {**settings(places, tmp_path / "first", data=data, train=train), "model": model}
    start(made)
    options = ["--as-rows", "--keep", "correct", "--samples", "2", "--temperature", "0.5", "--max-new-tokens", "8"]
    out = tmp_path / "kept.jsonl"
    for _ in range(2):
        done = dude("generate", tmp_path / "first/adapter", "--file", rows, "-o", out, "--overwrite", *options)
        assert done.returncode == 0, done.stderr
        assert "completions are right" in done.stderr
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert 1 <= len(kept) <= 12
    assert {record["completion"] for record in kept} == {"yes"}
    second = {**settings(places, tmp_path / "second", data={**data, "train": str(out)}, train=train), "model": model}
    assert start(second).data["train"]["examples"] == len(kept)
