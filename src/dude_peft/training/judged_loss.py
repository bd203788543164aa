"""What the trainer knows of every loss that judges answers, paired or labelled, and their sums between two lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dude_peft.machine.processes import gathered
from dude_peft.measure.token_logps import row_logps


class JudgedLoss(ABC):
    """A loss as Trainer's `compute_loss_func` that looks at a micro-batch first, and tells means of what it judged."""

    width: int
    """Numbers of `sums`."""
    tokens: Any = None
    """Tokens of the step whose cross-entropy counts, of all processes; None for the micro-batch's own."""
    _sums: Tensor | None = None

    @abstractmethod
    def look(self, model: Any, inputs: dict[str, Any]) -> None:
        """Notes what the next loss needs of a micro-batch; takes out what is no argument of `model`."""

    @abstractmethod
    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The micro-batch's part of the step's loss; `num_items_in_batch` is the first number of `count`."""

    @abstractmethod
    def count(self, batches: Sequence[Mapping[str, Any]]) -> list[int]:
        """What is judged in some micro-batches, and their tokens whose cross-entropy counts."""

    @abstractmethod
    def averages(self, totals: list[float]) -> dict[str, float]:
        """What a line says, in TRL's names, from the sums of all processes."""

    def means(self) -> dict[str, float]:
        """`averages` of all since the last call, of all processes; every process has to call it."""
        totals = [sum(part) for part in zip(*gathered(self.sums()), strict=True)]
        self._sums = None
        return self.averages(totals)

    def sums(self) -> list[float]:
        """What a checkpoint keeps of this process."""
        return [0.0] * self.width if self._sums is None else [float(each) for each in self._sums.tolist()]

    def take_up(self, sums: list[float], device: Any) -> None:
        """Goes on from `sums`."""
        self._sums = torch.tensor(sums, dtype=torch.float32, device=device)

    def add(self, sums: Tensor) -> None:
        """Adds a micro-batch's, (width,)."""
        self._sums = sums if self._sums is None else self._sums + sums


def logps_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Log-probabilities of a micro-batch's judged tokens, summed by row, (rows,)."""
    rows = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    found, _ = row_logps(model(**rows, use_cache=False).logits, inputs["labels"])
    return found
