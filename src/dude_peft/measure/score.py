"""What a model knows of held-out rows: its loss on their answers, and how many it answers right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig

from dude_peft.data.batches import Company, grouped, pad_left, pad_right
from dude_peft.data.labels import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Advance = Callable[[int], None]
"""Called with the number of rows that were just finished."""


class ItemLosses(NamedTuple):
    """What a model's loss is on each of several examples, in their order."""

    losses: tuple[float, ...]
    """Mean cross-entropy of each one's trained tokens, in nats."""
    tokens: tuple[int, ...]
    """How many these are."""

    @property
    def mean(self) -> float:
        """Over all tokens; every token counts the same."""
        total = math.fsum(loss * count for loss, count in zip(self.losses, self.tokens, strict=True))
        return total / max(sum(self.tokens), 1)


def held_out_loss(
    model: Any,
    examples: Sequence[Mapping[str, Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int,
    company: Company = "any",
    advance: Advance = lambda rows: None,
) -> float:
    """Mean cross-entropy in nats over all trained tokens of all `examples`; every token counts the same."""
    found = item_losses(model, examples, pad_id=pad_id, batch_size=batch_size, company=company, advance=advance)
    return found.mean


@torch.inference_mode()
def item_losses(
    model: Any,
    examples: Sequence[Mapping[str, Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int,
    company: Company = "any",
    advance: Advance = lambda rows: None,
) -> ItemLosses:
    """The loss of each example by itself."""
    model.eval()
    losses, tokens = [0.0] * len(examples), [0] * len(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    for indices in grouped(lengths, batch_size, company):
        rows = [examples[index] for index in indices]
        batch = {name: tensor.to(model.device) for name, tensor in pad_right(rows, pad_id).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        learned = labels != IGNORE
        each = functional.cross_entropy(logits[learned].float(), labels[learned], reduction="none").double().cpu()
        counts = learned.sum(1).tolist()
        for index, count, own in zip(indices, counts, torch.split(each, counts), strict=True):
            losses[index], tokens[index] = float(own.sum()) / max(count, 1), count
        advance(len(rows))
    return ItemLosses(tuple(losses), tuple(tokens))


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    company: Company = "any",
    advance: Advance = lambda rows: None,
) -> list[str]:
    """Greedy continuation of every prompt (token ids), in the order given, up to the end of the model's turn."""
    with only_ends(model, tokenizer) as ends:
        batches = grouped([len(prompt) for prompt in prompts], batch_size, company)
        return _complete(model, tokenizer, prompts, ends, max_new_tokens, batches, advance)


@contextmanager
def only_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[set[int]]:
    """Within: nothing of the model's own generation config holds but the tokens that end an answer, which it gives."""
    ends = end_of_turn_ids(model, tokenizer)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept, inner.generation_config = inner.generation_config, bare_generation_config(model, tokenizer)
    try:
        yield ends
    finally:
        inner.generation_config = kept


def _complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    ends: set[int],
    max_new_tokens: int,
    batches: list[list[int]],
    advance: Advance,
) -> list[str]:
    model.eval()
    texts = [""] * len(prompts)
    for indices in batches:
        batch = pad_left([prompts[index] for index in indices], int(tokenizer.pad_token_id))
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        out = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True)
        for index, row in zip(indices, out[:, batch["input_ids"].shape[1] :], strict=True):
            texts[index] = _decoded(tokenizer, row, ends)
        advance(len(indices))
    return texts


def bare_generation_config(model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A generation config of nothing but the tokens that end an answer.

    transformers fills what a call leaves open from the model's own: penalties and sampling that nobody asked for.
    """
    only: dict[str, Any] = {
        "eos_token_id": sorted(end_of_turn_ids(model, tokenizer)) or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return GenerationConfig(**only)  # type: ignore[no-untyped-call]


def end_of_turn_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation config (chat models)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {own} if isinstance(own, int) else set(own or ())
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    return ends


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, ends: set[int]) -> str:
    ids: list[int] = tokens.tolist()
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(ids[:stop], skip_special_tokens=True)).strip()
