"""What a model in memory is: hashes of every tensor of it, adapter included, and of what else it computes by."""

from __future__ import annotations

import json
from typing import Any

import xxhash

from dude_peft.artifact.fingerprint import xxh3_of

# Where a model lies and what wrote it: no part of what it computes.
_ABOUT_FILES = {"_name_or_path", "name_or_path", "transformers_version", "base_model_name_or_path", "revision"}


def model_fingerprint(model: Any) -> str:
    """Hexadecimal XXH3 (128 bits) of names, shapes, dtypes and values of all parameters and buffers."""
    digest = xxhash.xxh3_128()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {xxh3_of([tensor])}\n".encode())
    return str(digest.hexdigest())


def config_fingerprint(model: Any) -> str:
    """Hexadecimal XXH3 (128 bits) of the configs of model and adapter, and of the attention that runs."""
    adapter = getattr(model, "active_peft_config", None)
    configs = [model.config.to_dict(), {} if adapter is None else adapter.to_dict()]
    known = [{key: value for key, value in config.items() if key not in _ABOUT_FILES} for config in configs]
    attention = getattr(model.config, "_attn_implementation", None)
    text = json.dumps([*known, attention], sort_keys=True, default=_plain)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hexadecimal XXH3 (128 bits) of vocabulary, added tokens, template, merging rules and largest length."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    text = f"{rules}\n{tokenizer.special_tokens_map}\n{tokenizer.chat_template}\n{tokenizer.model_max_length}"
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "backslashreplace"))
