"""When trained tensors may have changed: a count of the optimizer steps taken in this process.

The row norm changes with the deviations, which change in an optimizer step. `Tensor._version` cannot tell: fused AdamW,
the Trainer's default, does not raise it. torch's hook behind every optimizer's step does, whatever the optimizer. Other
optimizers than the adapter's own are counted too; that costs a norm and is never wrong.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

# A tensor, not an int: a compiled optimizer step raises it without being compiled anew for every value.
_STEPS = torch.zeros((), dtype=torch.int64)


def _count(*_: object) -> None:
    _STEPS.add_(1)


register_optimizer_step_post_hook(_count)


def steps_taken() -> int:
    """Optimizer steps taken in this process so far."""
    return int(_STEPS)
