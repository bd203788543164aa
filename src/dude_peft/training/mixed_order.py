"""The order of rows of two kinds: each shuffled by itself, then interleaved evenly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dude_peft.training.order import EpochOrder

_OTHER_STREAM = 2**31  # further than any epoch, and within the 32 bits that torch's generator looks at


class MixedOrder(EpochOrder):
    """Every row once an epoch; any stretch of n rows has the second kind's share of n, rounded up or down.

    So every micro-batch, optimizer step and process has its part of both. A pure function of seed and epoch.
    """

    def __init__(self, lengths: Sequence[int], first: int, seed: int, *, grouped: int = 0) -> None:
        """Orders len(lengths) rows, of which the `first` ones are of one kind; the rest as `EpochOrder` says."""
        super().__init__(lengths, seed, grouped=grouped)
        self._first = first
        # With one seed, kinds of one size would be shuffled alike, and meet the same partners in every epoch.
        self._kinds = (
            EpochOrder(lengths[:first], seed, grouped=grouped),
            EpochOrder(lengths[first:], seed + _OTHER_STREAM, grouped=grouped),
        )

    def begin(self, epoch: int) -> None:
        """Sets the epoch, from 0, of the next iteration."""
        for kind in self._kinds:
            kind.begin(epoch)

    def __iter__(self) -> Iterator[int]:
        first, second = (iter(kind) for kind in self._kinds)
        count = len(self)
        share = count - self._first
        for place in range(count):
            if (place + 1) * share // count > place * share // count:
                yield self._first + next(second)
            else:
                yield next(first)
