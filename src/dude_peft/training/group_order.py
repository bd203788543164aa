"""The order of prompts that are answered several times: whole groups in every step, the same ones in its iterations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from typing_extensions import override

from dude_peft.training.order import EpochOrder


class GroupOrder(EpochOrder):
    """Every prompt once an epoch, shuffled, and as often in a row as it is answered; a pure function of seed and epoch.

    Steps hold whole groups. Where the prompts do not fill the last step of an epoch, the first ones come again.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        *,
        answers: int,
        step: int,
        iterations: int,
        batch: int = 0,
        processes: int = 1,
    ) -> None:
        """Orders len(lengths) prompts.

        Args:
            lengths: tokens of each row.
            seed: of the shuffling.
            answers: to each prompt.
            step: answers of an optimizer step, a multiple of `answers`.
            iterations: steps with the same answers.
            batch: answers of a micro-batch, of which several processes get one in turn.
            processes: that share a step; each gets whole groups, the first of them the first ones.
        """
        super().__init__(lengths, seed)
        self._batch, self._processes = batch or step // processes, processes
        self._answers, self._prompts, self._iterations = answers, step // answers, iterations
        self._steps = -(-len(lengths) // self._prompts)

    @override
    def __len__(self) -> int:
        return self._steps * self._prompts * self._answers * self._iterations

    @override
    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        for step in range(self._steps):
            first = step * self._prompts
            prompts = [order[place % len(order)] for place in range(first, first + self._prompts)]
            answers = [prompt for prompt in prompts for _ in range(self._answers)]
            for _ in range(self._iterations):
                yield from self._dealt(answers)

    def _dealt(self, answers: list[int]) -> Iterator[int]:
        """The answers of a step in the order in which they are dealt, micro-batch by micro-batch, to the processes."""
        share = len(answers) // self._processes
        for first in range(0, share, self._batch):
            for process in range(self._processes):
                begin = process * share + first
                yield from answers[begin : begin + self._batch]
