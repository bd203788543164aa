"""float16: its autocast and the scaler of its gradients (`train.fp16`), and steps that overflow.

float16 ends at 65504 above and 6e-8 below. The scaler multiplies the loss, so that gradients do not vanish, and divides
the gradients before a step. Where they overflowed it takes no step, and halves its factor: that is no fault of the run.
"""

from __future__ import annotations

from typing import Any

import torch

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError, NumericsError

_MOST_SKIPPED = 30
"""Steps in a row. From 65536, the scaler's first factor, halving so often ends far below what helps."""


def check_half(config: RunConfig, strategy: str, processes: int) -> None:
    """Refuses float16 autocast where it does not work.

    Args:
        config: of the run.
        strategy: of several processes.
        processes: of the run.

    Raises:
        ConfigError: there is no GPU that computes the run, or a setting that no scaler works with.
    """
    if not config.train.fp16:
        return
    if config.model.is_on_cpu or not torch.accelerator.is_available():
        raise ConfigError("train.fp16 needs a GPU: CPUs have float16 autocast only in part; set train.bf16: true")
    if strategy != "ddp" and processes > 1:
        raise ConfigError(
            f"train.fp16: the scaler sees one share of the gradients under {strategy}; set train.bf16: true"
        )


class Skips:
    """The steps in a row that the scaler of a run skipped."""

    def __init__(self) -> None:
        self.count = 0

    def skipped(self, scaler: Any, step: int) -> str:
        """Notes a step whose gradient overflowed, and says so.

        Raises:
            NumericsError: there were so many in a row that no factor will help.
        """
        self.count += 1
        if self.count > _MOST_SKIPPED:
            raise NumericsError(
                f"the gradient overflowed float16 in {self.count} steps in a row, up to step {step}; lower "
                "train.learning_rate, or set train.bf16: true instead of train.fp16"
            )
        return f"step {step}: the gradient overflows float16 at scale {scaler.get_scale():g}; the step is skipped"

    def state(self, scaler: Any) -> dict[str, Any]:
        """What a checkpoint keeps of both."""
        return {"skipped": self.count, **scaler.state_dict()}

    def take_up(self, scaler: Any, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.count = int(state["skipped"])
        scaler.load_state_dict({name: value for name, value in state.items() if name != "skipped"})


def half_warning(dtype: torch.dtype, *, scaled: bool) -> str | None:
    """What to say of a base in float16 whose gradients nothing scales."""
    if dtype != torch.float16 or scaled:
        return None
    return (
        "the base model is in float16, in which small gradients become 0; set model.dtype: bfloat16 or float32, or "
        "train.fp16: true on a GPU"
    )
