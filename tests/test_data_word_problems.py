"""Word problems: right answers, no repetition, no sentence in both splits, the same on each platform."""

import hashlib
import json
import re
from collections import Counter
from fractions import Fraction

import pytest

from dude_peft.data import data_sha256, duplicates, expected_answer, overlap, word_problems
from dude_peft.data import word_problems as exported
from dude_peft.data.word_problems import _STORIES, SIZES
from dude_peft.errors import ConfigError

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
APPLY = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: Fraction(a, b),
}


@pytest.fixture(scope="module", params=["train", "test"])
def full(request):
    """(split, all its rows)"""
    return request.param, word_problems(SIZES[request.param], seed=0, split=request.param)


def test_each_step_is_right_and_uses_what_is_known(full):
    for row in full[1]:
        *steps, last = row.answer.split("\n")
        known = [int(number) for number in re.findall(r"\d+", row.prompt[0].content)]
        result = None
        for step in steps:
            match = STEP.fullmatch(step)
            assert match, row
            left, operator, right, result = match.groups()
            assert APPLY[operator](int(left), int(right)) == int(result) > 0, row
            assert {int(left), int(right)} <= {*known}, row
            known.append(int(result))
        assert last == f"#### {result}", row
        assert expected_answer(row) == result
        numbers = re.findall(r"\d+", row.prompt[0].content)
        used = Counter(re.findall(r"\d+", " ".join(step.split("=")[0] for step in steps)))
        assert not Counter(numbers) - used, f"a number of the question is not used: {row}"


def test_sizes_and_no_repetition(full):
    split, rows = full
    assert len(rows) == SIZES[split] == {"train": 4000, "test": 500}[split]
    assert duplicates(rows) == 0
    assert len({row.prompt for row in rows}) == len(rows)


def test_problems_are_short_and_easy(full):
    _, rows = full
    assert max(len(row.prompt[0].content.split()) for row in rows) <= 32
    assert max(len(row.answer) for row in rows) <= 55
    answers = [int(expected_answer(row)) for row in rows]
    assert sum(answer < 200 for answer in answers) >= 0.95 * len(answers)
    assert len(set(answers)) > 60
    steps = Counter(row.answer.count("\n") for row in rows)
    assert set(steps) == {1, 2, 3}
    assert 0.25 < steps[1] / len(rows) < 0.5
    assert 0.05 < steps[3] / len(rows) < 0.25


def test_texts_are_whole(full):
    for row in full[1]:
        text = row.prompt[0].content
        assert not re.search(r"[{}]|  ", text), text
        assert re.fullmatch(r"[A-Z].*[.,] How many .*\?", text), text
        assert not re.search(r"\b[01] ", text) or "red" in text, text  # plurals need two or more


def test_the_splits_share_no_question_and_no_sentence():
    def sentences(split):
        texts = (re.sub(r"\{\w+\}", "{}", story.text) for story in _STORIES[split])
        return {sentence for text in texts for sentence in re.split(r"(?<=[.?]) ", text)}

    assert not sentences("train") & sentences("test")
    assert len(_STORIES["train"]) >= 24
    assert len(_STORIES["test"]) >= 8
    assert {story.plan for story in _STORIES["test"]} == {story.plan for story in _STORIES["train"]}
    assert overlap(word_problems(4000, seed=1, split="train"), word_problems(500, seed=2, split="test")) == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_seed_decides_all_and_a_larger_set_begins_with_a_smaller(split):
    few = word_problems(40, seed=3, split=split)
    assert word_problems(90, seed=3, split=split)[:40] == few
    assert data_sha256(few) == data_sha256(word_problems(40, seed=3, split=split))
    hashes = {data_sha256(word_problems(40, seed=seed, split=split)) for seed in (-3, 0, 3, 4, 2**70)}
    assert len(hashes) == 5


def test_the_first_problems_are_pinned():
    """The same bytes on each platform and Python version: a change here changes every result ever reported."""
    texts = [
        [row.prompt[0].content, row.answer] for split in ("train", "test") for row in word_problems(100, split=split)
    ]
    assert (
        hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        == "ef8260170208b24a20dbc038e2f5470bb5a7655b3bf306c103c10e42ed46a549"
    )


def test_a_short_run_sees_every_story():
    rows = word_problems(len(_STORIES["train"]), seed=7)
    shapes = {re.sub(r"\d+|[A-Z]\w+", "", row.prompt[0].content.split("How many")[0]) for row in rows}
    assert len(shapes) >= len(_STORIES["train"]) - 3  # names and items hide few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 4001}, "has 1 to 4000 train problems without repetition, not 4001"),
        ({"n": 501, "split": "test"}, "has 1 to 500 test problems"),
        ({"n": 0}, "not 0"),
        ({"n": True}, "the number of word problems is 'True'; give a whole number"),
        ({"n": 5, "seed": 1.5}, "the seed is '1.5'; give a whole number"),
        ({"n": 5, "split": "validation"}, "no split 'validation'; use train or test"),
    ],
)
def test_what_cannot_be_made_is_a_config_error(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        exported(**arguments)
