"""The tokenizer that an adapter was trained with, beside the base model's of today."""

from __future__ import annotations

from pathlib import Path

from dude_peft.data.tokenizer_parts import tokenizer_parts

_CONFIG = "tokenizer_config.json"


def tokenizer_change(adapter: Path, base: Path) -> str | None:
    """In what the adapter's own tokenizer and the base's differ; None where they do not, or one of them is absent.

    Args:
        adapter: its folder, which holds the tokenizer of its training if `dude train` wrote it.
        base: folder of the base model.
    """
    if not all((folder / _CONFIG).is_file() for folder in (adapter, base)):
        return None
    from transformers import AutoTokenizer

    ours, theirs = (
        tokenizer_parts(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)) for folder in (adapter, base)
    )
    return ", ".join(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)) or None
