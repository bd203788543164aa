"""What a step has to do, counted: the operations of its matrix products, and the bytes that its operators touch.

The ratio of two counts bounds the ratio of two times from below, as long as neither step wastes any: where products
decide, that of the operations, where memory does, that of the bytes. Fused kernels of a GPU are no operators, so
counts are those of the plain path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
