"""`dude verify`: whether an adapter's files are whole and belong together, and what can be done with them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dude_peft.doors import require_place
from dude_peft.errors import ConfigError
from dude_peft.exporting.serving import PROGRAMS, Serving, serving_matrix
from dude_peft.kinds import checked
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.html import table
from dude_peft.terminal.quiet import quiet_imports

if TYPE_CHECKING:
    from dude_peft.exporting.adapter import SavedAdapter


@dataclass(frozen=True)
class Verification:
    """What is known of an adapter whose files are whole, unedited and finite."""

    method: str
    r: int
    lora_alpha: float
    layers: int
    trained_numbers: int
    base_model: str | None
    saved_whole: tuple[str, ...]
    """Modules that were trained whole."""
    base_compared: bool
    """Whether a base model was given; its weights then are those of the training."""
    stock_refusal: str | None
    """Why stock PEFT does not load it; empty where it does, None where the base model's configuration is not here."""
    serving: tuple[Serving, ...]
    """What each of `PROGRAMS` does with it."""
    warnings: tuple[str, ...]

    def facts(self) -> list[str]:
        """Lines for a terminal."""
        lines = [
            f"{self.method}, r = {self.r}, lora_alpha = {self.lora_alpha:g}, {self.layers} layers, "
            f"{self.trained_numbers:,} trained parameters, base model {shown(self.base_model, 300)}"
        ]
        if self.saved_whole:
            lines.append(f"saved in full: {shown(', '.join(self.saved_whole), 300)}")
        lines.append("files: complete, unchanged, finite")
        compared = "the ones the adapter was trained on" if self.base_compared else _NOT_COMPARED
        lines.append(f"base weights: {compared}")
        if self.stock_refusal is None:
            lines.append(
                "stock PEFT: not checked, because the base model's configuration was not found; give --base MODEL"
            )
        return lines

    def _repr_html_(self) -> str:
        lines = [(line,) for line in self.facts()] + [(f"warning: {text}",) for text in self.warnings]
        rows = [(row.file, *row.answers) for row in self.serving]
        return table("adapter", lines) + table("what runs where", rows, ("file", *PROGRAMS))


_NOT_COMPARED = "not compared; --base MODEL compares them"


@checked
def verify(
    adapter: str | Path, *, base: str | None = None, gguf_file: str | None = None, quiet: bool = True
) -> Verification:
    """Check every byte and number of an adapter, and show which programs can use it.

        found = dude_peft.verify("runs/mine/adapter", base="my-model")
        print(found.method, found.trained_numbers, found.base_compared)

    Args:
        adapter: folder or hub id.
        base: the model whose weights are compared with those of the training; None compares nothing.
        gguf_file: the GGUF file that is the base model.
        quiet: print nothing.

    Raises:
        ArtifactError: a file is damaged, edited, forged or not ours, or the base model is another one.
        NumericsError: NaN or Inf.
        ConfigError: the base model cannot be found.
    """
    require_place(str(adapter))
    display = Display(quiet=quiet)
    with display.waiting("reading the adapter"), quiet_imports():
        from dude_peft.artifact.stock import STOCK_A, STOCK_B
        from dude_peft.exporting.adapter import open_adapter

        opened = open_adapter(adapter)
        prefix, ranks, numbers = "base_model.model.", set(), 0
        for layer in opened.base:
            factors = [opened.tensors.get(f"{prefix}{layer}.{name}") for name in (STOCK_A, STOCK_B)]
            out, in_ = (
                f.shape[side] if f is not None and len(f.shape) == 2 else 0
                for f, side in zip(factors[::-1], (0, 1), strict=True)
            )
            state = opened.layer(layer, (out, in_))
            ranks.add(factors[0].shape[0])  # type: ignore[union-attr]  # `layer` refused a missing one
            numbers += sum(t.numel() for t in state.learned)
        whole = [name for name, _ in opened.whole()]
    config, warnings = opened.config, []
    compare = base is not None or gguf_file is not None
    if compare and (changed := _compare(display, opened, base, gguf_file)):
        warnings.append(f"the base model's tokenizer is not the one used in training: {changed}")
    refusal = _stock_refusal(opened, base, gguf_file)
    if refusal:
        warnings.append(f"{refusal}; use --to merged")
    found = Verification(
        method=config.method,
        r=config.r,
        lora_alpha=config.lora_alpha,
        layers=len(opened.base),
        trained_numbers=numbers,
        base_model=config.base_model_name_or_path,
        saved_whole=tuple(whole),
        base_compared=compare,
        stock_refusal=refusal,
        serving=tuple(serving_matrix(config.spec, ranks, loads=not refusal)),
        warnings=tuple(warnings),
    )
    for line in found.facts():
        display.say(line)
    for line in warnings:
        display.warn(line)
    shape = Table(title="what runs where", title_justify="left")
    for column in ("file", *PROGRAMS):
        shape.add_column(column)
    for row in found.serving:
        shape.add_row(row.file, *row.answers)
    display.console.print(shape)
    return found


def _stock_refusal(opened: SavedAdapter, base: str | None, gguf_file: str | None) -> str | None:
    """Why stock PEFT does not load it, empty where it does; None where nothing is known of the base model."""
    import torch

    from dude_peft.exporting.base import source_of
    from dude_peft.model.architecture import model_of
    from dude_peft.model.load import load_settings, locate
    from dude_peft.tuner.stock_loading import stock_refusal

    try:
        source = source_of(opened, base, gguf_file)
        settings = load_settings(source, locate(source))
        settings.quantization_config = None  # the names are those of the plain model
        model = model_of(settings, source.name_or_path, torch.float32)
    except ConfigError:
        return None
    return stock_refusal(model, opened.config.stock(), opened.base)


def _compare(display: Display, opened: SavedAdapter, base: str | None, gguf_file: str | None) -> str:
    """How the base model's tokenizer differs from that of the training; empty where it does not."""
    from dude_peft.exporting.base import open_base, source_of
    from dude_peft.exporting.merge import Weighted, check_base, layers_of
    from dude_peft.exporting.tokenizer import tokenizer_change

    with (
        display.waiting("comparing the base weights"),
        tempfile.TemporaryDirectory() as scratch,
        open_base(source_of(opened, base, gguf_file), Path(scratch), [opened], rounded=False) as found,
    ):
        problem = check_base(found, layers_of(found, [Weighted(opened)]))
        changed = tokenizer_change(opened.folder, found.folder)
    if problem is not None:
        raise problem
    return changed or ""
