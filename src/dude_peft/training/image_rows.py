"""What a run on rows with images cannot do beside, told before its model is loaded."""

from __future__ import annotations

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError


def check_images(config: RunConfig, images: int, processes: int) -> None:
    """Refuses settings that have no place for the images of a batch.

    Args:
        config: of the run.
        images: how many its rows have.
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
        "rows with images train in one process; leave --launch out": processes > 1,
    }
    for fault, there in faults.items():
        if there:
            raise ConfigError(fault)
