"""`--limit N`: which items, the same ones for a seed, each stratum by its share."""

from __future__ import annotations

import random
from collections.abc import Mapping


def stratified(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Indices of the items that are taken of each stratum, sorted; strata that get none are left out.

    Each stratum gets its proportional share, rounded up or down by a systematic draw (Madow 1949), so that over seeds
    every item of every stratum is as likely: rounding to the nearest would leave small subjects out of every sample.

    Args:
        sizes: items of each stratum.
        limit: of all items together; None, or more than there are, takes all.
        seed: of the draw.
    """
    total = sum(sizes.values())
    if limit is None or limit >= total:
        return {name: list(range(size)) for name, size in sizes.items()}
    order, draw = sorted(sizes), random.Random(f"{seed}:shares")
    draw.shuffle(order)
    # One point in every total / limit items, all of them moved by the same part of that: in whole numbers.
    offset = draw.randrange(total)
    shares, passed = dict.fromkeys(order, 0), 0
    for name in order:
        before, passed = passed, passed + limit * sizes[name]
        shares[name] = (passed + offset) // total - (before + offset) // total
    return {
        name: sorted(random.Random(f"{seed}:{name}").sample(range(size), shares[name]))
        for name, size in sizes.items()
        if shares[name]
    }
