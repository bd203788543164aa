"""How the process computes: products in TF32 or not, deterministic algorithms or not. A run leaves it as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What transformers' enable_full_determinism writes for good (`full_determinism` of train.extra_arguments).
_VARIABLES = (
    "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
    "FLASH_ATTENTION_DETERMINISTIC",
)  # fmt: skip


@contextmanager
def precision_kept() -> Iterator[None]:
    """After the block: TF32 and determinism as they were, whatever the Trainer has set within."""
    import torch

    backends: Any = torch.backends
    tf32, cudnn = backends.fp32_precision, (backends.cudnn.deterministic, backends.cudnn.benchmark)
    strict = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        backends.fp32_precision = tf32
        backends.cudnn.deterministic, backends.cudnn.benchmark = cudnn
        torch.use_deterministic_algorithms(strict, warn_only=only_warned)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
