"""What a model makes of each token: logits over its vocabulary; of a model that scores, what its head reads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def is_scorer(model: Any) -> bool:
    """Whether a model, adapted or not, gives a conversation one number, and writes nothing."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()


def of_each_token(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """(rows, tokens, features): logits, or the last hidden states of a model that scores."""
    if not is_scorer(model):
        logits: Tensor = model(**batch, use_cache=False).logits
        return logits
    states: Tensor = model(**batch, use_cache=False, output_hidden_states=True).hidden_states[-1]
    return states


def can_keep_few(model: Any) -> bool:
    """Whether a model can leave out the logits of its first tokens."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(plain.forward).parameters


def kept_logits(inputs: Mapping[str, Any]) -> dict[str, int]:
    """The argument by which a model computes no logits in front of the labels, where these are fewer than the ids."""
    kept: int = inputs["labels"].shape[1]
    return {"logits_to_keep": kept} if kept < inputs["input_ids"].shape[1] else {}


def scores_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """(rows,): the reward of each conversation; `batch` holds no labels.

    Where a row is padded, its last token that is not the padding token is read (transformers' rule), whatever the mask.
    """
    logits: Tensor = model(**batch, use_cache=False).logits
    return logits.squeeze(-1)


def with_scores(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """`of_each_token`; of a model that scores, with the row's reward behind the states of each token."""
    if not is_scorer(model):
        return of_each_token(model, batch)
    found = model(**batch, use_cache=False, output_hidden_states=True)
    states: Tensor = found.hidden_states[-1]
    return torch.cat([states, found.logits[:, None, :].expand(-1, states.shape[1], -1).to(states.dtype)], dim=-1)
