"""The pretrained model inside an adapted one, for a moment, in the middle of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from dude_peft.parents import require

require(BaseTunerLayer, "_disable_adapters")
require(AuxiliaryTrainingWrapper, "_disable_adapters")


@contextmanager
def as_base(model: Any) -> Iterator[None]:
    """Within: `model` computes what the untouched base model does in evaluation, without dropout.

    Exact as long as no bias of the base is trained. Unlike PEFT's `disable_adapter` it leaves requires_grad alone,
    which FSDP and DDP look at while they work, and unlike `eval()` it leaves the gains alone: on a GPU a change of mode
    would put them in doubt.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    adapted: list[Any] = [each for each in modules if isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    disabled = [(module, module._disable_adapters) for module in adapted]
    try:
        for module in modules:
            module.training = False
        for module in adapted:
            module._disable_adapters = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, off in disabled:
            module._disable_adapters = off
