"""Random order from plain arithmetic modulo 2^64: the same on every machine, where a generator's stream may change."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def shuffled(count: int, seed: int, stream: int = 0) -> NDArray[np.int64]:
    """0 .. count-1 in an order that follows from the seed (below 2^32) and the stream (below 2^16)."""
    import numpy as np

    start = _scrambled(np.array([seed * 2**16 + stream], np.uint64))
    return np.argsort(_scrambled(np.arange(count, dtype=np.uint64) + start), kind="stable")


def _scrambled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014): a bijection of 64-bit numbers that looks random."""
    import numpy as np

    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
