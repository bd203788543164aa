"""What a step has to do, counted: the operations of its matrix products, and the bytes that its operators touch.

The ratio of two counts bounds the ratio of two times from below, as long as neither step wastes any: where products
decide, that of the operations, where memory does, that of the bytes. Fused kernels of a GPU are no operators, so
counts are those of the plain path. Where a step stays above its bound, `spent` shows in what.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dude_peft.planning.live_bytes import flops_of


class Work(TorchDispatchMode):
    """Within: counts `flops`, and `bytes`, the tensors that every operator reads and those that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts one call."""
        result = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, result)
        if not func.is_view:
            self.bytes += _bytes((args, kwargs)) + _bytes(result)
        return result


def counted(cases: dict[str, Callable[[], Any]], baseline: str) -> dict[str, dict[str, float]]:
    """Of every case one run, counted: name -> flops and bytes, and both over the baseline's.

    The first run is not counted, for it makes what later ones keep.
    """
    found = {}
    for name, case in cases.items():
        case()
        with Work() as work:
            case()
        found[name] = work
    base = found[baseline]
    return {
        name: {
            "flops": work.flops,
            "bytes": work.bytes,
            "flops_ratio": work.flops / base.flops,
            "bytes_ratio": work.bytes / base.bytes,
        }
        for name, work in found.items()
    }


def _bytes(values: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_iter(values) if isinstance(leaf, torch.Tensor))


_KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash"),
    "optimizer": ("aten::_fused_", "aten::_foreach_"),
}

_OTHERS = "elementwise and sums"


def spent(cases: dict[str, Callable[[], Any]], baseline: str, rounds: int) -> dict[str, dict[str, float]]:
    """Of every case the time of a run by kind of work, over the whole of the baseline's run.

    `elementwise and sums` are all operators that are no products; `between` is Python, autograd, and the profiler.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                begun = time.perf_counter()
                case()
                whole = time.perf_counter() - begun
            parts = dict.fromkeys([*_KINDS, _OTHERS], 0.0)
            for event in profiled.key_averages():
                if not event.key.startswith("aten::"):  # a function of Python's, or of autograd
                    continue
                kinds = (kind for kind, names in _KINDS.items() if event.key.startswith(names))
                parts[next(kinds, _OTHERS)] += event.self_cpu_time_total / 1e6
            parts["between"] = whole - sum(parts.values())
            for kind, seconds in {**parts, "all": whole}.items():
                found[name][kind] = found[name].get(kind, 0.0) + seconds
    base = found[baseline]["all"]
    return {name: {kind: seconds / base for kind, seconds in parts.items()} for name, parts in found.items()}
