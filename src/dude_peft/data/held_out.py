"""A share of the training rows that is held out: by questions, so that none stands on both sides.

Which questions are held out follows from the questions and the seed alone, not from the order of the rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dude_peft.data.seeded import shuffled
from dude_peft.data.token_set import TokenSet
from dude_peft.errors import DataError

_STREAM = 2**15  # of the seed; mixtures use the first ones


def held_out_questions(
    examples: TokenSet, share: float, seed: int, *, behind: float | None = None
) -> NDArray[np.uint64]:
    """Hashes (`TokenSet.prompts`) of the questions that are held out: `share` of all different ones, at least one.

    With `behind`, they are the next ones behind those of that share: the two have none in common.

    Raises DataError where nothing would be left to train on.
    """
    questions = np.unique(examples.prompts())
    start = 0 if behind is None else max(1, round(behind * len(questions)))
    count = max(1, round(share * len(questions)))
    if start + count >= len(questions):
        raise DataError(
            f"data.test: a share of {share}{'' if behind is None else f' beside one of {behind}'} of {len(questions)} "
            "different questions leaves none to train on; add rows, or give a file"
        )
    return np.sort(questions[shuffled(len(questions), seed, _STREAM)[start : start + count]])


def part_of(examples: TokenSet, questions: NDArray[np.uint64], *, held_out: bool) -> TokenSet:
    """The examples that ask one of `questions`, or those that do not."""
    return _taken(examples, np.flatnonzero(np.isin(examples.prompts(), questions) == held_out))


def first(examples: TokenSet, count: int) -> TokenSet:
    """The first `count` examples."""
    return _taken(examples, np.arange(min(count, len(examples))))


def _taken(examples: TokenSet, places: NDArray[np.int64]) -> TokenSet:
    parts = examples.parts(places)
    return TokenSet([source for source, _ in parts], [chosen for _, chosen in parts])
