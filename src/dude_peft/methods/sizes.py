"""How many numbers tensors of given shapes hold: as a formula in r, in and out, and for one layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TypeAlias

Shapes: TypeAlias = Mapping[str, tuple[str, ...]]
"""Name of a tensor -> its sides: "r", "in", "out", "min" (of in and out), and "rest" (min - r)."""


def sides(shape: tuple[str, ...], out: int, in_: int, r: int) -> tuple[int, ...]:
    """The same sides in a layer (out, in) of rank r."""
    smaller = min(out, in_)
    lengths = {"out": out, "in": in_, "r": r, "min": smaller, "rest": smaller - r}
    return tuple(lengths[side] for side in shape)


def count(shapes: Shapes, out: int, in_: int, r: int) -> int:
    """Numbers that these tensors hold in a layer (out, in) of rank r."""
    return sum(math.prod(sides(shape, out, in_, r)) for shape in shapes.values())


def formula(shapes: Shapes) -> str:
    """The same in letters, as "r in + 2 r out + out"; "0" for none."""
    terms = Counter(" ".join(shape) for shape in shapes.values())
    return " + ".join(f"{times} {term}" if times > 1 else term for term, times in terms.items()) or "0"
