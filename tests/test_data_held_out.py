"""A share of the training rows that is held out: seeded, by questions, a part of what makes the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny_tokenizer

from dude_peft.config.reading import dump_config, load_config
from dude_peft.errors import ConfigError, DataError
from dude_peft.training.run_data import glance, read


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))


def rows(tmp_path: Path, questions: list[str], name: str = "t.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"prompt": q, "completion": f"a{i}"}) + "\n" for i, q in enumerate(questions)))
    return str(path)


def config(tmp_path: Path, train: str, test, **data):
    values = {"train": train, "test": test, "max_length": 64, **data}
    content = {"model": {"name_or_path": "m"}, "data": values, "output_dir": "o"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    return load_config(tmp_path / "c.yaml")


def sides(made) -> tuple[list[str], list[str]]:
    """The questions on either side."""
    tokenizer = tiny_tokenizer()

    def questions(examples) -> list[str]:
        texts = (tokenizer.decode(example["input_ids"]) for example in examples)
        return [text.partition("<|user|>")[2].partition("<|end|>")[0] for text in texts]

    return questions(made.train), questions(made.held_out.examples)


QUESTIONS = [f"q{i}" for i in range(30)]


@pytest.mark.parametrize("test", [0.1, {"share": 0.1}])
def test_a_share_is_taken_from_the_training_rows(tmp_path, test):
    settings = config(tmp_path, rows(tmp_path, QUESTIONS), test)
    glance(settings)
    made = read(settings, tiny_tokenizer())
    train, held_out = sides(made)
    assert (len(train), len(held_out)) == (27, 3)
    assert sorted(train + held_out) == sorted(QUESTIONS)
    assert [row.prompt[0].content for row in made.held_out.asked] == held_out
    assert not made.warnings
    assert "test:\n    share: 0.1" in dump_config(settings)  # both ways to write it are one run


def test_the_seed_alone_chooses_and_repeated_questions_stay_on_one_side(tmp_path):
    twice = rows(tmp_path, [*QUESTIONS, *QUESTIONS])
    train, held_out = sides(read(config(tmp_path, twice, 0.2), tiny_tokenizer()))
    assert (len(train), len(held_out)) == (48, 12)
    assert not set(train) & set(held_out)
    other_order = rows(tmp_path, QUESTIONS[::-1], "r.jsonl")
    again = read(config(tmp_path, other_order, 0.2), tiny_tokenizer())
    assert set(sides(again)[1]) == set(held_out)
    moved = read(config(tmp_path, other_order, 0.2, seed=1), tiny_tokenizer())
    assert set(sides(moved)[1]) != set(held_out)
    assert {name: again.sha256[name] != moved.sha256[name] for name in ("train", "test")} == {
        "train": True,
        "test": True,
    }


def test_held_out_rows_are_whole_where_only_beginnings_are_trained(tmp_path):
    path = rows(tmp_path, QUESTIONS)
    whole = read(config(tmp_path, path, 0.1), tiny_tokenizer())
    made = read(config(tmp_path, path, 0.1, upft=1, test_rows=2), tiny_tokenizer())
    assert sides(made)[1] == sides(whole)[1][:2]
    assert made.train.counts.ended == 0
    assert made.held_out.examples.counts.ended == 2


def test_shares_of_a_mixture(tmp_path):
    entries = [
        {"source": rows(tmp_path, QUESTIONS, "a.jsonl"), "weight": 1},
        {"source": rows(tmp_path, ["x", "y"], "b.jsonl"), "weight": 1},
    ]
    train, held_out = sides(read(config(tmp_path, entries, 0.3), tiny_tokenizer()))
    assert held_out
    assert not set(train) & set(held_out)


def test_wrong_shares(tmp_path):
    path = rows(tmp_path, ["q", "q"])
    with pytest.raises(DataError, match=r"a share of 0.5 of 1 different questions leaves none to train on"):
        read(config(tmp_path, path, 0.5), tiny_tokenizer())
    for test in (0, 1.5, {"share": 1}, {"shar": 0.1}, True):
        with pytest.raises(ConfigError, match=r"c.yaml:\d+: key 'data.test"):
            config(tmp_path, path, test)


def test_columns_of_a_run(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"ask": f"q{i}", "reply": "a", "id": i}) + "\n" for i in range(4)))
    own = [{"source": rows(tmp_path, ["p0", "p1"], "own.jsonl"), "columns": {}}]
    names = {"prompt": "ask", "completion": "reply"}
    made = read(config(tmp_path, str(path), own, columns=names), tiny_tokenizer())
    assert sides(made) == (["q0", "q1", "q2", "q3"], ["p0", "p1"])
    assert made.warnings == ["data.train: left out: id (4 of 4 rows)"]
    with pytest.raises(ConfigError, match=r"data.columns: 'promt' is not one of our names; closest: prompt"):
        config(tmp_path, str(path), 0.5, columns={"promt": "ask"})
