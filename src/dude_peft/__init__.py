"""DuDe: dual decomposition of weights and singular-value low-rank adaptation, inside PEFT.

    model = peft.get_peft_model(model, dude_peft.DudeConfig(r=16, target_modules="all-linear"))

Public names are loaded on first use, so that `import dude_peft` and the command stay fast.
"""

from typing import TYPE_CHECKING, Any

from dude_peft.version import __version__

if TYPE_CHECKING:
    from dude_peft.tuner import DudeConfig, load_adapter

__all__ = ["DudeConfig", "__version__", "load_adapter"]


def __getattr__(name: str) -> Any:
    if name in ("DudeConfig", "load_adapter"):
        from dude_peft.parents import refusal_of

        try:
            import dude_peft.tuner
        except ImportError as error:
            if (refusal := refusal_of(error)) is not None:
                raise refusal from error
            raise
        return getattr(dude_peft.tuner, name)
    raise AttributeError(f"module 'dude_peft' has no attribute '{name}'")
