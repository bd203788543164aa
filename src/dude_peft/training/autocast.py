"""Forwards outside of training that compute as those within: under autocast, where a run has it (`train.bf16`, `fp16`).

accelerate wraps the model when training begins. What is measured before has to be measured in the same precision: else
rounding would stand in the difference between before and after.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dude_peft.config.schema import TrainSection


@contextmanager
def as_in_training(model: Any, section: TrainSection) -> Iterator[None]:
    """Within: forwards of a model that accelerate has not wrapped yet compute as they will, with float32 outputs."""
    if not section.autocasts:
        yield
        return
    from accelerate.utils.operations import convert_outputs_to_fp32

    own, forward = vars(model).get("forward"), model.forward
    dtype = torch.bfloat16 if section.bf16 else torch.float16
    model.forward = convert_outputs_to_fp32(torch.autocast(model.device.type, dtype)(forward))
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own
