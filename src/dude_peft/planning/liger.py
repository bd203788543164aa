"""Liger's kernels in a dry step: as many bytes as theirs, without their package and without a GPU.

They are those that a run takes (`training.liger`): norms and the loss.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from dude_peft.config.schema import RunConfig


def set_liger_(model: Any, config: RunConfig) -> None:
    """Has the norms of a model without weights keep what Liger's keep.

    Args:
        model: of the run, without an adapter.
        config: of the run.
    """
    train = config.train
    if not train.use_liger_kernel:
        return
    asked: Any = train.liger_kernel_config or {}
    for module in model.modules():
        has_weight = getattr(module, "weight", None) is not None
        if type(module).__name__.endswith("RMSNorm") and has_weight and asked.get("rms_norm", True):
            module.forward = MethodType(_norm, module)


def loss_in_chunks(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a forward whose logits never are there for all tokens at once.

    Args:
        model: adapted in place, a causal language model.
        batch: with labels.
    """
    hidden = model.base_model(**{name: rows for name, rows in batch.items() if name != "labels"})[0]
    apply: Any = _FusedLoss.apply
    found: Tensor = apply(hidden.flatten(0, -2), model.get_output_embeddings().weight)
    return found


def _norm(self: Any, x: Tensor) -> Any:
    apply: Any = _Norm.apply
    return apply(x, self.weight)


class _Norm(torch.autograd.Function):
    """Keeps its input and a float32 number for each row; the gradient takes the place of the one that comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _FusedLoss(torch.autograd.Function):
    """Chunks of as many tokens as make their logits about as large as all hidden states; gradients in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        tokens, width = hidden.shape
        parts = -(-weight.shape[0] // width)
        chunk = min(1 << (-(-tokens // parts) - 1).bit_length(), tokens)
        gradient = torch.empty_like(hidden)
        for begin in range(0, tokens, chunk):
            logits = hidden[begin : begin + chunk] @ weight.t()
            gradient[begin : begin + chunk] = logits @ weight
            del logits
        ctx.save_for_backward(gradient)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None
