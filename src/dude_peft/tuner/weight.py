"""`layer.weight` of an adapted layer, for modules that read it instead of calling the layer.

torch's nn.TransformerEncoderLayer does in evaluation, the attention of WavLM, DETR, Reformer and DeBERTa does always,
Mamba's fused kernels do on GPUs. They have to find the effective weight, or the adapter would silently do nothing.

Others (T5) ask the weight for its dtype alone, in every forward. So what they get stands for the weight, and knows its
shape, dtype and device; its values are computed in the first operation that wants them. torch's own fast paths step
aside for such a tensor, and then call the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What is known of the weight without its values.
_FACTS = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda")
} | {
    getattr(Tensor, name)
    for name in ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "__hash__")
}


_DATA, _REQUIRES_GRAD = (getattr(Tensor, name) for name in ("data", "requires_grad"))
_MARKS = (Tensor.requires_grad_, _REQUIRES_GRAD.__set__)
# Beside functions whose names end in one underscore: x[i] = ..., x.data = ..., x += ....
_WRITES = {"__setitem__", "__set__", "__delitem__"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


def readable(like: Tensor, compute: Callable[[], Tensor], trained: list[Tensor]) -> Tensor:
    """A tensor that stands for a weight, differentiable in what is trained.

    Args:
        like: a weight of the same shape, dtype and device.
        compute: gives the values, by operations that autograd follows.
        trained: the tensors that `compute` is to be differentiated by.
    """
    if torch.compiler.is_compiling():
        return compute()  # of the traced operations the compiler leaves out those that nobody wants
    trained = [tensor for tensor in trained if tensor.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return _Readable(like, compute)
    stands: Tensor = _Connected.apply(like, compute, *trained)
    return stands


class _Readable(Tensor):
    """A tensor without storage: every operation but questions of shape and kind runs on the computed values."""

    _compute: Callable[[], Tensor]
    _kept: dict[bool, Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, compute: Callable[[], Tensor]) -> _Readable:
        made: _Readable = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        made._compute, made._kept = compute, {}
        return made

    def values(self) -> Tensor:
        """The weight, kept as long as this tensor is: a kernel may be given its address."""
        recorded = torch.is_grad_enabled()
        if recorded not in self._kept:
            self._kept[recorded] = self._compute()
        return self._kept[recorded]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if _writes(func) and isinstance(given[0], _Readable):
            if func in _MARKS and any(each is False for each in given):
                return given[0]  # it follows from what is trained, and the base is frozen
            raise RuntimeError(
                "layer.weight of an adapted layer is computed and cannot be changed; change "
                "layer.get_base_layer().weight"
            )
        if func == _DATA.__get__:
            return _Readable(args[0], args[0].values)  # not the values: what is written there would be lost
        args, kwargs = tree_map_only(_Readable, _Readable.values, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Called from C++, behind autograd.
        args, kwargs = tree_map_only(_Readable, _Readable.values, (args, kwargs or {}))
        return func(*args, **kwargs)


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


class _Connected(torch.autograd.Function):
    """For a custom autograd function that takes the weight: its gradient goes on to the trained tensors."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, compute: Callable[[], Tensor], *trained: Tensor) -> Tensor:
        ctx.compute, ctx.trained = compute, trained
        return _Readable(like, compute)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            weight = ctx.compute()
        return None, None, *torch.autograd.grad(weight, ctx.trained, outer[0], allow_unused=True)
