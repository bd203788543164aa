"""UPFT: the first tokens of each answer alone, token by token; and answers sampled to train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from served import dude
from test_data_masks import TEMPLATES, tokenizer_of
from tiny import save_tiny, tiny_tokenizer, write_rows

from dude_peft.chat.generate import generate
from dude_peft.config.schema import RunConfig
from dude_peft.data import IGNORE, Message, Row, Template, encode, load_rows
from dude_peft.data.prepare import prepare
from dude_peft.errors import ConfigError, DataError
from dude_peft.training.run import run

TALK = Row(
    (Message("user", "Why?"), Message("assistant", "Because"), Message("user", "And?"), Message("assistant", "No")),
    "talk.jsonl:1",
)


def marked(row: Row, upft: int | None, *, name: str = "chatml", max_length: int = 400, **options) -> list[str]:
    """Each example as text, what is trained between « and »."""
    tokenizer = tokenizer_of(name)
    found = encode([row], Template(tokenizer, "auto"), tokenizer, max_length, upft=upft, **options)
    texts = []
    for example in found.examples:
        text, inside = "", False
        for token, label in zip(example["input_ids"], example["labels"], strict=True):
            assert label in (IGNORE, token)
            if inside != (label != IGNORE):
                inside = not inside
                text += "«" if inside else "»"
            text += tokenizer.decode([token])
        texts.append(text + "»" * inside)
    return texts


def test_the_first_tokens_of_every_answer_and_nothing_behind_the_last():
    (text,) = marked(TALK, 3)
    assert text.endswith("«Bec»ause<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n«No»")
    (text,) = marked(TALK, 1)
    assert text.endswith("assistant\n«N»")
    assert "«B»ecause" in text
    (text,) = marked(TALK, 1, train_on="last_answer")
    assert text.count("«") == 1
    assert text.endswith("«N»")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("upft", [1, 2, 50])
def test_no_template_teaches_an_end(name, upft):
    row = Row(TALK.messages[:2], "talk.jsonl:1")
    (whole,) = marked(row, None, name=name)
    (text,) = marked(row, upft, name=name)
    prompt, _, answer = text.partition("«")
    assert whole.startswith(f"{prompt}«")
    beginning = answer.removesuffix("»")
    assert whole.partition("«")[2].startswith(beginning)
    if upft == 50:  # an answer shorter than N: all of it, not its end
        assert beginning.rstrip().endswith("Because")
    else:
        assert len(beginning) == upft


def test_only_what_is_kept_has_to_fit():
    row = Row((Message("user", "a"), Message("assistant", "b" * 500)), "long.jsonl:1")
    with pytest.raises(DataError, match="none of the 1 rows fits"):
        marked(row, None)
    (text,) = marked(row, 8)
    assert text.endswith("«bbbbbbbb»")


def test_rows_without_a_beginning_are_refused():
    with pytest.raises(DataError, match=r"text\.txt:1: plain text has no answer"):
        marked(Row((Message("text", "abc"),), "text.txt:1"), 4)
    with pytest.raises(ConfigError, match="upft is 4"):
        marked(TALK, 4, train_on="all")
    with pytest.raises(ConfigError, match="upft is 0"):
        marked(TALK, 0)


def test_the_cache_keeps_beginnings_and_whole_answers_apart(tmp_path):
    file, tokenizer = str(write_rows(tmp_path / "rows.jsonl", 4)), tiny_tokenizer()
    template = Template(tokenizer, "auto")
    made = {n: prepare(file, template, tokenizer, max_length=64, upft=n, cache=tmp_path / "c") for n in (None, 2, 3)}
    assert [found.counts.trained_tokens for found in made.values()] == [4 * 4, 4 * 2, 4 * 3]  # "yes" and its end
    assert [found.counts.ended for found in made.values()] == [4, 0, 0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("packing", [False, True])
def test_one_command_samples_and_the_run_trains(checkpoint, tmp_path, packing):
    """Three samples of four questions, seeded; their first two tokens are trained, held-out rows stay whole."""
    questions, solutions = write_rows(tmp_path / "questions.jsonl", 4), tmp_path / "solutions.jsonl"
    options = {"as_rows": True, "samples": 3, "temperature": 1.0, "max_new_tokens": 12, "seed": 1}
    generate(str(checkpoint), file=str(questions), output=solutions, **options)
    records = [json.loads(line) for line in solutions.read_text().splitlines()]
    assert 6 < len(records) <= 12  # random bytes: some are no text to train on
    assert all(record.keys() == {"prompt", "completion"} and record["completion"].strip() for record in records)
    assert len({record["completion"] for record in records}) > 4
    assert [record["prompt"] for record in records] == sorted(record["prompt"] for record in records)
    assert len(load_rows(str(solutions))) == len(records)
    config = {
        "model": {"name_or_path": str(checkpoint)},
        "adapter": {"r": 4},
        "data": {"train": str(solutions), "test": str(questions), "upft": 2, "packing": packing, "max_length": 64},
        "train": {"learning_rate": 0.01, "max_steps": 3, "per_device_train_batch_size": 2},
        "evaluation": {"rows": 1, "max_new_tokens": 2},
        "output_dir": str(tmp_path / "out"),
    }
    report = run(RunConfig(**config), quiet=True)
    train, test = report.data["train"], report.data["test"]
    assert train["trained_tokens"] == sum(min(2, len(record["completion"].encode())) for record in records)
    assert train["ended"] == 0
    assert test["trained_tokens"] == 4 * 4


def test_a_conversation_becomes_a_conversation(checkpoint, tmp_path):
    said = {"system": "Be.", "user": "a", "assistant": "b"}
    talk = [{"role": role, "content": text} for role, text in said.items()]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    out = tmp_path / "out.jsonl"
    generate(str(checkpoint), file=str(tmp_path / "talk.jsonl"), output=out, as_rows=True, max_new_tokens=4)
    (row,) = load_rows(str(out))
    assert [message.role for message in row.messages] == ["system", "user", "assistant"]


def test_an_empty_answer_gives_no_row(checkpoint, tmp_path, monkeypatch, capsys):
    from dude_peft.answer import decode
    from dude_peft.answer.decode import Completion

    answers = [Completion(" \n", "end"), Completion("four", "length")]
    monkeypatch.setattr(decode, "decode_all", lambda *_, **__: answers)
    generate(str(checkpoint), ["a", "b"], output=tmp_path / "out.jsonl", as_rows=True, quiet=False)
    assert (tmp_path / "out.jsonl").read_text() == '{"prompt": "b", "completion": "four"}\n'
    assert "left out: 1 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "--samples 0"),
        ({"samples": 2}, "--samples 2.*--temperature"),
        ({"as_rows": True, "raw": True}, "--as-rows"),
        ({"as_rows": True, "base_too": True}, "--as-rows"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_loading(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        generate(tmp_path, ["a"], **options)


def test_the_commands_take_the_options(checkpoint, tmp_path):
    file = str(write_rows(tmp_path / "rows.jsonl", 2))
    done = dude("data", "check", file, "--model", str(checkpoint), "--upft", "2")
    assert done.returncode == 0, done.stderr
    assert "«ye»" in done.stdout
    options = ["--as-rows", "--samples", "2", "--temperature", "1", "--max-new-tokens", "4"]
    done = dude("generate", str(checkpoint), "--file", file, *options)
    assert done.returncode == 0, done.stderr
    assert 1 <= len(done.stdout.splitlines()) <= 4
