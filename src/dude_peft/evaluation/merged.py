"""The adapter merged into its base in memory for the time of a run, where that is proved to compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dude_peft.machine.processes import gathered
from dude_peft.tuner import DudeModel

_ROWS, _TOKENS = 4, 64
_TOLERANCE = 1e-4
"""Of the largest logit; float32's own rounding through a deep model is about a tenth."""


@contextmanager
def merged_if_equal(model: Any, wanted: bool = True) -> Iterator[bool]:
    """Within: the adapter is merged, if the model is float32 and its logits stay as they are; yields whether it is.

    In half precision a merged weight is rounded, which is another model, and a quantised weight cannot be merged: there
    the live adapter is what runs. Afterwards the base weights are back, bit by bit.

    Args:
        model: a PeftModel with one DuDe adapter.
        wanted: False leaves it alone.
    """
    # PEFT's own adapters are taken out of the weights again by arithmetic, which leaves other bits behind.
    ours = isinstance(getattr(model, "base_model", None), DudeModel)
    if not wanted or not ours or any(p.dtype != torch.float32 for p in model.parameters()):
        yield False
        return
    live = _logits(model)
    try:
        model.merge_adapter()
        merged = _logits(model)
        equal = all(gathered(bool((merged - live).abs().max() <= _TOLERANCE * live.abs().max())))
        if not equal:
            model.unmerge_adapter()
        yield equal
    finally:
        model.unmerge_adapter()


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """(rows, tokens, vocabulary) of arbitrary tokens, the same each time."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or _TOKENS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (_ROWS, min(_TOKENS, positions)), generator=generator)
    logits: Tensor = model(input_ids=ids.to(model.device)).logits
    return logits
