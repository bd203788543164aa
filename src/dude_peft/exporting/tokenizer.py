"""The tokenizer that an adapter was trained with, beside the base model's of today."""

from __future__ import annotations

from pathlib import Path

from dude_peft.config.schema import ModelSection
from dude_peft.data.tokenizer_parts import changed_parts, tokenizer_parts

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
    from dude_peft.model.load import load_tokenizer

    ours, theirs = (
        tokenizer_parts(load_tokenizer(ModelSection(name_or_path=str(folder)), str(folder.absolute())))
        for folder in (adapter, base)
    )
    return ", ".join(changed_parts(ours, theirs)) or None
