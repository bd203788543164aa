"""Counts the bytes of every storage that lives, and the products that are taken, while a piece of a step runs."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_aten: Any = torch.ops.aten
# Operators that torch's own table of formulas lacks, and the one that does the same work.
_SAME_WORK = {
    _aten.addmm_: _aten.addmm,
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}
# Kernels of CUDA that need another tensor of the first argument's size while they run: gradient times output, here.
_BESIDE_ON_CUDA = {_aten._softmax_backward_data}


class Stretch(NamedTuple):
    """What a part of a step does to the memory, in bytes relative to its beginning."""

    net: int
    """What it leaves behind, less what it frees; without gradients of parameters."""
    peak: int
    """The most that lives within it."""
    gradients: int
    """Bytes of parameters' gradients that it leaves."""
    flops: int
    """Floating-point operations of its matrix products."""


NOTHING = Stretch(0, 0, 0, 0)


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Floating-point operations of one call of an operator: those of matrix products and attention, 0 for others."""
    packet = func._overloadpacket
    formula: Any = flop_registry.get(_SAME_WORK.get(packet, packet))
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within: counts all storages made inside, real or fake, while they live.

    `now` and `peak` are in bytes; what was there before is not counted. Views and in-place results cost nothing.

    Args:
        trained: parameters whose gradients `stretch` tells apart.
        gpu: count what kernels of CUDA take beside that, too.
    """

    def __init__(self, trained: list[torch.nn.Parameter], *, gpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._known: set[int] = set()
        self._trained, self._gpu = trained, gpu
        self._start = (0, 0)  # live bytes without gradients, and gradients

    def stretch(self) -> Stretch:
        """What happened since the call before, or since the beginning."""
        gradients = sum(p.grad.untyped_storage().nbytes() for p in self._trained if p.grad is not None)
        before, had = self._start
        live = self.now - gradients
        result = Stretch(live - before, self.peak - before - had, gradients - had, self.flops)
        self._start = (live, gradients)
        self.peak, self.flops = self.now, 0
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls on fake tensors
            return func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), given)
        if self._gpu and func._overloadpacket in _BESIDE_ON_CUDA:
            self.peak = max(self.peak, self.now + args[0].nbytes)
        self.flops += flops_of(func, args, kwargs or {}, result)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
