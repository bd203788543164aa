"""Whether a model can tell the token that ends an answer from others: it may never have been trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dude_peft.data.labels import IGNORE
from dude_peft.show import shown
from dude_peft.tuner.offloaded import held

_ROWS, _CHUNK = 16, 8192
_SAME = 1e-2
"""Two rows of the output layer that differ by less, relative to their length, get the same logit all the time."""


@torch.no_grad()
def end_token_warning(model: Any, examples: Sequence[Mapping[str, Sequence[int]]], tokenizer: Any) -> str | None:
    """What to say where the frozen output row of an end token is the row of other tokens as well.

    All of them get the same logit z = w h whatever the adapter makes of h, so an answer ends by luck.

    Args:
        model: adapted; its output layer's rows w are (vocabulary, hidden).
        examples: tokenised, with labels; the last label of each is its end.
        tokenizer: knows the special tokens.
    """
    head = model.get_output_embeddings()
    weight = held(head, "weight") if type(head) is nn.Linear else None
    if weight is None or weight.requires_grad or weight.is_meta:
        return None  # trained, packed or sharded
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ends = {_last(examples[row]["labels"]) for row in range(min(_ROWS, len(examples)))} & special
    for end in sorted(end for end in ends if end is not None):
        if (others := _same_rows(weight, end)) > 0:
            token = shown(tokenizer.convert_ids_to_tokens(end))
            return (
                f"answers may not end: the model was never trained on {token}; its output row equals those of "
                f"{others:,} other tokens, and stays frozen; take a model that knows its end token, "
                "as an instruct model does"
            )
    return None


def _last(labels: Sequence[int]) -> int | None:
    return next((label for label in reversed(labels) if label != IGNORE), None)


def _same_rows(weight: Tensor, token: int) -> int:
    """How many other rows are the token's."""
    row = weight[token].float()
    parts = (weight[start : start + _CHUNK].float() for start in range(0, len(weight), _CHUNK))
    apart = torch.cat([torch.linalg.vector_norm(part - row, dim=1) for part in parts])
    return int((apart <= _SAME * torch.linalg.vector_norm(row)).sum()) - 1
