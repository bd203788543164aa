"""The Hugging Face hub as this machine sees it: the cache, and whether it can be reached. No token is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from dude_peft.model.load import hub_reachable


@dataclass(frozen=True)
class Hub:
    """State of the hub."""

    cache: str
    writable: bool
    """Whether models can be stored in the cache."""
    offline: bool
    """Whether HF_HUB_OFFLINE asks not to reach for the hub."""
    reachable: bool


def hub() -> Hub:
    """Looks at the cache, and opens one connection unless told to stay offline."""
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.absolute().parents) if path.is_dir())
    return Hub(str(cache), os.access(there, os.W_OK), bool(constants.HF_HUB_OFFLINE), hub_reachable())
