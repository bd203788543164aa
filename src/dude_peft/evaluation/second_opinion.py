"""GSM8K's answers read a second time, by math-verify: where it and the harness's filters disagree.

It reads fractions, LaTeX and units that the harness's patterns do not, so a disagreement is a case for a reader, not an
error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class Disagreement:
    """One answer that the two judge otherwise."""

    doc_id: int
    filter: str
    harness: bool
    """Whether the harness calls it right."""
    math_verify: bool
    extracted: str
    """What the harness's filter took from it."""
    expected: str
    end: str
    """Of the generated text."""


def available() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def disagreements(samples: Sequence[dict[str, Any]]) -> list[Disagreement]:
    """All of them, over the harness's samples of one GSM8K task, every filter for itself."""
    verdicts: dict[int, bool] = {}
    found = []
    for sample in samples:
        text, expected = str(sample["resps"][0][0]), str(sample["target"]).rpartition("####")[2].strip()
        number = int(sample["doc_id"])
        if number not in verdicts:
            verdicts[number] = is_right(text, expected)
        right = bool(sample["exact_match"])
        if right != verdicts[number]:
            extracted = str(sample["filtered_resps"][0])
            end = text[-_SHOWN_CHARACTERS:]
            found.append(Disagreement(number, sample["filter"], right, verdicts[number], extracted, expected, end))
    return found


def is_right(text: str, expected: str) -> bool:
    """Whether math-verify finds the expected number: behind the last `####` if there is one, else in the whole text."""
    from math_verify import parse, verify

    answer = text.rpartition("####")[2] if "####" in text else text
    return bool(verify(parse(expected), parse(answer)))
