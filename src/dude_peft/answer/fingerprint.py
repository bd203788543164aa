"""What a model in memory is: hashes of every tensor of it, adapter included, and of what else it computes by."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from importlib import metadata
from typing import Any

import torch
import xxhash
from torch import Tensor

from dude_peft.artifact.base_settings import ABOUT_FILES
from dude_peft.artifact.fingerprint import xxh3_of
from dude_peft.data.tokenizer_parts import tokenizer_parts
from dude_peft.machine.environment import versions
from dude_peft.measure.score import end_of_turn_ids
from dude_peft.tuner.frozen import plain_parts
from dude_peft.tuner.offloaded import stored

_PACKAGES = ("torch", "transformers", "peft", "dude_peft")
"""Whose code goes by their versions."""
_BROUGHT_ALONG = "transformers_modules."
"""Begins the names that transformers gives to modules of a model's own."""


KERNELS = "dude_kernels"
"""Attribute of a model whose layers compute with other kernels than transformers': which they are, in words."""


def answering_parts(model: Any, tokenizer: Any) -> list[Any]:
    """All of a model and where it runs that decides what it answers, to hash."""
    return [
        model_fingerprint(model),
        config_fingerprint(model),
        tokenizer_fingerprint(tokenizer),
        sorted(end_of_turn_ids(model, tokenizer)),
        [str(model.dtype), model.device.type, torch.backends.cuda.matmul.fp32_precision],
        {**versions(), "tokenizers": metadata.version("tokenizers")},
        own_code(model),
        *([kernels] if (kernels := getattr(model, KERNELS, None)) else []),
    ]


def own_code(model: Any) -> dict[str, str]:
    """sha256 of each Python module that a model's classes are from, or that lies beside one, by its name.

    A model may bring its code along (`trust_remote_code`): other code under the same names is another model.
    """
    names = {type(each).__module__ for each in model.modules()}
    others = {name for name in names if name.partition(".")[0] not in _PACKAGES}
    places = tuple(f"{name.rpartition('.')[0]}." for name in others if name.startswith(_BROUGHT_ALONG))
    beside = {name for name in sys.modules if name.startswith(places)}
    return {name: hashlib.sha256(_source(name).encode()).hexdigest() for name in sorted(others | beside)}


def _source(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (OSError, TypeError, KeyError):  # made in memory, or compiled
        return ""


def model_fingerprint(model: Any) -> str:
    """Hexadecimal XXH3 (128 bits) of names, shapes, dtypes and values of all that a model computes with.

    These are parameters, buffers, and what a quantised layer keeps beside its codes: the scales alone tell a weight
    from its double.
    """
    digest = xxhash.xxh3_128()
    kept = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    tensors = {**kept, **dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:  # between forwards an offloaded weight is elsewhere
            place, _, last = name.rpartition(".")
            tensor = stored(model.get_submodule(place), last)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {xxh3_of(plain_parts(tensor))}\n".encode())
    return str(digest.hexdigest())


def config_fingerprint(model: Any) -> str:
    """Hexadecimal XXH3 (128 bits) of the configs of model and adapter, and of the attention that runs."""
    adapter = getattr(model, "active_peft_config", None)
    configs = [model.config.to_dict(), {} if adapter is None else adapter.to_dict()]
    known = [{key: value for key, value in config.items() if key not in ABOUT_FILES} for config in configs]
    attention = getattr(model.config, "_attn_implementation", None)
    text = json.dumps([*known, attention], sort_keys=True, default=_plain)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hexadecimal XXH3 (128 bits) of every part of a tokenizer, its template and its largest length."""
    text = json.dumps([tokenizer_parts(tokenizer), tokenizer.model_max_length], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))
