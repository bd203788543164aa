"""`--limit N`: which items, the same ones for a seed, each stratum by its share."""

from __future__ import annotations

import random
from collections.abc import Mapping


def stratified(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Indices of the items that are taken of each stratum, sorted; strata that get none are left out.

    Shares are proportional to sizes (largest remainders, ties by a seeded draw); in a stratum each item is as likely.

    Args:
        sizes: items of each stratum.
        limit: of all items together; None, or more than there are, takes all.
        seed: of the draw.
    """
    total = sum(sizes.values())
    if limit is None or limit >= total:
        return {name: list(range(size)) for name, size in sizes.items()}
    order = sorted(sizes)
    random.Random(f"{seed}:shares").shuffle(order)  # of equal remainders the seed, not the alphabet, decides
    shares = {name: limit * size // total for name, size in sizes.items()}
    by_remainder = sorted(order, key=lambda name: limit * sizes[name] % total, reverse=True)
    for name in by_remainder[: limit - sum(shares.values())]:
        shares[name] += 1
    return {
        name: sorted(random.Random(f"{seed}:{name}").sample(range(size), shares[name]))
        for name, size in sizes.items()
        if shares[name]
    }
