"""An adapter inside the weights for as long as a model answers: each token then costs what it costs the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dude_peft.tuner import DudeModel
from dude_peft.tuner.layer import DudeLinear

_TOLERANCE = 1e-4
"""Of the largest logit, by how much the merged model's may differ; rounding alone makes about 1e-6."""


@contextmanager
def merged_where_equal(model: Any, batch: Mapping[str, Tensor]) -> Iterator[bool]:
    """Within: the adapter is merged, where that gives the same logits; behind it every bit is as it was.

    That is so of float32 weights. In bfloat16 a merged weight would lose small changes, so the adapter stays beside it,
    as it does beside a quantised weight and where stock PEFT made it, whose way back is not exact.

    Args:
        model: adapted, in evaluation mode.
        batch: input_ids and attention_mask, on which the logits are compared.
    """
    if not _mergeable(model):
        yield False
        return
    before = _logits(model, batch)
    model.base_model.merge_adapter()
    try:
        equal = bool((_logits(model, batch) - before).abs().max() <= _TOLERANCE * before.abs().max())
        if not equal:
            model.base_model.unmerge_adapter()
        yield equal
    finally:
        model.base_model.unmerge_adapter()


def _mergeable(model: Any) -> bool:
    if not isinstance(model.base_model, DudeModel):
        return False
    weights = [m.get_base_layer().weight for m in model.modules() if isinstance(m, DudeLinear)]
    plain = all(type(weight.data) is torch.Tensor and weight.dtype is torch.float32 for weight in weights)
    return plain and not any(m.merged for m in model.modules() if isinstance(m, DudeLinear))


@torch.no_grad()
def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Behind the last token of each row, where all of them end; (rows, vocabulary)."""
    found: Tensor = model(**batch, use_cache=False).logits[:, -1].float()
    return found.masked_fill(found.isinf(), 0.0)  # -inf is how some models rule out tokens
