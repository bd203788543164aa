"""Several sources as one: how many rows each gives, and which.

The shares are the weights; without weights every source gives all it has. A source that gives fewer rows than it has
gives a seeded choice of them; one that gives more repeats all of them, and a choice for the rest. The same seed gives
the same rows on every machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dude_peft.data.seeded import shuffled
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted

_MOST_ROWS, _MOST_ROUNDS = 10_000_000, 4
"""A mixture holds so many rows, or so many times those that there are: some 100 bytes of memory each."""

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Entry(Protocol):
    """One source of a mixture, as the configuration has it."""

    @property
    def source(self) -> str:
        """A name that `rows.stream_rows` reads."""

    @property
    def split(self) -> str | None:
        """Split, where the source has some; None for the usual one."""

    @property
    def rows(self) -> int | None:
        """At most this many rows, from the first."""

    @property
    def weight(self) -> float | None:
        """Share of the mixture, relative to the others'; set for all or for none."""

    @property
    def columns(self) -> Mapping[str, str] | None:
        """The source's own names (`columns.Columns`); None for those of the whole set."""


@dataclass(frozen=True)
class Part:
    """An entry with its split filled in."""

    source: str
    split: str
    rows: int | None = None
    weight: float | None = None
    columns: Mapping[str, str] | None = None


def entries_of(entries: Iterable[Entry], split: str) -> list[Part]:
    """The entries with `split` where they name none.

    Raises ConfigError where there are none, or only some have a weight.
    """
    parts = [Part(each.source, each.split or split, each.rows, each.weight, each.columns) for each in entries]
    if not parts:
        raise ConfigError("the mixture has no sources; give at least one")
    if len({part.weight is None for part in parts}) > 1:
        raise ConfigError("only some sources of the mixture have a weight; give a weight to all or to none")
    return parts


def mix(
    sizes: Sequence[int],
    weights: Sequence[float | None],
    total: int | None,
    seed: int,
    names: Sequence[str] | None = None,
) -> list[NDArray[np.int64]]:
    """Of each source the indices of the rows it gives, ascending, repeats of all of them first.

    Args:
        sizes: rows that each source has.
        weights: share of each; None for all takes their sizes.
        total: rows of the mixture; None takes as many as the sources have together (`sum(sizes)`).
        seed: of the choice.
        names: of the sources, for messages; one that gives no row is warned of by its name.

    Raises:
        DataError: a source with a share has no rows.
        ConfigError: `total` is so many repeats of the rows that they would fill the memory.
    """
    import numpy as np

    shares = [float(size) if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    wanted, most = sum(sizes) if total is None else total, max(_MOST_ROWS, _MOST_ROUNDS * sum(sizes))
    if wanted > most:
        raise ConfigError(
            f"a mixture of {wanted:,} rows is more than {most:,}, the most that {sum(sizes):,} can be repeated to; "
            "ask for fewer, and raise train.num_train_epochs"
        )
    counts = _apportioned(shares, wanted)
    chosen = []
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        name = f"source {number + 1}" if names is None else f"source {quoted(names[number], 300)}"
        if count and not size:
            raise DataError(f"{name} of the mixture has no rows left; raise max_length, or remove the source")
        if not count and names is not None:
            warnings.warn(
                f"{name} of the mixture gives no row: its weight is too small for {wanted:,} rows; raise it, or "
                "remove the source",
                stacklevel=2,
            )
        rounds, rest = divmod(count, size) if size else (0, 0)
        chosen.append(np.concatenate([np.tile(np.arange(size), rounds), np.sort(shuffled(size, seed, number)[:rest])]))
    return chosen


def _apportioned(shares: Sequence[float], total: int) -> list[int]:
    """`total` in whole numbers by the shares, the largest remainders rounded up (Hamilton's method)."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
