"""What one place in a batch holds: an example, or several laid end to end, with their numbers for messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dude_peft.data.batches import flat, pad_right
from dude_peft.data.labels import IGNORE
from dude_peft.data.mismatched import mismatched
from dude_peft.data.packing import pack
from dude_peft.training.compiled import padded
from dude_peft.training.training_set import TrainingSet


class Rows(Dataset[list[dict[str, Any]]]):
    """One example a place; batches are padded."""

    lengths: list[int]
    """Tokens of each place."""
    domain: int
    """Places of the domain's examples; those of general ones follow."""

    def __init__(self, examples: TrainingSet, *, few_lengths: bool = False) -> None:
        """Takes the examples as they are; `few_lengths` pads batches to one of eight lengths, for the compiler."""
        self._examples, self._few_lengths = examples, few_lengths
        self.lengths = examples.lengths.tolist()
        self.domain = examples.domain
        self._longest = max(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self._numbered(index)]

    def batch(self, places: Sequence[list[dict[str, Any]]], pad_id: int) -> dict[str, Any]:
        """Places -> the model's arguments; `rows`, the numbers of their examples; `general`, the general ones alone.

        General examples stand behind the domain's. Where there are none, there is no `general`.
        """
        examples = sorted((example for place in places for example in place), key=self._is_general)
        general = [example for example in examples if self._is_general(example)]
        batch = {**self._tensors(examples, pad_id), "rows": torch.tensor([example["row"] for example in examples])}
        return {**batch, "general": self._tensors(general, pad_id)} if general else batch

    def _is_general(self, example: dict[str, Any]) -> bool:
        return bool(example["row"] >= self._examples.domain)

    def _tensors(self, examples: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        return pad_right(examples, pad_id, padded(longest, self._longest) if self._few_lengths else longest)

    def _numbered(self, index: int) -> dict[str, Any]:
        return {**self._examples[index], "row": index}


class PairRows(Rows):
    """One pair a place; a batch holds the better conversations, then the worse ones in the same order."""

    def __init__(self, examples: TrainingSet, reference: Tensor | None = None, *, answers_alone: bool = False) -> None:
        """Takes the examples as they are.

        Args:
            examples: pairs.
            reference: the base's log-probabilities (pairs, 2) of better and worse answers, where they are known.
            answers_alone: labels begin right before the first judged token of a batch, for a model that computes no
                logits in front of them (`model.outputs.kept_logits`).
        """
        super().__init__(examples)
        self._reference, self._answers_alone = reference, answers_alone

    def batch(self, places: Sequence[list[dict[str, Any]]], pad_id: int) -> dict[str, Any]:
        """Places -> the model's arguments, `rows`, and `base`, the reference in the order of the conversations."""
        batch = super().batch(places, pad_id)
        return batch if self._reference is None else {**batch, "base": self._reference[batch["rows"]].T.flatten()}

    def _tensors(self, examples: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
        worse = [{name: each[f"rejected_{name}"] for name in ("input_ids", "labels")} for each in examples]
        batch = pad_right([*examples, *worse], pad_id)
        if self._answers_alone:
            first = int((batch["labels"] != IGNORE).any(0).int().argmax())  # the token before predicts it
            batch["labels"] = batch["labels"][:, max(first - 1, 0) :]
        return batch


class ScoredRows(PairRows):
    """One pair to be scored a place; a batch also has the margins of its rows, where any row has one."""

    def __init__(self, examples: TrainingSet) -> None:
        """Takes the margins of all pairs."""
        super().__init__(examples)
        margins = torch.from_numpy(examples.wanted_margins)
        self._margins = margins if bool(margins.any()) else None

    def batch(self, places: Sequence[list[dict[str, Any]]], pad_id: int) -> dict[str, Any]:
        """Places -> the model's arguments, `rows` and `margin`, (pairs,)."""
        batch = super().batch(places, pad_id)
        return batch if self._margins is None else {**batch, "margin": self._margins[batch["rows"]]}


class PromptRows(Rows):
    """One prompt a place; a batch has the numbers of its rows alone, of which `rollouts.Rollouts` makes another."""

    def batch(self, places: Sequence[list[dict[str, Any]]], pad_id: int) -> dict[str, Any]:
        """Places -> `rows`."""
        return {"rows": torch.tensor([example["row"] for place in places for example in place])}


class LabelledRows(Rows):
    """One answer with its label a place; a batch also has its questions with other rows' answers."""

    def __init__(self, examples: TrainingSet, max_length: int | None) -> None:
        """`max_length`: tokens that a question with another answer may have; None makes none of these."""
        super().__init__(examples)
        self._labels, self._max_length = torch.from_numpy(examples.labels), max_length

    def batch(self, places: Sequence[list[dict[str, Any]]], pad_id: int) -> dict[str, Any]:
        """Places -> the model's arguments, `rows`, `label`, and `mismatched`: other arguments, for the estimate of KL.

        Each question gets the answer of the row before it in the batch, the first one that of the last, as TRL has it.
        A batch of one, which ends an epoch, takes the answer of the next row of the set.
        """
        batch = super().batch(places, pad_id)
        batch["label"] = self._labels[batch["rows"]]
        if self._max_length is not None:
            asked = [example for place in places for example in place]
            alone = len(asked) == 1
            answered = [self._examples[(asked[0]["row"] + 1) % len(self)]] if alone else [asked[-1], *asked[:-1]]
            batch["mismatched"] = pad_right(mismatched(asked, answered, self._max_length), pad_id)
        return batch


class Packs(Rows):
    """As many examples of one kind a place as fit; batches are one row without padding."""

    def __init__(self, examples: TrainingSet, capacity: int, seed: int) -> None:
        """Packs the examples, at most `capacity` tokens each."""
        super().__init__(examples)
        tokens, domain = self.lengths, examples.domain
        self._packs = pack(examples.lengths[:domain], capacity, seed)
        self.domain = len(self._packs)
        general = pack(examples.lengths[domain:], capacity, seed)
        self._packs += [[domain + example for example in together] for together in general]
        self.lengths = [sum(tokens[example] for example in together) for together in self._packs]

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self._numbered(example) for example in self._packs[index]]

    def _tensors(self, examples: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
        return flat(examples)
