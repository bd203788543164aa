"""Rows of tokens that begin alike: which of their common beginnings are worth being computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SHORTEST = 16
"""Tokens; what a shorter beginning saves, one more forward and a smaller batch cost."""
WORTHWHILE = 1024
"""Tokens that `heads` have to save in all. Whether a model shares them is tried in a dozen short forwards, and each
reads all weights, which takes as long as a hundred tokens of a large batch."""


@dataclass(frozen=True)
class Alike:
    """Rows that share their first `prefix` tokens, and each of them has more."""

    prefix: int
    rows: list[int]


def alike(rows: Sequence[Sequence[int]], shortest: int = SHORTEST) -> list[Alike]:
    """Every row in one group, such that many tokens are saved: sum over groups of (rows - 1) times prefix.

    Decided in the tree of common beginnings, from its leaves on: what branches off at a place stays as it is grouped,
    or joins the group of that place, whichever saves more. Rows that share nothing are one group with prefix 0.

    Args:
        rows: token ids, none of them empty.
        shortest: beginnings of fewer tokens are not shared.
    """
    order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))
    open_runs = [_Run(0)]
    for place, index in enumerate(order):
        following = _common(rows[index], rows[order[place + 1]]) if place + 1 < len(order) else 0
        part = _Part([index], [])
        while open_runs[-1].common > following:
            run = open_runs.pop()
            run.parts.append(part)
            # The shortest row of a run is its first, where it is all that the others begin with.
            prefix = min(run.common, len(rows[run.parts[0].all_rows()[0]]) - 1)
            part = _best(run.parts, prefix if prefix >= shortest else 0)
        if open_runs[-1].common < following:
            open_runs.append(_Run(following))
        open_runs[-1].parts.append(part)
    shared = [group for part in open_runs[0].parts for group in part.groups]
    lonely = sorted(index for part in open_runs[0].parts for index in part.free)
    return [*shared, Alike(0, lonely)] if lonely else shared


def heads(batches: Sequence[Sequence[Sequence[int]]]) -> list[tuple[int, ...]]:
    """What all rows of each batch begin with, where that is worth being computed once; empty elsewhere.

    Batches stay as they are: one batch more costs as many forwards as an answer has tokens, which no beginning saves.
    Batches that follow each other have one head where that saves more tokens: its length times (their rows - 1).

    Args:
        batches: rows of token ids, none of them empty.
    """
    runs: list[_Headed] = []
    for rows in batches:
        run = _Headed(_head(rows), len(rows), 1)
        while runs and (joined := runs[-1].joined(run)).saved >= max(1, runs[-1].saved + run.saved):
            runs.pop()
            run = joined
        runs.append(run)
    pays = sum(run.saved for run in runs) >= WORTHWHILE
    return [run.head if pays and run.saved else () for run in runs for _ in range(run.batches)]


@dataclass(frozen=True)
class _Headed:
    """Consecutive batches, and what all their rows begin with."""

    head: tuple[int, ...]
    rows: int
    batches: int

    @property
    def saved(self) -> int:
        """Tokens that need not be computed."""
        return (self.rows - 1) * len(self.head) if len(self.head) >= SHORTEST else 0

    def joined(self, other: _Headed) -> _Headed:
        head = self.head[: _common(self.head, other.head)]
        return _Headed(head, self.rows + other.rows, self.batches + other.batches)


def _head(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest that leaves every row a token."""
    first, *others = rows
    shared = min((_common(first, other) for other in others), default=len(first))
    return tuple(first[: min(shared, *(len(row) - 1 for row in rows))])


@dataclass
class _Part:
    """Sorted rows, those that are in a group and those that may still join one."""

    free: list[int]
    groups: list[Alike]

    def all_rows(self) -> list[int]:
        return [*self.free, *(index for group in self.groups for index in group.rows)]


@dataclass
class _Run:
    """Consecutive sorted rows whose first `common` tokens are the same."""

    common: int
    parts: list[_Part] = field(default_factory=list)


def _best(parts: Sequence[_Part], prefix: int) -> _Part:
    """One group of all rows that save more there than where they are; the others stay."""
    free: list[int] = []
    groups: list[Alike] = []
    for part in parts:
        saved = sum((len(group.rows) - 1) * group.prefix for group in part.groups)
        rows = part.all_rows()
        if saved <= len(rows) * prefix:
            free += rows
        else:
            free += part.free
            groups += part.groups
    if prefix > 0 and len(free) > 1:
        return _Part([], [*groups, Alike(prefix, free)])
    return _Part(free, groups)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
