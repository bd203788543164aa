"""What a model in memory is: a hash of every tensor of it, adapter included."""

from __future__ import annotations

from typing import Any

import xxhash

from dude_peft.artifact.fingerprint import xxh3_of


def model_fingerprint(model: Any) -> str:
    """Hexadecimal XXH3 (128 bits) of names, shapes, dtypes and values of all parameters and buffers."""
    digest = xxhash.xxh3_128()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {xxh3_of([tensor])}\n".encode())
    return str(digest.hexdigest())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hexadecimal XXH3 (128 bits) of vocabulary, added tokens, template and merging rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    text = f"{rules}\n{tokenizer.special_tokens_map}\n{tokenizer.chat_template}"
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "backslashreplace"))
