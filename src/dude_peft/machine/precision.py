"""Products of float32 in TF32 or not: a switch of the process, which a run leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def precision_kept() -> Iterator[None]:
    """After the block: TF32 as it was, whatever the Trainer has set within (`train.tf32`)."""
    import torch

    backends: Any = torch.backends
    before = backends.fp32_precision
    try:
        yield
    finally:
        backends.fp32_precision = before
