"""Rows with images in a run: what it cannot do beside, and batches that have none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError

if TYPE_CHECKING:
    from dude_peft.data.token_set import TokenSet


def check_images(config: RunConfig, images: int, strategy: str, processes: int) -> None:
    """Refuses settings that have no place for the images of a batch.

    Args:
        config: of the run.
        images: how many its rows have.
        strategy: of several processes: ddp, fsdp2 or zero3.
        processes: of the run.

    Raises:
        ConfigError: a setting that learns from text alone.
    """
    if not images:
        return
    stages = config.train.curriculum
    faults = {
        "data.packing: rows laid end to end have no images; set it to false": config.data.packing,
        "train.trainer: TRL's trainer gets no images here; set it to transformers": config.train.trainer == "trl",
        "train.torch_compile: the images of a batch have no fixed shape; set it to false": config.train.torch_compile,
        "train.curriculum: pass rates are of answers to text alone; set by: length": stages is not None
        and stages.by == "pass_rate",
        f"rows with images do not train with {strategy}; choose --launch ddp": processes > 1 and strategy != "ddp",
    }
    for fault, there in faults.items():
        if there:
            raise ConfigError(fault)


def are_mixed(examples: TokenSet) -> bool:
    """Whether some examples have images, and others none."""
    return bool(examples.images.any() and not examples.images.all())


@contextmanager
def reached(model: Any) -> Iterator[None]:
    """Within: a batch without images has a gradient of 0, also where only what reads images is trained.

    Without it the loss of such a batch does not depend on anything that is trained, and torch refuses its backward.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def reach(module: Any, inputs: Any, output: Any) -> None:
        name = "logits" if output.get("loss") is None else "loss"
        if module.training and not output[name].requires_grad:
            output[name] = output[name] + sum(parameter.flatten()[:0].sum() for parameter in trained)

    handle = model.register_forward_hook(reach)
    try:
        yield
    finally:
        handle.remove()
