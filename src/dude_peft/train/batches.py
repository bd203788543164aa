"""Examples of different lengths as one rectangle of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is not learned, in transformers' convention."""


def pad_right(examples: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, Tensor]:
    """Training examples -> input_ids, attention_mask and labels, each (rows, longest)."""
    longest = max(len(example["input_ids"]) for example in examples)
    filler = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([[*example[name], *[fill] * (longest - len(example[name]))] for example in examples])
        for name, fill in filler.items()
    }


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Prompts -> input_ids and attention_mask, each (rows, longest), ending where generation begins."""
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[*[pad_id] * (longest - len(prompt)), *prompt] for prompt in prompts]),
        "attention_mask": torch.tensor([[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts]),
    }
