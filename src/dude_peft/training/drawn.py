"""Answers of the model in training, drawn batch by batch, with the ids of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from dude_peft.answer.decode import Finite
from dude_peft.answer.decoding import Decoding
from dude_peft.data.batches import pad_left
from dude_peft.data.labels import IGNORE
from dude_peft.measure.score import only_ends


@dataclass(frozen=True)
class Drawn:
    """An answer."""

    ids: list[int]
    """With the token that ends it, if one does."""
    text: str
    ended: bool


@torch.no_grad()  # not inference_mode: the first forward of a model makes the buffers that training writes
def draw(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    name: str,
    bf16: bool,
) -> list[Drawn]:
    """An answer to each prompt, in their order. What is drawn follows from the generators' state and the batches.

    Args:
        model: in evaluation mode.
        tokenizer: of it.
        prompts: token ids.
        batches: numbers of prompts, all of them, in batches.
        decoding: how tokens are chosen.
        name: of the model, for an error.
        bf16: whether the model works under autocast.

    Raises:
        NumericsError: NaN or Inf in the logits.
    """
    found: dict[int, Drawn] = {}
    finite = LogitsProcessorList([Finite(name)])
    with (
        only_ends(model, tokenizer) as ends,
        torch.autocast(model.device.type, torch.bfloat16, enabled=bf16),
    ):
        for indices in batches:
            batch = pad_left([prompts[index] for index in indices], int(tokenizer.pad_token_id))
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            settings = decoding.settings(decoding.max_new_tokens)
            out = model.generate(**batch, generation_config=settings, logits_processor=finite)
            for index, row in zip(indices, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                stop = next((place for place, token in enumerate(row) if token in ends), None)
                ids = row if stop is None else row[: stop + 1]
                text = text_of(tokenizer, ids if stop is None else ids[:-1])
                found[index] = Drawn(ids, text, stop is not None)
    return [found[index] for index in range(len(prompts))]


def asked_and_answer(example: Mapping[str, list[int]], tokenizer: Any) -> tuple[list[int], str]:
    """Of an example the ids before its last answer, and the text of that answer."""
    ids, labels = example["input_ids"], example["labels"]
    last = max(place for place, label in enumerate(labels) if label != IGNORE)
    first = last
    while first and labels[first - 1] != IGNORE:
        first -= 1
    return ids[:first], text_of(tokenizer, ids[first : last + 1]).strip()


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Ids as text, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))
