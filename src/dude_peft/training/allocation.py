"""How a budget of parameters becomes ranks: arithmetic on what a rank costs in a layer and what it is worth there."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dude_peft.errors import ConfigError


@dataclass(frozen=True)
class Lot:
    """One layer as the budget sees it."""

    name: str
    price: Callable[[int], int]
    """Rank -> trained parameters; 0 for rank 0, and rising."""
    most: int
    """The largest rank that it may get."""


def uniform_rank(lots: Sequence[Lot], budget: int) -> int:
    """The largest rank r that all layers can have together, each at most its `most`; 0 where 1 is too dear."""
    low, high = 0, max(lot.most for lot in lots)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(lots, [middle] * len(lots)) <= budget else (low, middle - 1)
    return low


def spent(lots: Sequence[Lot], ranks: Sequence[int]) -> int:
    """Parameters of these ranks, each cut to what its layer may have."""
    return sum(lot.price(min(r, lot.most)) for lot, r in zip(lots, ranks, strict=True))


def greedy_ranks(lots: Sequence[Lot], worths: Sequence[Sequence[float]], budget: int, min_r: int = 0) -> list[int]:
    """Ranks by what the next one adds for each parameter that it costs: the best buy first, while it can be paid.

    A layer whose next rank cannot be paid is done; cheaper ones go on. So what is left in the end pays for no further
    rank of any layer below its `most`.

    Args:
        lots: the layers.
        worths: of each layer at the ranks 0 .. most.
        budget: parameters.
        min_r: what every layer gets first, as far as its `most` allows.

    Raises:
        ConfigError: the budget does not pay for min_r.
    """
    ranks = [min(min_r, lot.most) for lot in lots]
    left = budget - spent(lots, ranks)
    if left < 0:
        raise ConfigError(
            f"adapter.budget: min_r {min_r} takes {budget - left:,} parameters in {len(lots)} layers, but the budget "
            f"has {budget:,}; raise adapter.budget.parameters, or lower min_r"
        )

    def offer(index: int) -> tuple[float, int, int]:
        lot, r = lots[index], ranks[index]
        cost = lot.price(r + 1) - lot.price(r)
        return -(worths[index][r + 1] - worths[index][r]) / cost, index, cost

    offers = [offer(index) for index, lot in enumerate(lots) if ranks[index] < lot.most]
    heapq.heapify(offers)
    while offers:
        _, index, cost = heapq.heappop(offers)
        if cost > left:
            continue
        left -= cost
        ranks[index] += 1
        if ranks[index] < lots[index].most:
            heapq.heappush(offers, offer(index))
    return ranks
