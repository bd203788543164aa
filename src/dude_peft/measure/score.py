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
from dude_peft.data.prefixes import heads
from dude_peft.data.sight import SeenPrompt
from dude_peft.machine.sharding import is_cut
from dude_peft.measure.shares import Turn, all_of, together, turns
from dude_peft.model.prefix import KeptPrefix, Tree, tree_logits

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
    share: bool = False,
    spread: bool = False,
    advance: Advance = lambda rows: None,
) -> float:
    """Mean cross-entropy in nats over all trained tokens of all `examples`; every token counts the same."""
    how: dict[str, Any] = {"pad_id": pad_id, "batch_size": batch_size, "company": company, "share": share}
    return item_losses(model, examples, **how, spread=spread, advance=advance).mean


def begin_alike(
    examples: Sequence[Mapping[str, Sequence[int]]],
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    companies: tuple[Company, Company],
) -> bool:
    """Whether the losses of `examples` or the answers to `prompts` are worth a model that shares beginnings."""
    losing, answering = companies
    of_losses = _loss_heads(examples, grouped([len(each["input_ids"]) for each in examples], batch_size, losing))
    return any(of_losses) or any(_prompt_heads(prompts, grouped([*map(len, prompts)], batch_size, answering)))


@torch.inference_mode()
def item_losses(
    model: Any,
    examples: Sequence[Mapping[str, Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int,
    company: Company = "any",
    share: bool = False,
    spread: bool = False,
    advance: Advance = lambda rows: None,
) -> ItemLosses:
    """The loss of each example by itself.

    Args:
        model: any.
        examples: to be scored.
        pad_id: fills shorter ones up.
        batch_size: examples at a time.
        company: which of them may share a batch.
        share: compute what they begin with once, where that pays; only for a model that `shares_exactly`.
        spread: each process of the run scores a part of them; all have to call this, and all get all losses.
        advance: called after every batch.
    """
    model.eval()
    found = torch.zeros(2, len(examples), dtype=torch.float64)
    batches = grouped([len(example["input_ids"]) for example in examples], batch_size, company)
    shared: list[tuple[int, ...]] = _loss_heads(examples, batches) if share else [()] * len(batches)
    kept = KeptPrefix(model)
    for turn in turns(batches, shared, spread=spread):
        _refresh(kept, turn)
        rows = [examples[index] for index in turn.rows]
        logits, labels, counts = _behind(kept, turn.head, rows, pad_id) if turn.head else _whole(model, rows, pad_id)
        each = functional.cross_entropy(logits.float(), labels, reduction="none").double().cpu()
        if turn.counts:
            for index, count, own in zip(turn.rows, counts, torch.split(each, counts), strict=True):
                found[0, index], found[1, index] = float(own.sum()) / max(count, 1), count
        advance(turn.done)
    losses, tokens = together(found, spread=spread)
    return ItemLosses(tuple(losses.tolist()), tuple(tokens.long().tolist()))


def _refresh(kept: KeptPrefix, turn: Turn) -> None:
    """Computes a beginning in the same turn as all other processes."""
    if turn.fresh:
        kept.clear()
        kept.of(turn.fresh)


_Judged = tuple[Tensor, Tensor, list[int]]
"""Logits (trained tokens, vocabulary), these tokens, and how many each row has."""


def _whole(model: Any, rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> _Judged:
    batch = {name: tensor.to(model.device) for name, tensor in pad_right(rows, pad_id).items()}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    learned = labels != IGNORE
    return logits[learned], labels[learned], learned.sum(1).tolist()


def _behind(
    kept: KeptPrefix, head: tuple[int, ...], rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int
) -> _Judged:
    trees = [Tree(row["input_ids"][len(head) : -1]) for row in rows]  # nothing follows the last token
    places = [_predicting(row) for row in rows]
    wanted = [[place - len(head) for place in some] for some in places]
    logits = tree_logits(kept.model, kept.of(head), trees, wanted, pad_id)
    labels = [row["labels"][place + 1] for row, some in zip(rows, places, strict=True) for place in some]
    return logits, torch.tensor(labels, device=logits.device), [*map(len, places)]


def _loss_heads(
    examples: Sequence[Mapping[str, Sequence[int]]], batches: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """What the examples of each batch begin with before the first token whose prediction counts."""
    before: list[Sequence[int]] = []
    for example in examples:
        places = _predicting(example)
        if "shown" in example or not places:
            return [()] * len(batches)
        before.append(example["input_ids"][: places[0] + 1])
    return heads([[before[index] for index in indices] for indices in batches])


def _predicting(example: Mapping[str, Sequence[int]]) -> list[int]:
    """Places whose next token is trained."""
    return [place - 1 for place, label in enumerate(example["labels"]) if place and label != IGNORE]


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    company: Company = "any",
    share: bool = False,
    spread: bool = False,
    advance: Advance = lambda rows: None,
) -> list[str]:
    """Greedy continuation of every prompt (token ids), in the order given, up to the end of the model's turn.

    `share` computes what prompts begin with once, and `spread` gives each process a part, as `item_losses` does.
    """
    with only_ends(model, tokenizer) as ends:
        batches = grouped([len(prompt) for prompt in prompts], batch_size, company)
        shared: list[tuple[int, ...]] = _prompt_heads(prompts, batches) if share else [()] * len(batches)
        own = turns(batches, shared, spread=spread)
        texts = _complete(model, tokenizer, prompts, ends, max_new_tokens, own, advance)
        found = all_of(texts, spread=spread)
        return [found[index] for index in range(len(prompts))]


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
    own: Sequence[Turn],
    advance: Advance,
) -> dict[int, str]:
    """The texts of this process's turns, by the prompts' indices."""
    model.eval()
    texts = {}
    kept = KeptPrefix(model)
    waits = {"synced_gpus": True} if is_cut(model) else {}  # until the others have their last token, too
    for turn in own:
        _refresh(kept, turn)
        batch = pad_left([prompts[index] for index in turn.rows], int(tokenizer.pad_token_id))
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        behind = kept.generating(batch, turn.head)
        out = model.generate(**behind, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True, **waits)
        if turn.counts:
            for index, row in zip(turn.rows, out[:, batch["input_ids"].shape[1] :], strict=True):
                texts[index] = _decoded(tokenizer, row, ends)
        advance(turn.done)
    return texts


def _prompt_heads(prompts: Sequence[Sequence[int]], batches: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    if any(isinstance(prompt, SeenPrompt) for prompt in prompts):
        return [()] * len(batches)
    return heads([[prompts[index] for index in indices] for indices in batches])


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
