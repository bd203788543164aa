"""The adapter merged into its base in memory while a model answers, where that is proved to compute the same.

Each token then costs what it costs the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dude_peft.machine.processes import gathered
from dude_peft.tuner import DudeModel, frozen
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.offloaded import is_offloaded

_ROWS, _TOKENS = 4, 64
_TOLERANCE = 1e-4
"""Of the largest logit; float32's own rounding through a deep model is about a tenth."""


def merged_if_equal(
    model: Any, wanted: bool = True, logits: Callable[[Any], Tensor] | None = None
) -> AbstractContextManager[bool]:
    """Within: the adapter is merged, if the model is float32 and its logits stay as they are; yields whether it is.

    In half precision a merged weight is rounded, which is another model, and a quantised weight cannot be merged: there
    the live adapter is what runs. Afterwards the base weights are back, bit by bit.

    Args:
        model: a PeftModel with one DuDe adapter, in evaluation mode.
        wanted: False leaves it alone.
        logits: of the model, to compare; None computes those of arbitrary tokens.
    """
    return _merged(model, logits or _logits) if wanted and _mergeable(model) else nullcontext(False)


@contextmanager
def _merged(model: Any, logits: Callable[[Any], Tensor]) -> Iterator[bool]:
    live = logits(model)
    try:
        model.merge_adapter()
        equal = all(gathered(bool((logits(model) - live).abs().max() <= _TOLERANCE * live.abs().max())))
        if not equal:
            model.unmerge_adapter()
        yield equal
    finally:
        model.unmerge_adapter()


def _mergeable(model: Any) -> bool:
    # PEFT's own adapters are taken out of the weights again by arithmetic, which leaves other bits behind.
    ours = isinstance(getattr(model, "base_model", None), DudeModel)
    if not ours or any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return False
    layers = [module for module in model.modules() if isinstance(module, DudeLinear)]
    # A weight that is packed may call itself float32, and GPTQ's layers have none.
    bases = [layer.target() for layer in layers if not layer.merged]
    return len(bases) == len(layers) and all(
        frozen.plain_weight(base) is not None and not is_offloaded(base) for base in bases
    )


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """(rows, tokens, vocabulary) of arbitrary tokens, the same each time."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or _TOKENS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (_ROWS, min(_TOKENS, positions)), generator=generator)
    logits: Tensor = model(input_ids=ids.to(model.device)).logits
    return logits
