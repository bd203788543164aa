"""What one place in a batch holds: an example, or several laid end to end, with their numbers for messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dude_peft.data.batches import flat, pad_right
from dude_peft.data.packing import pack
from dude_peft.data.token_set import TokenSet


class Rows(Dataset[list[dict[str, Any]]]):
    """One example a place; batches are padded."""

    lengths: list[int]
    """Tokens of each place."""

    def __init__(self, examples: TokenSet) -> None:
        """Takes the examples as they are."""
        self._examples = examples
        self.lengths = examples.lengths.tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self._numbered(index)]

    def batch(self, places: Sequence[list[dict[str, Any]]], pad_id: int) -> dict[str, Tensor]:
        """Places -> the model's arguments, and `rows`, the numbers of their examples."""
        examples = [example for place in places for example in place]
        return {**self._tensors(examples, pad_id), "rows": torch.tensor([example["row"] for example in examples])}

    def _tensors(self, examples: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
        return pad_right(examples, pad_id)

    def _numbered(self, index: int) -> dict[str, Any]:
        return {**self._examples[index], "row": index}


class Packs(Rows):
    """As many examples a place as fit; batches are one row without padding."""

    def __init__(self, examples: TokenSet, capacity: int, seed: int) -> None:
        """Packs the examples, at most `capacity` tokens each."""
        super().__init__(examples)
        self._packs = pack(examples.lengths, capacity, seed)
        tokens = self.lengths
        self.lengths = [sum(tokens[example] for example in examples) for examples in self._packs]

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self._numbered(example) for example in self._packs[index]]

    def _tensors(self, examples: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
        return flat(examples)
