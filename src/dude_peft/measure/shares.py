"""Batches of held-out rows, shared out among the processes of a run.

A model that is split over them computes nothing unless all of them call it. So all take equally many turns, where some
repeat a batch that another one has, and compute a shared beginning in the same turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dude_peft.data.batches import Company, Example, grouped, pad_right
from dude_peft.machine.processes import count, gathered, rank

T = TypeVar("T")
Head = tuple[int, ...]


class Turn(NamedTuple):
    """What one process does while the others do the same with other rows."""

    rows: list[int]
    """One batch."""
    head: Head
    """What its rows begin with, where that is computed once."""
    fresh: Head
    """A beginning to compute now: its own, or any, since another process needs one. Empty where none does."""
    counts: bool
    """Whether the batch is this process's to score; others are dropped."""
    done: int
    """Rows that all processes together have finished behind it."""


def turns(batches: Sequence[list[int]], heads: Sequence[Head] | None = None, *, spread: bool) -> list[Turn]:
    """The turns of this process.

    Args:
        batches: indices of rows.
        heads: of each batch; the default is none.
        spread: whether the processes share the batches; else each one has all.
    """
    own, processes = (rank(), count()) if spread else (0, 1)
    every = heads or [()] * len(batches)
    known: list[Head] = [()] * processes
    found = []
    for first in range(0, len(batches), processes):
        places = range(first, first + processes)
        taken = [min(place, len(batches) - 1) for place in places]
        wanted = [every[place] for place in taken]
        needed = next((head for head, has in zip(wanted, known, strict=True) if head and head != has), ())
        fresh = [head or needed for head in wanted] if needed else [()] * processes
        known = [new or has for new, has in zip(fresh, known, strict=True)]
        done = sum(map(len, batches[first : first + processes]))
        found.append(Turn(batches[taken[own]], wanted[own], fresh[own], places[own] < len(batches), done))
    return found


def together(found: Tensor, *, spread: bool) -> Tensor:
    """What all processes have found, where each has left zeros for what it did not score."""
    return torch.stack(gathered(found)).sum(0) if spread and count() > 1 else found


def measured(
    rows: Sequence[Example],
    compute: Callable[[dict[str, Tensor]], Tensor],
    columns: int,
    *,
    pad_id: int,
    batch_size: int,
    company: Company,
    spread: bool,
    device: torch.device,
) -> Tensor:
    """Numbers of every row by itself, (columns, rows) float64, in the order given.

    Args:
        rows: as they are encoded.
        compute: the numbers of a batch on the device, (columns, rows of it).
        columns: how many numbers a row has.
        pad_id: padding token.
        batch_size: rows at a time.
        company: which of them may share a batch.
        spread: each process of the run computes a part of them; all have to call this, and all get all numbers.
        device: of the model.
    """
    found = torch.zeros(columns, len(rows), dtype=torch.float64)
    for turn in turns(grouped([len(row["input_ids"]) for row in rows], batch_size, company), spread=spread):
        batch = pad_right([rows[index] for index in turn.rows], pad_id)
        numbers = compute({name: tensor.to(device) for name, tensor in batch.items()})
        if turn.counts:
            found[:, turn.rows] = numbers.double().cpu()
    return together(found, spread=spread)


def all_of(found: dict[int, T], *, spread: bool) -> dict[int, T]:
    """What all processes have found, by the rows' indices."""
    return {row: value for part in (gathered(found) if spread else [found]) for row, value in part.items()}
