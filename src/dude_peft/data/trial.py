"""Short rows on which a model is tried before it is trusted with real ones, and trying that leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LENGTH = 12
_SPARE_POSITIONS = 4  # some models count positions from 2 on


@contextmanager
def traceless(model: Any) -> Iterator[None]:
    """Within: evaluation mode, no gradient. After: every module's mode and every random number generator as before."""
    modes = [(module, module.training) for module in model.modules()]
    python, numbers = random.getstate(), np.random.get_state(legacy=True)
    device = torch.device(model.device)
    devices = [] if device.type == "cpu" else [device]
    try:
        # no_grad, not inference_mode: what a first forward keeps in the model, training will read.
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        for module, training in modes:
            module.training = training


def trial_length(model: Any) -> int:
    """Tokens of a short row; two of them fit into the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return _LENGTH if positions is None else max(2, min(_LENGTH, (positions - _SPARE_POSITIONS) // 2))


def text_ids(model: Any) -> list[int]:
    """Ids of the vocabulary that stand for text; those that the configuration names (images, padding) do not."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    special = set(_named_tokens(model.config.to_dict()))
    return [token for token in range(vocabulary) if token not in special] or list(range(vocabulary))


def trial_rows(ids: Sequence[int], rows: int, length: int) -> list[list[int]]:
    """Rows of `ids`, spread over all of them and all different."""
    count = len(ids)
    spread = [ids[int(place * 0.61803 * count) % count] for place in range(1, rows * length + 1)]
    return [spread[start : start + length] for start in range(0, len(spread), length)]


def distance(some: Tensor, others: Tensor) -> Tensor:
    """Mean of |some - others| over the vocabulary, which is the last dimension; equal infinities are no distance."""
    return torch.where(some == others, 0.0, (some - others).abs()).mean(-1)


def _named_tokens(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _named_tokens(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            found = value if isinstance(value, list) else [value]
            yield from (token for token in found if isinstance(token, int))
