"""Variables of the environment by which accelerate would train otherwise than the run's configuration says.

A shell, a cluster or `accelerate launch` may have set them. What they change stands in no file of a run, so that a
resumed one would not repeat it. They are refused by name; what switches nothing on is left alone.
"""

from __future__ import annotations

import os

from dude_peft.config.schema import TrainSection
from dude_peft.errors import ConfigError
from dude_peft.show import shown

_OFF = {"", "0", "n", "no", "f", "false", "off", "default"}
_PLANS = {
    "ACCELERATE_USE_FSDP": "use --launch fsdp2",
    "ACCELERATE_USE_DEEPSPEED": "use --launch zero3",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM trains no adapters",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use --launch",
}
_HALF = {"ACCELERATE_MIXED_PRECISION": "set train.bf16 or train.fp16"}
_COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "set train.torch_compile: true"}
_OF_COMPILING = {
    f"ACCELERATE_DYNAMO_{name}": "a run compiles in one way, which repeats the bits"
    for name in ("MODE", "USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION")
}


def check_variables(section: TrainSection) -> None:
    """Raises ConfigError where a variable would change how `section` trains."""
    taken = _PLANS | ({} if section.autocasts else _HALF) | (_OF_COMPILING if section.torch_compile else _COMPILED)
    for name, instead in taken.items():
        value = os.environ.get(name, "")
        if value.strip().lower() not in _OFF:
            raise ConfigError(
                f"the environment has {name}={shown(value, 40)}, by which accelerate would train otherwise than the "
                f"configuration says; unset it ({instead})"
            )
