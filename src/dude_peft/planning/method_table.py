"""`dude methods`: the methods side by side: what each trains, keeps and computes in a model, and when to take it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dude_peft.config.schema import ModelSection
from dude_peft.errors import ConfigError
from dude_peft.kinds import checked
from dude_peft.methods import METHODS, Method
from dude_peft.methods.sizes import count, formula
from dude_peft.model.load import load_settings, locate, with_only_gguf
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL
from dude_peft.terminal.display import Display
from dude_peft.terminal.facts import show_facts
from dude_peft.terminal.html import table
from dude_peft.terminal.next_steps import tell_next
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports

# Of a trained number in training: itself, its gradient and Adam's two moments, all in float32.
_BYTES_TRAINED, _BYTES_KEPT = 16, 4


@dataclass(frozen=True)
class MethodRow:
    """One method, in plain words and numbers."""

    name: str
    summary: str
    start: str
    """What its start takes of every weight: none, QR, truncated SVD or whole SVD."""
    step: str
    """What a step computes beside the frozen layer."""
    trained: int | str
    """Trained numbers of the model; without one, of a layer (out, in)."""
    kept: int | str
    """Frozen numbers that are kept beside them."""
    bytes: int | None
    """Both in training, with gradients and Adam's states; None without a model."""
    experts: bool
    """Whether it adapts stacks of experts (adapter.target_parameters)."""
    learning_rate: float
    rate_of: str
    """The relative whose rate it is; empty where it is the method's own."""
    paper: str
    certainty: str
    choose: str


@dataclass(frozen=True, repr=False)
class MethodTable:
    """All methods, for a model and a rank or for any."""

    model: str | None
    r: int
    layers: int
    """How many layers are adapted; 0 without a model."""
    rows: tuple[MethodRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"model": self.model, "r": self.r, "layers": self.layers, "methods": [asdict(row) for row in self.rows]}

    def show(self, display: Display) -> None:
        """Prints a line for each method; a block of all that is known where there is one."""
        if len(self.rows) == 1:
            row = self.rows[0]
            display.say(self._title())
            show_facts(display, f"{row.name}: {row.summary}", list(zip(_HEADER[2:], _cells(row)[2:], strict=True)))
            return
        show_facts(display, f"methods, {self._title()}", [(row.name, _line(row)) for row in self.rows])
        tell_next(display, ["methods", self.rows[0].name])

    def __repr__(self) -> str:
        return f"MethodTable({len(self.rows)} methods, {self._title()})"

    def _repr_html_(self) -> str:
        return table(f"methods, {self._title()}", [_cells(row) for row in self.rows], _HEADER)

    def _title(self) -> str:
        if self.model is None:
            return "per layer (out, in) of rank r"
        return f"{self.layers} layers of {shown(self.model, 300)}, r = {self.r}"


def _line(row: MethodRow) -> str:
    trained = f"{row.trained:,}" if isinstance(row.trained, int) else row.trained
    return f"{row.summary}; trains {trained}"


_HEADER = (
    "method", "what it is", "take it for", "trained", "kept beside; memory in training", "start", "step beside W0",
    "experts", "learning rate", "source",
)  # fmt: skip


@checked
def method_table(
    model: str | Path | None = None,
    *,
    method: str | None = None,
    r: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    gguf_file: str | None = None,
    quiet: bool = True,
) -> MethodTable:
    """Compare the methods: what each trains, keeps and computes, where it comes from, and when to take it.

        found = dude_peft.method_table("my-model", r=8)
        print({row.name: row.trained for row in found.rows})

    Args:
        model: a folder, a hub id or `package:NAME`, whose layers are counted; None gives formulas.
        method: this one alone; None compares all.
        r: rank.
        target_modules: the layers, as adapter.target_modules.
        gguf_file: the GGUF file in the model's folder, where it is one of several.
        quiet: print nothing.

    Raises:
        ConfigError: a model, rank or target that cannot be used.
    """
    if r < 1:
        raise ConfigError(f"r={r}; a rank is a whole number of at least 1, 8 to 64 are usual")
    if model is None and target_modules != "all-linear":
        raise ConfigError("target modules count only with a model; add --model, or leave them out")
    if model is None and gguf_file is not None:
        raise ConfigError("a GGUF file counts only with a model; add --model, or leave it out")
    if model == "":
        raise ConfigError("the model's name is empty; give a folder, a hub id or package:NAME")
    if method is not None and method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"closest: {near[0]!r}" if near else f"known: {', '.join(METHODS)}"
        raise ConfigError(f"there is no method {shown(repr(method), 120)}; {hint}")
    chosen = METHODS.values() if method is None else [METHODS[method]]
    model = None if model is None else str(model)
    display = Display(quiet=quiet)
    shapes = None if model is None else _shapes(model, gguf_file, r, target_modules, display)
    made = MethodTable(model, r, len(shapes or ()), tuple(_row(each, shapes, r) for each in chosen))
    if not quiet:
        made.show(display)
    return made


def _shapes(
    model: str, gguf_file: str | None, r: int, target_modules: str | Sequence[str], display: Display
) -> list[tuple[int, int]]:
    """(out, in) of every layer that such an adapter would have."""
    with gathered_warnings(display.warn):
        section = with_only_gguf(ModelSection(name_or_path=model, gguf_file=gguf_file))
        where = locate(section)
        with display.waiting("model and targets"), quiet_imports():
            import peft
            import torch

            from dude_peft.model.architecture import model_of
            from dude_peft.tuner import DudeConfig, DudeLinear

            empty = model_of(load_settings(section, where), model, torch.float32)
            targets = target_modules if isinstance(target_modules, str) else list(target_modules)
            config = DudeConfig(method="lora", r=r, target_modules=targets, task_type=CAUSAL)
            adapted = peft.inject_adapter_in_model(config, empty, low_cpu_mem_usage=True)
    layers = [module for module in adapted.modules() if isinstance(module, DudeLinear)]
    return [(layer.out_features, layer.in_features) for layer in layers]


def _row(method: Method, shapes: list[tuple[int, int]] | None, r: int) -> MethodRow:
    size = None
    trained: int | str = formula(method.trained)
    kept: int | str = formula(method.kept)
    if shapes is not None:
        trained = sum(count(method.trained, *shape, r) for shape in shapes)
        kept = sum(count(method.kept, *shape, r) for shape in shapes)
        size = _BYTES_TRAINED * trained + _BYTES_KEPT * kept
    return MethodRow(
        name=method.name,
        summary=method.summary,
        start=method.start,
        step=method.step,
        experts=method.stackable,
        trained=trained,
        kept=kept,
        bytes=size,
        learning_rate=method.learning_rate,
        rate_of=method.rate_of,
        paper=method.paper,
        certainty=method.certainty,
        choose=method.choose,
    )


def _cells(row: MethodRow) -> list[str]:
    """The row under `_HEADER`."""
    trained, kept = (f"{n:,}" if isinstance(n, int) else n for n in (row.trained, row.kept))
    memory = kept if row.bytes is None else f"{kept}; {row.bytes / 2**20:,.1f} MiB in all"
    rate = f"{row.learning_rate:g}" + (f" ({row.rate_of}'s, not measured yet)" if row.rate_of else "")
    source = f"{row.paper} ({row.certainty})"
    experts = "yes" if row.experts else "no"
    return [row.name, row.summary, row.choose, trained, memory, row.start, row.step, experts, rate, source]
