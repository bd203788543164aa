"""What of a tokenizer decides how text becomes tokens, part by part: to hash it, and to say in what two differ."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMES = {
    "vocab": "vocabulary", "merges": "merges", "normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer",
    "post_processor": "post-processor", "decoder": "decoder", "added_tokens": "added tokens", "model": "model",
}  # fmt: skip
_OF_THE_LAST_CALL = ("truncation", "padding")  # left behind by it, whatever it asked for


def tokenizer_parts(tokenizer: Any) -> dict[str, str]:
    """sha256 of each part of a tokenizer, by its name: vocabulary, merges, normalizer, chat template..."""
    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special tokens": tokenizer.special_tokens_map,
        "splitting of special tokens": getattr(tokenizer, "split_special_tokens", False),
        "chat template": tokenizer.chat_template,
    }
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        model = state.pop("model")
        for name in ("vocab", "merges"):
            parts[_NAMES[name]] = model.pop(name, None)
        parts["model"] = model
        parts |= {_NAMES.get(name, name): value for name, value in state.items() if name not in _OF_THE_LAST_CALL}
    else:
        parts["vocabulary"] = tokenizer.get_vocab()
        parts["added tokens"] = tokenizer.get_added_vocab()
        parts["files"] = _files(tokenizer)
    return {name: _sha256(value) for name, value in parts.items()}


def changed_parts(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of the parts in which two tokenizers differ."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _files(tokenizer: Any) -> dict[str, str]:
    """Of a tokenizer in Python, whose rules are in files of its own kind."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(path) for path in tokenizer.save_pretrained(folder)]
        saved = [path for path in paths if path.is_file() and path.suffix != ".json"]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("ascii")).hexdigest()
