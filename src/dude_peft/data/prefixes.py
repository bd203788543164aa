"""Rows of tokens that begin alike: which of their common beginnings are worth being computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SHORTEST = 16
"""Tokens; what a shorter beginning saves, one more forward and a smaller batch cost."""


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
