"""The tokenizer that an adapter was trained with, beside the base model's of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dude_peft.train.config import ModelSection

_CONFIG = "tokenizer_config.json"


def tokenizer_change(adapter: Path, base: Path) -> str | None:
    """In what the adapter's own tokenizer and the base's differ; None where they do not, or one of them is absent.

    Args:
        adapter: its folder, which holds the tokenizer of its training if `dude train` wrote it.
        base: folder of the base model.

    Raises:
        ConfigError: one of them cannot be loaded.
    """
    if not all((folder / _CONFIG).is_file() for folder in (adapter, base)):
        return None
    from dude_peft.train.model import load_tokenizer

    ours, theirs = (
        load_tokenizer(ModelSection(name_or_path=str(folder)), str(folder.absolute())) for folder in (adapter, base)
    )
    read: dict[str, Any] = {
        "vocabulary": lambda tokenizer: tokenizer.get_vocab(),
        "chat template": lambda tokenizer: tokenizer.chat_template,
        "end token": lambda tokenizer: tokenizer.eos_token,
        "first token": lambda tokenizer: tokenizer.bos_token,
    }
    changed = [what for what, of in read.items() if of(ours) != of(theirs)]
    return ", ".join(changed) or None
