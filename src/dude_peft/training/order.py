"""The order of the training rows: a pure function of seed and epoch, so that a resumed run sees the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_GROUPED_BATCHES = 50


class EpochOrder(Sampler[int]):
    """Every row once an epoch, shuffled; with `grouped`, rows of like length stand together.

    transformers' own grouping draws from the global generator, so that a resumed epoch is another one.
    """

    def __init__(self, lengths: Sequence[int], seed: int, *, grouped: int = 0) -> None:
        """Orders len(lengths) rows.

        Args:
            lengths: tokens of each row.
            seed: of the shuffling.
            grouped: rows of an optimizer step; shuffled stretches of 50 of these are sorted by length. 0: no grouping.
        """
        self._lengths = lengths
        self._seed = seed
        self._grouped = grouped
        self._epoch = 0

    def begin(self, epoch: int) -> None:
        """Sets the epoch, from 0, of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order: list[int] = torch.randperm(len(self._lengths), generator=generator).tolist()
        if self._grouped == 0:
            yield from order
            return
        step = self._grouped
        stretch = step * _GROUPED_BATCHES
        groups = []
        for start in range(0, len(order), stretch):
            ordered = sorted(order[start : start + stretch], key=lambda row: self._lengths[row], reverse=True)
            groups += [ordered[first : first + step] for first in range(0, len(ordered), step)]
        # An incomplete group in the middle would shift the borders of all steps after it, so it stays the last.
        whole = [group for group in groups if len(group) == step]
        rest = [row for group in groups if len(group) < step for row in group]
        for place in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[place]
        yield from rest
