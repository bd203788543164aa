"""What of a model's configuration decides what the model computes, for telling one base model from another.

Whatever is not known to be beside the point counts. Left out are: where the files are and what wrote them, in which
dtype and by which kernels the model runs, what its outputs hold beside the logits, numbers of generation and of
initialisation, names of labels, and sizes and ties, which the tensors tell. A setting that only one side has comes from
another version of transformers, or from a file that carries more than the model reads, and tells nothing: a key that
the class of the configuration does not know is read by nobody but the model's own code. There are two exceptions: keys
that transformers looks for in every configuration, and inside a group of settings (how positions are rotated, say) any
key, under one version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from dude_peft.show import shown

ABOUT_FILES = {"_name_or_path", "name_or_path", "transformers_version", "base_model_name_or_path", "revision"}
"""Where a model lies and what wrote it: no part of what it computes."""
_BESIDE_THE_POINT = {
    *ABOUT_FILES, "architectures", "auto_map", "torch_dtype", "dtype", "quantization_config",
    "attn_implementation", "experts_implementation", "use_cache", "gradient_checkpointing", "chunk_size_feed_forward",
    "return_dict", "use_return_dict", "torchscript", "output_attentions", "output_hidden_states",
    "output_router_logits", "router_aux_loss_coef", "problem_type", "id2label", "label2id", "num_labels", "vocab_size",
    "tie_word_embeddings",
    "task_specific_params", "tokenizer_class", "prefix", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "cls_token_id",
    "mask_token_id", "unk_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "max_length", "initializer_range", "initializer_factor", "initializer_std", "rescale_every",
}  # fmt: skip
_READ_OF_ALL = {"is_causal": True}
"""What transformers' shared code reads of any configuration, declared or not -> what it takes where it is missing."""
_VERSION = "transformers_version"
PADDING = "pad_token_id"
_FLOAT32 = 1e-7  # what a number loses on its way through a GGUF file


def base_settings(config: Any, *, scores: bool = False) -> dict[str, Any] | None:
    """The settings of a model that decide what it computes, as plain JSON; None of a model without transformers' own.

    Args:
        config: of the model; with `to_dict`, as transformers' are.
        scores: the model reads a score at a row's last token that is not the padding token, which counts then, too.
    """
    if not hasattr(config, "to_dict"):
        return None
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    padding = {PADDING: config.get_text_config().pad_token_id} if scores else {}
    return {**_that_count(plain), **padding, _VERSION: plain.get(_VERSION)}


def other_settings(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which settings two models differ: `rope_parameters.rope_theta: 10000.0, here 10.0` of each."""
    same_version = recorded.get(_VERSION) == now.get(_VERSION)
    return [
        f"{shown(name)}: {shown(before)}, here {shown(here)}"
        for name, before, here in _differences(recorded, now, "", same_version)
        if name != _VERSION
    ]


def _that_count(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _that_count(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _BESIDE_THE_POINT and not name.startswith("_")
    }


def _differences(
    before: dict[str, Any], here: dict[str, Any], place: str, same_version: bool
) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({**before, **here}):
        one, other = (side.get(name, _READ_OF_ALL.get(name)) for side in (before, here))
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{place}{name}.", same_version)
            continue
        known = (name in before and name in here) or name in _READ_OF_ALL or (bool(place) and same_version)
        if known and not _same(one, other):
            yield f"{place}{name}", one, other


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return one == other or math.isclose(one, other, rel_tol=_FLOAT32) or (one != one and other != other)
    return bool(one == other)
