"""Examples of different lengths as tensors: padded to a rectangle, or laid end to end without padding."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dude_peft.data.labels import IGNORE
from dude_peft.data.sight import SeenPrompt, Shown

Example = Mapping[str, Any]
"""`input_ids` and `labels`, lists of one length; `shown` of one with images."""
Company = Literal["any", "alike", "none"]
"""Rows that may share a batch without changing each other: any rows, those of one length, none."""


def grouped(lengths: Sequence[int], size: int, company: Company = "any") -> list[list[int]]:
    """Indices of rows, at most `size` a batch, shortest first, so that little goes into padding."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    if company == "none":
        return [[index] for index in order]
    alike = [list(same) for _, same in itertools.groupby(order, lambda index: lengths[index])]
    runs = alike if company == "alike" else [order]
    return [run[start : start + size] for run in runs for start in range(0, len(run), size)]


def pad_right(examples: Sequence[Example], pad_id: int, length: int | None = None) -> dict[str, Tensor]:
    """Training examples -> input_ids, attention_mask and labels, each (rows, longest), or (rows, length).

    The first label of each is IGNORE: nothing predicts it, and whoever counts labels shall not count it. The mask comes
    from the lengths alone: a token of the text that happens to be the padding token is read like any. Where examples
    have images, what the model reads of these is there as well, under the names of its processor.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    longest = length or max(lengths)
    filler = {"input_ids": pad_id, "labels": IGNORE}
    batch = {
        name: torch.tensor([[*example[name], *[fill] * (longest - len(example[name]))] for example in examples])
        for name, fill in filler.items()
    }
    batch["labels"][:, 0] = IGNORE
    batch["attention_mask"] = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
    return batch | _of_images(batch["input_ids"], [example["shown"] for example in examples if "shown" in example])


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Prompts -> input_ids and attention_mask, each (rows, longest), ending where generation begins; images, too."""
    longest = max(map(len, prompts))
    batch = {
        "input_ids": torch.tensor([[*[pad_id] * (longest - len(prompt)), *prompt] for prompt in prompts]),
        "attention_mask": torch.tensor([[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts]),
    }
    return batch | _of_images(batch["input_ids"], [each.shown for each in prompts if isinstance(each, SeenPrompt)])


def head(example: Example, tokens: int) -> Example:
    """The first `tokens` of an example; more where an image would be cut."""
    shown: Shown | None = example.get("shown")
    if shown is not None:
        marks = [place for place, token in enumerate(example["input_ids"]) if token in shown.sight.marks]
        tokens = max(tokens, marks[-1] + 1)
    cut = {name: ids[:tokens] for name, ids in example.items() if name != "shown"}
    return cut if shown is None else {**cut, "shown": shown}


def _of_images(ids: Tensor, rows: Sequence[Shown]) -> dict[str, Tensor]:
    return rows[0].sight.tensors(ids, rows) if rows else {}


def flat(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Training examples end to end -> input_ids, position_ids and labels, each (1, tokens), without padding.

    Positions begin at 0 in each example; that, and that there is no attention_mask, is how transformers (and its flash
    attention) knows where one example ends. The first label of each is IGNORE: no example predicts the next one's
    first token. Only for models that `packing.packs_apart` approves, and without a cache of keys (use_cache=False).
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for example in examples:
        ids += example["input_ids"]
        positions += range(len(example["input_ids"]))
        labels += [IGNORE, *example["labels"][1:]]
    rows = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([row]) for name, row in rows.items()}
