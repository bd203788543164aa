"""A batch with images in a dry step: its numbers are known, so that the vision tower can be run without weights.

How many patches a tower reads, and where their features go among the tokens, stands in the numbers of a batch: ids,
grids, masks, and pixels that only fill a place. Whatever is computed from these alone is computed; what meets a weight
is a shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dude_peft.data.batches import Example, head, pad_right

_aten: Any = torch.ops.aten
# Makers of numbers. Other new tensors of fractions are places for what is computed from weights.
_COUNTING = {_aten.arange, _aten.linspace, _aten.scalar_tensor}


def seen_batch(example: Example, rows: int, length: int) -> dict[str, Tensor]:
    """A batch that repeats an example with images, as the run's collator makes it, on the CPU.

    Args:
        example: with `shown`.
        rows: of the batch.
        length: tokens of a row; more where an image would be cut.
    """
    cut = head(example, length)
    length = max(length, len(cut["input_ids"]))
    ends = cut["input_ids"][-1]  # any token that stands for no image
    one = pad_right([cut], ends, length)
    batch = {name: tensor.repeat(rows, *[1] * (tensor.dim() - 1)) for name, tensor in one.items()}
    if rows > 1:  # batches of several rows are padded, and their attention has a mask
        batch["attention_mask"][-1, -1] = 0
    return batch


def known() -> TorchDispatchMode:
    """Within, inside of FakeTensorMode: operators whose tensors are all real are real."""
    return _Known()  # type: ignore[no-untyped-call]


class _Known(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            return _picked(*args) if func is _aten.index.Tensor else func(*args, **kwargs)
        if not given and func._overloadpacket not in _COUNTING:
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor) or found.is_floating_point():
                return found
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _picked(values: Tensor, places: list[Tensor | None]) -> Tensor:
    """values[places]; where a mask says how many, it is counted without a table of their places."""
    mask = places[0] if len(places) == 1 else None
    if mask is None or mask.dtype != torch.bool or isinstance(mask, FakeTensor):
        return _aten.index.Tensor(values, places)  # type: ignore[no-any-return]
    with unset_fake_temporarily():
        once = mask[tuple(slice(0, 1) if step == 0 else slice(None) for step in mask.stride())]
        count = int(once.sum()) * (mask.numel() // max(once.numel(), 1))
    return values.new_empty(count, *values.shape[mask.dim() :])
