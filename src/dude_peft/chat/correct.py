"""Rejection sampling: of several answers to each prompt those that are right, as rows to train on (RFT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dude_peft.data.answers import is_match
from dude_peft.errors import DataError

if TYPE_CHECKING:
    from dude_peft.answer.decode import Completion
    from dude_peft.data import Row


@dataclass(frozen=True)
class Correct:
    """What is kept."""

    records: list[dict[str, Any]]
    right: int
    """Completions that are right, repeats among them."""
    completions: int
    solved: int
    """Prompts with one that is."""
    prompts: int

    def told(self) -> str:
        """In a line."""
        return (
            f"{self.right} of {self.completions} completions are right, for {self.solved} of {self.prompts} prompts; "
            f"{len(self.records)} different ones are kept"
        )


def check_answered(rows: Sequence[Row]) -> None:
    """Raises DataError where a row has no answer to compare with."""
    for row in rows:
        if row.is_text or not row.answer.strip():
            raise DataError(f"{row.source}: no answer to compare with; --keep correct needs one in every row")


def correct(
    rows: Sequence[Row], completions: Sequence[Completion], records: Sequence[dict[str, Any] | None]
) -> Correct:
    """Those that ended by themselves, with the final answer of their row, and no text twice for a prompt.

    Args:
        rows: that were asked, each as often in turn as it was.
        completions: of each.
        records: of each the row to train on; None where it cannot be one.
    """
    kept: list[dict[str, Any]] = []
    right, seen, solved = 0, set(), set()
    for row, completion, record in zip(rows, completions, records, strict=True):
        if record is None or completion.finish != "end" or not is_match(completion.text, row):
            continue
        right += 1
        solved.add(row.source)
        if (text := (row.source, completion.text.strip())) not in seen:
            seen.add(text)
            kept.append(record)
    return Correct(kept, right, len(rows), len(solved), len({row.source for row in rows}))
