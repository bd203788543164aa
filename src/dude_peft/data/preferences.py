"""Preferences that the package makes itself: word problems, each with its right answer and one with a wrong number.

The wrong answer takes the right steps, but its last result is too large or too small. So the two are alike in length
and form, and only the arithmetic tells them apart.

    Question  Mia fills 3 boxes with 8 shells each and has 4 shells left over. How many shells does Mia have altogether?
    Chosen    3 * 8 = 24 / 24 + 4 = 28 / #### 28
    Rejected  3 * 8 = 24 / 24 + 4 = 29 / #### 29

Unpaired, every question has one of the two, with a label: true for the right answer, false for the wrong one.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from dude_peft.data.formats import Message, Row
from dude_peft.data.pairs import judged_apart
from dude_peft.data.word_problems import word_problems

NAME = "preferences"
UNPAIRED = "unpaired-preferences"
_ERRORS = (1, -1, 2, -2, 10, -10)


def preferences(n: int, *, seed: int = 0, split: str = "train") -> list[Row]:
    """The first `n` pairs of a split for a seed, of the questions of `word_problems`.

    Raises ConfigError where the split does not exist or does not have `n` problems.
    """
    rows = []
    for number, row in enumerate(word_problems(n, seed=seed, split=split)):
        source = f"builtin:{NAME}[{split}]:{number}"
        worse = (*row.prompt, Message("assistant", _wrong(row.answer, f"{split}:{seed}:{number}")))
        chosen, rejected = judged_apart(row.messages, worse, source, ("chosen", "rejected"))
        rows.append(replace(row, messages=chosen, source=source, rejected=rejected))
    return rows


def unpaired(n: int, *, seed: int = 0, split: str = "train") -> list[Row]:
    """The same questions, the right answer and the wrong one in turn, each with its label.

    Raises ConfigError where the split does not exist or does not have `n` problems.
    """
    rows = []
    for number, row in enumerate(preferences(n, seed=seed, split=split)):
        wanted = number % 2 == 0
        answer = replace((row.messages if wanted else row.rejected)[-1], trained=True)
        source = f"builtin:{UNPAIRED}[{split}]:{number}"
        rows.append(replace(row, messages=(*row.prompt, answer), rejected=(), source=source, label=wanted))
    return rows


def _wrong(answer: str, key: str) -> str:
    """The answer with another last result, never below 0."""
    working, _, right = answer.rpartition("\n#### ")
    start = hashlib.sha256(key.encode("ascii")).digest()[0]
    errors = [_ERRORS[(start + step) % len(_ERRORS)] for step in range(len(_ERRORS))]
    wrong = next(int(right) + error for error in errors if int(right) + error >= 0)
    return f"{working.removesuffix(right)}{wrong}\n#### {wrong}"
