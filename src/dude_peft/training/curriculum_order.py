"""The order of a curriculum's rows: stage after stage, within each of them shuffled passes of whole steps."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence

from typing_extensions import override

from dude_peft.errors import ConfigError
from dude_peft.training.group_order import GroupOrder
from dude_peft.training.order import EpochOrder


class CurriculumOrder(EpochOrder):
    """All passes over the first stage, then all over the second one; a pure function of seed, stages and length.

    A pass over a stage has every row of it once, in whole steps: where the rows do not fill the last one, the first
    rows of the pass come again. Each stage takes its share of all steps, by the steps of a pass over it. An epoch is a
    stretch of this order that is as long as one pass over all stages.
    """

    bounds: tuple[int, ...]
    """The last step of each stage, from 1."""

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        seed: int,
        *,
        answers: int,
        step: int,
        iterations: int,
        steps_of: Callable[[int], int],
        batch: int = 0,
        processes: int = 1,
    ) -> None:
        """Orders the rows of `stages`.

        Args:
            stages: numbers of the rows of each.
            seed: of the shuffling.
            answers: to each row; 1 where rows are no prompts.
            step: places of an optimizer step, a multiple of `answers`.
            iterations: steps with the same answers.
            steps_of: places of an epoch -> optimizer steps of the run.
            batch: of prompts, as GroupOrder has it.
            processes: the same.

        Raises:
            ConfigError: too few steps for a stage.
        """
        super().__init__([0] * sum(map(len, stages)), seed)
        self._stages = stages
        how = {"answers": answers, "step": step, "iterations": iterations, "batch": batch, "processes": processes}
        self._passes = [GroupOrder([0] * len(rows), seed, **how) for rows in stages]
        self._unit = step * iterations  # the same answers are never cut apart
        sums = list(itertools.accumulate(len(each) // self._unit for each in self._passes))
        self._length = sums[-1] * self._unit
        steps = steps_of(self._length)
        units = -(-steps // iterations)
        self._ends = [-(-units * through // sums[-1]) for through in sums]
        self.bounds = tuple(min(end * iterations, steps) for end in self._ends)
        for number, (before, end) in enumerate(zip([0, *self._ends], self._ends, strict=False), 1):
            if before == end:
                raise ConfigError(
                    f"train.curriculum: {steps} optimizer steps leave none for stage {number} of {len(stages)}; raise "
                    "train.max_steps, or train.num_train_epochs, or lower the number of stages"
                )

    def stage_of(self, step: int) -> int:
        """The stage, from 1, that an optimizer step, from 1, is in."""
        return min(bisect.bisect_left(self.bounds, step), len(self.bounds) - 1) + 1

    @override
    def __len__(self) -> int:
        return self._length

    @override
    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self._length
        return itertools.islice(self._whole(), first, first + self._length)

    def _whole(self) -> Iterator[int]:
        """The whole run, and more of its last stage."""
        begins = [0, *self._ends]
        for number, rows in enumerate(self._stages):
            last = number == len(self._stages) - 1
            places = None if last else (self._ends[number] - begins[number]) * self._unit
            yield from itertools.islice(self._of_stage(number, rows), places)

    def _of_stage(self, number: int, rows: Sequence[int]) -> Iterator[int]:
        order = self._passes[number]
        for again in itertools.count():
            order.begin(again)
            yield from (rows[place] for place in order)
