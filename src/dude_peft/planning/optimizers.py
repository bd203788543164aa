"""What an optimizer keeps and what its step needs for a moment, in bytes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_STEP_BYTES = 4  # of each parameter, float32: AdamW's count of steps, Adafactor's size of the parameter
_SMALLEST_8BIT, _BLOCK = 4096, 256  # bitsandbytes: smaller tensors stay float32, larger ones have a scale a block


def state_bytes(optim: str, parameters: Sequence[Tensor]) -> int:
    """Bytes that the optimizer keeps between steps.

    Args:
        optim: as `train.optim`.
        parameters: what is trained; only shapes and dtypes are used.
    """
    return sum(_state_of(optim, parameter) for parameter in parameters)


def step_bytes(optim: str, parameters: Sequence[Tensor], *, gpu: bool) -> int:
    """Bytes that live for a moment within a step, beside parameters, gradients and states.

    On a GPU `adamw_torch` takes all parameters at once (torch's foreach form) and needs one more copy of them; on a CPU
    optimizers take one after the other.
    """
    if not parameters:
        return 0
    largest = max(parameter.nbytes for parameter in parameters)
    if optim == "adamw_torch":
        return sum(parameter.nbytes for parameter in parameters) if gpu else 2 * largest
    return 3 * largest if optim == "adafactor" else 0


_NUMBERS_KEPT = {"adamw": 2, "lion": 1, "ademamix": 3}


def _state_of(optim: str, parameter: Tensor) -> int:
    numbers = parameter.numel()
    if optim in ("adamw_torch", "adamw_torch_fused"):
        return 2 * parameter.nbytes + _STEP_BYTES
    if optim in ("adagrad", "rmsprop"):
        return parameter.nbytes + _STEP_BYTES
    if optim == "adafactor":
        shape = parameter.shape
        second = numbers // shape[-1] + numbers // shape[-2] if len(shape) >= 2 else numbers
        return 4 * second + _STEP_BYTES
    if optim == "sgd":  # without momentum
        return 0
    name, _, bits = optim.removeprefix("paged_").partition("_")  # bitsandbytes'
    kept = _NUMBERS_KEPT[name]
    if bits == "8bit" and numbers >= _SMALLEST_8BIT:
        return kept * (numbers + 4 * -(-numbers // _BLOCK))
    return 4 * kept * numbers
