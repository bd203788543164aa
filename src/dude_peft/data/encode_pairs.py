"""From pairs to token ids and labels: both conversations of a pair are kept, or none of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dude_peft.data.encode import Counts, Encoder, Example
from dude_peft.data.formats import Row
from dude_peft.data.template import Template
from dude_peft.errors import ConfigError


@dataclass
class PairEncoder:
    """Turns pairs into two examples each, the better one first, as `Encoder` turns rows into examples.

    Only what follows the shared beginning is judged. A pair of which one conversation does not fit, or has no answer to
    judge, or whose two answers are the same tokens, is left out and counted.

    Raises ConfigError for a wrong max_length, and for train_on and upft that say other than "all of the answers".
    """

    template: Template
    tokenizer: Any
    max_length: int
    train_on: str = "answers"
    upft: int | None = None
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        check_whole("of pairs, both answers", self.train_on, self.upft)
        self._sides = [
            Encoder(self.template, self.tokenizer, max_length=self.max_length, train_on="answers", shortens=False)
            for _ in range(2)
        ]
        self.ends = self._sides[0].ends

    def examples(self, rows: Iterable[Row]) -> Iterator[tuple[Row, list[Example]]]:
        """Each pair and its two examples, or none. Raises what `Encoder.examples` does."""
        whole, first, second = itertools.tee(rows, 3)
        better = self._sides[0].examples(row.sides[0] for row in first)
        worse = self._sides[1].examples(row.sides[1] for row in second)
        for row, (_, chosen), (_, rejected) in zip(whole, better, worse, strict=True):
            each = [side.counts for side in self._sides]
            for side in self._sides:
                side.counts = Counts()  # the next pair's
            both = bool(chosen and rejected)
            same = both and chosen[0].ids == rejected[0].ids
            made = [*chosen, *rejected] if both and not same else []
            self._count(each, made, identical=same)
            yield row, made

    def check_any(self, made: int, name: str = "") -> None:
        """Raises DataError, beginning with `name`, where no example was made of the pairs read."""
        self._sides[0].counts = self.counts
        self._sides[0].check_any(made, name)

    def _count(self, sides: list[Counts], made: list[Example], *, identical: bool) -> None:
        """One pair counts once in what happens to it, and as both conversations in tokens."""
        counts = self.counts
        counts.rows += 1
        counts.identical += identical
        for name in ("dropped", "truncated", "unlearned", "spelling", "spelling_ends", "last_only"):
            setattr(counts, name, getattr(counts, name) + any(getattr(side, name) for side in sides))
        for name in ("used", "left_out"):
            merged = getattr(counts, name)
            for key in {key: None for side in sides for key in getattr(side, name)}:
                merged[key] = merged.get(key, 0) + 1
        counts.longest = max(counts.longest, *(side.longest for side in sides))
        if made:
            counts.tokens += sum(len(example.ids) for example in made)
            counts.trained_tokens += sum(sum(example.trained) for example in made)
            counts.ended += all(example.ids[-1] in self.ends for example in made)
            counts.largest_id = max(counts.largest_id, *(side.largest_id for side in sides))


def check_whole(what: str, train_on: str, upft: int | None) -> None:
    """Raises ConfigError where the options say that `what`, which is judged, is learned in part."""
    if train_on != "answers" or upft is not None:
        told = f"train_on: {train_on}" if train_on != "answers" else f"upft: {upft}"
        raise ConfigError(f"{told} is for rows of answers; {what} are judged whole: leave it out")
