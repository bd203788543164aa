"""The PEFT tuner. Importing it enters DuDe into PEFT's tables, which is all that `get_peft_model` needs."""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from dude_peft.tuner.config import DUDE_TYPE, DudeConfig
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.load import load_adapter
from dude_peft.tuner.model import DudeModel

PEFT_TYPE_TO_CONFIG_MAPPING[DUDE_TYPE] = DudeConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[DUDE_TYPE] = DudeModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[DUDE_TYPE] = DudeModel.prefix  # type: ignore[index]

__all__ = ["DudeConfig", "DudeLinear", "DudeModel", "load_adapter"]
