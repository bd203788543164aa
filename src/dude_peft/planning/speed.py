"""The speed of this device's matrix products, which bounds how fast a step can be."""

from __future__ import annotations

import time

import torch

_SIZE = {"cpu": 1024}
_GPU_SIZE = 8192
_SECONDS = 0.3


def products_per_second(dtype: torch.dtype) -> float:
    """Floating-point operations a second of square products in `dtype`, best of those done in a third of a second."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = kind or torch.device("cpu")
    size = _SIZE.get(device.type, _GPU_SIZE)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + _SECONDS
    a @ b  # the first one sets libraries up
    while True:
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
