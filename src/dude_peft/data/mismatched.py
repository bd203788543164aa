"""Questions with answers to other questions, token by token: what the estimate of KL in KTO is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dude_peft.data.labels import IGNORE

Example = Mapping[str, Sequence[int]]


def mismatched(asked: Sequence[Example], answered: Sequence[Example], max_length: int) -> list[dict[str, list[int]]]:
    """Of each two examples the tokens before the judged answer of the first one, then the answer of the second one.

    What exceeds `max_length` is cut at the end, as TRL does; an answer's beginning is an estimate as well.
    """
    found = []
    for question, answer in zip(asked, answered, strict=True):
        before, own = _first_judged(question), _first_judged(answer)
        ids = [*question["input_ids"][:before], *answer["input_ids"][own:]]
        labels = [*[IGNORE] * before, *answer["labels"][own:]]
        found.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return found


def _first_judged(example: Example) -> int:
    return next(place for place, label in enumerate(example["labels"]) if label != IGNORE)
