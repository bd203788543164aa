"""Attention in a dry step as the run will have it: flash attention without its package, and rows without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dude_peft.config.schema import RunConfig

# Names of ours: transformers makes no mask for those that it does not know. Where "flash" is in one, it wants packages.
_FLASH, _UNMASKED = "dude_counted_blockwise", "dude_counted_sdpa"


def set_attention_(model: Any, config: RunConfig, *, sees: bool = False) -> None:
    """Has the model compute attention as it will in the run, with as many bytes.

    A batch of one row has no padding, so transformers makes no mask for sdpa, unless attention is local. Under fake
    tensors it cannot know that, and would make one of length x length.

    Args:
        model: of the run, without an adapter.
        config: of the run.
        sees: whether batches have images; their masks are known, so transformers decides itself.
    """
    wanted, train = config.model.attn_implementation, config.train
    if wanted in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        model.set_attn_implementation(_FLASH)
        return
    text = model.config.get_text_config()
    padded = train.per_device_train_batch_size * train.sides > 1 or config.data.packing
    local = set(getattr(text, "layer_types", None) or ()) - {"full_attention"} or getattr(text, "sliding_window", None)
    if not sees and not padded and not local and text._attn_implementation == "sdpa":
        model.set_attn_implementation(_UNMASKED)


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """(batch, heads, tokens, width) of each -> (batch, tokens, heads, width), of no meaning."""
    found: Any = _Flash.apply
    kind = query.device.type
    if query.dtype == torch.float32 and torch.is_autocast_enabled(kind):  # as transformers does, its kernels are half
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    return found(query, key, value), None


class _Flash(torch.autograd.Function):
    """What the kernels of flash attention allocate: no table of scores, but float32 sums of a row and a head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, width = query.shape
        y = query.new_empty(batch, tokens, heads, width)
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, y, sums)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, sums = ctx.saved_tensors
        sums, total = torch.empty_like(sums), query.new_empty(query.shape, dtype=torch.float32)  # noqa: F841  # live
        dq, wide = torch.empty_like(query), query.shape[1] != key.shape[1]
        # Heads that share keys and values have gradients of their own first.
        apart = [query.new_empty(query.shape) for _ in range(2 * wide)]  # noqa: F841
        return dq, torch.empty_like(key), torch.empty_like(value)


AttentionInterface.register(_FLASH, _flash)
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
