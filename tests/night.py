"""By day a few cases of a cross stand for all; `scripts/nightly.sh` runs them all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

NIGHT = "DUDE_KILLS" in os.environ
"""Whether sweeps inside a test are whole."""


def more_by_night(test: Any) -> Any:
    """A test that runs by day with a few kills or signals, and by night among the slow ones with many."""
    return pytest.mark.slow(test) if NIGHT else test


def some_by_day(cases: Iterable[Any], day: Sequence[Any]) -> list[Any]:
    """The cases for `parametrize`; those that are not among `day` are slow.

    Raises:
        ValueError: one of `day` is no case.
    """
    cases = list(cases)
    if missing := [case for case in day if case not in cases]:
        raise ValueError(f"no such cases: {missing}")
    return [case if case in day else by_night(case)[0] for case in cases]


def by_night(*cases: Any) -> list[Any]:
    """Cases for `parametrize` that are slow, each one."""
    return [pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
