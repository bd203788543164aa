"""DuDe: dual decomposition of weights and singular-value low-rank adaptation, inside PEFT.

    model = peft.get_peft_model(model, dude_peft.DudeConfig(r=16, target_modules="all-linear"))
    report = dude_peft.train("run.yaml")

Public names are loaded on first use, so that `import dude_peft` and the command stay fast.
"""

from typing import TYPE_CHECKING, Any

from dude_peft.version import __version__

if TYPE_CHECKING:
    from dude_peft.api import compare, evaluate, plan, report, train
    from dude_peft.chat.generate import generate
    from dude_peft.errors import DudeError
    from dude_peft.exporting.run import export, merge
    from dude_peft.exporting.verify import verify
    from dude_peft.measure.movement import MovementCallback
    from dude_peft.methods import METHODS
    from dude_peft.planning.method_table import method_table
    from dude_peft.training.data_check import check_data
    from dude_peft.tuner import DudeConfig, load_adapter

__all__ = [
    "METHODS", "DudeConfig", "DudeError", "MovementCallback", "__version__", "check_data", "compare", "evaluate",
    "export", "generate", "load_adapter", "merge", "method_table", "plan", "report", "train", "verify",
]  # fmt: skip

_HOMES = {
    "DudeConfig": "tuner",
    "DudeError": "errors",
    "load_adapter": "tuner",
    "METHODS": "methods",
    "MovementCallback": "measure.movement",
    "check_data": "training.data_check",
    "generate": "chat.generate",
    "merge": "exporting.run",
    "export": "exporting.run",
    "verify": "exporting.verify",
    "method_table": "planning.method_table",
}
"""Where a name is defined, if it is not in api.py."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dude_peft' has no attribute '{name}'")
    import importlib

    from dude_peft.parents import refusal_of

    try:
        home = importlib.import_module(f"dude_peft.{_HOMES.get(name, 'api')}")
    except ImportError as error:
        if (refusal := refusal_of(error)) is not None:
            raise refusal from error
        raise
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
