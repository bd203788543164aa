"""Several examples in one row of a batch, without padding: which belong together, and which models allow it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dude_peft.data.seeded import shuffled
from dude_peft.data.trial import text_ids, traceless, trial_length, trial_rows
from dude_peft.errors import ConfigError

_TRIFLE = 0.05


def pack(lengths: Sequence[int] | NDArray[np.int64], capacity: int, seed: int) -> list[list[int]]:
    """Indices of the examples of each pack: all examples once, no pack longer than `capacity` tokens.

    Best fit, longest first: each goes into the fullest pack that has room for it, O(n log n). The seed decides which of
    several examples of one length goes where, and the order of packs.

    Raises ConfigError for an example longer than `capacity`.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise ConfigError(
            f"an example of {sizes.max()} tokens does not fit into a pack of {capacity}; raise max_length"
        )
    order = shuffled(len(sizes), seed)
    order = order[np.argsort(-sizes[order], kind="stable")]
    packs: list[list[int]] = []
    rooms: list[int] = []  # the different amounts of free room, ascending
    having: dict[int, list[int]] = {}  # packs with that much room
    for example, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            number, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            number = having[room].pop()
            if not having[room]:
                del rooms[at], having[room]
        packs[number].append(example)
        left = room - length
        if left not in having:
            having[left] = []
            bisect.insort(rooms, left)
        having[left].append(number)
    return [packs[number] for number in shuffled(len(packs), seed, stream=1).tolist()]


def packs_apart(model: Any) -> bool:
    """Whether a causal model treats examples laid end to end (`batches.flat`) as if each were alone; one tiny forward.

    transformers separates them by position ids that begin again, where the model's attention reads them so. A model
    with a recurrent state or a convolution mixes them, one that counts its positions itself shifts them, one that is
    not causal sees the next one. Measured: the second of two examples must have the logits that it has alone, up to the
    rounding that another shape of the same computation brings, and far below what another first one would do to it in
    a plain text. That rounding is taken from a longer text, whose end must be as far below.
    """
    with traceless(model):
        try:
            return _measured_apart(model)
        except TypeError:  # forward takes no position_ids
            return False


def _measured_apart(model: Any) -> bool:
    first, second, third = trial_rows(text_ids(model), 3, trial_length(model))
    count = len(second)
    alone = _logits(model, second)
    packed = _logits(model, first + second, [*range(count), *range(count)])[count:]
    followed = _logits(model, second + third)[:count]
    behind_first, behind_third = (_logits(model, before + second)[count:] for before in (first, third))
    error, rounding = (float((other - alone).abs().max()) for other in (packed, followed))
    leak = float((behind_first - behind_third).abs().max())
    size = float(alone.abs().max())
    near = error <= 8 * rounding + 4 * torch.finfo(model.dtype).eps * size
    return near and max(error, rounding) < _TRIFLE * leak


def _logits(model: Any, ids: list[int], positions: list[int] | None = None) -> Tensor:
    """(tokens, vocabulary), float32."""
    rows = {"input_ids": ids, "position_ids": [*range(len(ids))] if positions is None else positions}
    batch = {name: torch.tensor([row], device=model.device) for name, row in rows.items()}
    logits: Tensor = model(**batch, use_cache=False).logits[0].float()
    return logits
