"""A prefix that many rows share, computed once: its keys and values, and forwards of what comes behind it.

Rows are trees: a stem, and branches that all follow it and do not see each other. A 4-D mask and explicit positions say
so, which not every architecture heeds, nor does every cache hold plain keys and values: `shares_prefixes` tries it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from dude_peft.data.trial import distance, text_ids, traceless, trial_length, trial_rows
from dude_peft.machine.out_of_memory import comes_of_memory
from dude_peft.model.outputs import can_keep_few
from dude_peft.model.quantised import stored_config
from dude_peft.parents import fits

_TRIFLE = 2**-9
"""Of what another token does to the logits; what another layout of a batch does is a hundredth of it in float32."""


_SPARE = 64
"""Tokens of room, or a quarter of what is there."""
_OF_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Tree:
    """One row of a batch: tokens behind the prefix, and what may follow them."""

    stem: Sequence[int]
    branches: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.stem) + sum(map(len, self.branches))


@fits()
class _Lent(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one row, lent to all rows of a batch; what is computed behind them is not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        rows = len(key_states)
        keys, values = (kept.expand(rows, -1, -1, -1) for kept in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@fits()
class _Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of many rows with room for more: transformers' own layer copies all of them at every token."""

    def __init__(self, keys: Tensor, values: Tensor, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = (kept.expand(rows, -1, -1, -1) for kept in (keys, values))
        self._room = 0
        self._all_keys, self._all_values = self.keys, self.values

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        held = self.keys.shape[-2]
        length = held + key_states.shape[-2]
        if length > self._room:
            self._room = length + max(_SPARE, length // 4)
            self._all_keys, self._all_values = (_roomy(kept, self._room) for kept in (self.keys, self.values))
        self._all_keys[..., held:length, :] = key_states
        self._all_values[..., held:length, :] = value_states
        self.keys, self.values = self._all_keys[..., :length, :], self._all_values[..., :length, :]
        return self.keys, self.values


def _roomy(kept: Tensor, room: int) -> Tensor:
    new = kept.new_empty(*kept.shape[:-2], room, kept.shape[-1])
    new[..., : kept.shape[-2], :] = kept
    return new


class Prefix:
    """The keys and values of some tokens under a model as it is now."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        """Compute them. ValueError where the model keeps anything else."""
        tokens = torch.tensor([list(ids)], device=model.device)
        out = model(input_ids=tokens, use_cache=True, **_only(model, torch.tensor([len(ids) - 1])))
        cache = out.past_key_values
        layers = getattr(cache, "layers", [])
        if type(cache) is not DynamicCache or not layers or any(type(layer) is not DynamicLayer for layer in layers):
            raise ValueError("its cache is not one of plain attention")
        self.ids = tuple(ids)
        self._layers = [(layer.keys, layer.values) for layer in layers]

    def lent(self) -> DynamicCache:
        """For one forward of any number of rows."""
        cache = DynamicCache()
        cache.layers = [_Lent(keys, values) for keys, values in self._layers]
        return cache

    def copied(self, rows: int) -> DynamicCache:
        """For the generation of `rows` rows, which adds to it."""
        cache = DynamicCache()
        cache.layers = [_Roomy(keys, values, rows) for keys, values in self._layers]
        return cache


class KeptPrefix:
    """The prefix that was asked for last, of one model as it is now: batches of one prefix follow each other."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._prefix: Prefix | None = None

    def of(self, ids: Sequence[int]) -> Prefix:
        """Computed, unless it is the last one."""
        if self._prefix is None or self._prefix.ids != tuple(ids):
            self.clear()
            self._prefix = Prefix(self.model, ids)
        return self._prefix

    def clear(self) -> None:
        """Give its memory back."""
        self._prefix = None

    def generating(self, batch: Mapping[str, Tensor], head: Sequence[int]) -> dict[str, Any]:
        """What `generate` gets: a batch padded on the left whose rows all begin with `head`, this one computed."""
        if not head:
            return dict(batch)
        ids, mask = after_prefix(batch["input_ids"], batch["attention_mask"], len(head))
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": self.of(head).copied(len(ids))}


def tree_logits(
    model: Any, prefix: Prefix | None, trees: Sequence[Tree], wanted: Sequence[Sequence[int]], pad_id: int
) -> Tensor:
    """Logits (all places wanted, vocabulary), tree after tree, from one forward.

    Args:
        model: one that `shares_prefixes`, or any without `prefix`es and branches.
        prefix: what stands before all stems.
        trees: a row each.
        wanted: of each tree, places within [*stem, *branch 1, *branch 2, ...].
        pad_id: fills the rows up on the left, so that their ends, where most logits are wanted, stand together.
    """
    behind = 0 if prefix is None else len(prefix.ids)
    width = max(map(len, trees))
    filled = [_Row(tree, width, behind, pad_id) for tree in trees]
    ids, positions, branch = (
        torch.tensor([getattr(row, name) for row in filled], device=model.device)
        for name in ("ids", "positions", "branch")
    )
    # A padding token sees padding, so that no row of the mask is empty.
    same_branch = (branch[:, :, None] == branch[:, None, :]) | ((branch[:, None, :] == 0) & (branch[:, :, None] > 0))
    seen = same_branch & (positions[:, None, :] <= positions[:, :, None])
    seen = torch.cat([seen.new_ones(len(trees), width, behind), seen], dim=2)
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
    mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
    places = [[width - len(tree) + place for place in some] for tree, some in zip(trees, wanted, strict=True)]
    columns = sorted({place for some in places for place in some})
    kept = _only(model, torch.tensor(columns, device=model.device))
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask[:, None],
        position_ids=positions,
        past_key_values=None if prefix is None else prefix.lent(),
        use_cache=prefix is not None,
        **kept,
    ).logits
    at = {column: number for number, column in enumerate(columns)} if kept else None
    chosen = [(row, place if at is None else at[place]) for row, some in enumerate(places) for place in some]
    rows, found = (torch.tensor(index, device=logits.device) for index in zip(*chosen, strict=True))
    return logits[rows, found]


class _Row:
    """A tree in a rectangle: token, position and branch (-1: padding, 0: stem) of every place."""

    def __init__(self, tree: Tree, width: int, behind: int, pad_id: int) -> None:
        empty, stem = width - len(tree), len(tree.stem)
        self.ids = [*[pad_id] * empty, *tree.stem]
        self.positions = [*[0] * empty, *range(behind, behind + stem)]
        self.branch = [*[-1] * empty, *[0] * stem]
        for number, tokens in enumerate(tree.branches, start=1):
            self.ids += tokens
            self.positions += range(behind + stem, behind + stem + len(tokens))
            self.branch += [number] * len(tokens)


def after_prefix(ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Rows that are padded on the left and begin with the same `length` tokens -> the padding behind these instead."""
    empty = ids.shape[1] - mask.sum(dim=1, keepdim=True)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    source = torch.where(place < length, place + empty, torch.where(place < length + empty, place - length, place))
    return ids.gather(1, source), mask.gather(1, source)


def shares_prefixes(model: Any, pad_id: int) -> bool:
    """Whether trees behind a prefix, and generation behind one, compute what whole rows do; tried on short rows."""
    if _turns_with_length(model.config.to_dict()):
        return False
    pad_id = pad_id if pad_id < model.get_input_embeddings().weight.shape[0] else 0
    try:
        with traceless(model):
            return _tried(model, pad_id)
    except Exception as error:  # a model that takes no 4-D mask, positions or cache says so in its own way
        if comes_of_memory(error):
            raise
        return False


def shares_exactly(model: Any, pad_id: int) -> bool:
    """Whether it `shares_prefixes`, and what is left of a difference is the rounding of float32.

    In half precision, TF32 among it, and under quantised layers near ties of logits fall otherwise. A model that sees
    images may remember where those of its last batch were.
    """
    settings = model.config
    plain = settings.get_text_config() is settings and stored_config(settings) is None
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    exact = exact and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return plain and exact and shares_prefixes(model, pad_id)


def _tried(model: Any, pad_id: int) -> bool:
    length = trial_length(model)
    head, stem, one, other, branch = trial_rows(text_ids(model), 5, max(2, length // 2))
    prefix = Prefix(model, head)
    trees = [Tree(stem, [one[:1], other]), Tree(stem[:1], [one])]
    wanted = [[len(stem) - 1, len(stem), len(trees[0]) - 1], [0, len(trees[1]) - 1]]
    found = tree_logits(model, prefix, trees, wanted, pad_id).float()
    paths = [head + stem, head + stem + one[:1], head + stem + other, head + stem[:1], head + stem[:1] + one]
    alone = torch.stack([_last(model, path) for path in paths])
    ids = torch.tensor([[pad_id, *head, *one[:1]], [*head, *one[:2]]], device=model.device)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    moved, moved_mask = after_prefix(ids, mask, len(head))
    generated = model.generate(
        input_ids=moved,
        attention_mask=moved_mask,
        past_key_values=prefix.copied(2),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=pad_id,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits[0]
    found = torch.cat([found, generated.float()])
    alone = torch.cat([alone, torch.stack([_last(model, head + one[:1]), _last(model, head + one[:2])])])
    effect = float(distance(alone, _last(model, branch)).max())
    rounding = 4 * float(torch.finfo(model.dtype).eps) * float(alone[alone.isfinite()].abs().mean())
    return float(distance(found, alone).max()) <= max(_TRIFLE * effect, rounding)


def _turns_with_length(settings: Any) -> bool:
    """Whether rotary frequencies depend on how long a row is: those of a prefix are not those of a whole prompt."""
    if not isinstance(settings, Mapping):
        return False
    kind = settings.get("rope_type", settings.get("type"))
    return kind in _OF_LENGTH or any(map(_turns_with_length, settings.values()))


def _last(model: Any, tokens: Sequence[int]) -> Tensor:
    ids = torch.tensor([list(tokens)], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, -1].float()


def _only(model: Any, places: Tensor) -> dict[str, Tensor]:
    """The argument that has logits computed there alone; nothing for a model that computes all."""
    return {"logits_to_keep": places} if can_keep_few(model) else {}
