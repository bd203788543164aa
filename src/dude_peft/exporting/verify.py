"""`dude verify`: whether an adapter's files are whole and belong together, and what can be done with them."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dude_peft.doors import named_folder
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.exporting.serving import PROGRAMS, Serving, serving_matrix
from dude_peft.kinds import checked
from dude_peft.model.load import require_known
from dude_peft.peft_file import is_foreign
from dude_peft.show import shown
from dude_peft.task_types import SCORES
from dude_peft.terminal.display import Display
from dude_peft.terminal.html import table
from dude_peft.terminal.quiet import quiet_imports

if TYPE_CHECKING:
    from dude_peft.exporting.adapter import SavedAdapter
    from dude_peft.exporting.foreign import ForeignAdapter


@dataclass(frozen=True)
class Verification:
    """What is known of an adapter whose files are whole, unedited and finite."""

    adapter: str
    """Its folder or hub id."""
    method: str
    r: int
    """0 where the method has no rank; then lora_alpha has no meaning."""
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
        rank = f"r = {self.r}, lora_alpha = {self.lora_alpha:g}" if self.r else "no rank"
        what = f"{rank}, {self.layers} layers, {self.trained_numbers:,} trained parameters"
        if is_foreign(self.method):
            what = f"an adapter of stock PEFT, {self.trained_numbers:,} saved numbers"
        lines = [
            f"adapter {shown(self.adapter, 300)}",
            f"{self.method}, {what}, base model {shown(self.base_model, 300)}",
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
    require_known(str(adapter))
    display = Display(quiet=quiet)
    with display.waiting("imports"), quiet_imports():
        from dude_peft.exporting.adapter import open_adapter
        from dude_peft.exporting.foreign import open_foreign

        foreign = open_foreign(adapter)
    if foreign is not None:
        return _verify_foreign(foreign, base, gguf_file, display)
    with display.waiting("reading the adapter"):
        opened = open_adapter(adapter)
        numbers = sum(t.numel() for layer in opened.base for t in opened.layer(layer, opened.shape(layer)).learned)
        ranks = {opened.config.spec.multiple * opened.config.rank_and_alpha(layer)[0] for layer in opened.base}
        whole = [name for name, _ in opened.whole()]
    config, warnings = opened.config, []
    compare = base is not None or gguf_file is not None
    if compare and (changed := _compare(display, opened, base, gguf_file)):
        warnings.append(f"the base model's tokenizer is not the one used in training: {changed}")
    refusal = _stock_refusal(opened, base, gguf_file)
    if refusal:
        merged = config.is_stock or config.spec.normalised or not config.target_parameters
        warnings.append(f"{refusal}; use --to {'merged' if merged else 'peft'}")
    found = Verification(
        adapter=named_folder(adapter),
        method=config.method,
        r=config.r if config.spec.ranked else 0,
        lora_alpha=config.lora_alpha,
        layers=len(opened.base),
        trained_numbers=numbers,
        base_model=config.base_model_name_or_path,
        saved_whole=tuple(whole),
        base_compared=compare,
        stock_refusal=refusal,
        serving=()
        if config.task_type == SCORES  # programs that serve language models
        else tuple(
            serving_matrix(
                config.spec,
                ranks,
                loads=not refusal,
                stacks=bool(opened.stacks),
                others=any(map(opened.is_other, opened.base)),
            )
        ),
        warnings=tuple(warnings),
    )
    for line in found.facts():
        display.say(line)
    for line in warnings:
        display.warn(line)
    if not found.serving:
        return found
    shape = Table(title="what runs where", title_justify="left")
    for column in ("file", *PROGRAMS):
        shape.add_column(column)
    for row in found.serving:
        shape.add_row(row.file, *row.answers)
    display.console.print(shape)
    return found


def _verify_foreign(adapter: ForeignAdapter, base: str | None, gguf_file: str | None, display: Display) -> Verification:
    """The same of an adapter that stock PEFT made: of its function nothing is known here but PEFT's word."""
    from dude_peft.artifact.header import DTYPES
    from dude_peft.core.finite import first_not_finite
    from dude_peft.exporting.adapter import read_tensor
    from dude_peft.exporting.base import source_of
    from dude_peft.model.load import load_model, locate
    from dude_peft.tuner.same_base import check_base

    floats = {name: stored for name, stored in adapter.tensors.items() if stored.dtype in DTYPES}
    lost = first_not_finite((name, read_tensor(stored)) for name, stored in floats.items())
    if lost is not None:
        raise NumericsError(f"tensor {shown(lost, 200)} holds NaN or Inf; training diverged, use an earlier checkpoint")
    compare = base is not None or gguf_file is not None
    if compare:
        source = source_of(adapter, base, gguf_file)
        with display.waiting("comparing the base weights"):
            check_base(load_model(source, locate(source)), adapter.record, str(adapter.folder))
    found = Verification(
        adapter=named_folder(adapter.folder),
        method=adapter.method,
        r=0,
        lora_alpha=0,
        layers=0,
        trained_numbers=sum(math.prod(stored.shape) for stored in adapter.tensors.values()),
        base_model=adapter.config.base_model_name_or_path,
        saved_whole=(),
        base_compared=compare,
        stock_refusal="",
        serving=(),
        warnings=(),
    )
    for line in found.facts():
        display.say(line)
    return found


def _stock_refusal(opened: SavedAdapter, base: str | None, gguf_file: str | None) -> str | None:
    """Why stock PEFT does not load it, empty where it does; None where nothing is known of the base model."""
    import torch

    from dude_peft.exporting.base import source_of, task_type_of
    from dude_peft.model.architecture import model_of
    from dude_peft.model.load import load_settings, locate
    from dude_peft.tuner.stock_loading import stock_refusal

    if not opened.config.spec.ranked:
        return f"stock PEFT refuses an adapter of method {opened.config.method}, which has no rank"
    if opened.stacks:
        return "stock PEFT refuses an adapter of experts (target_parameters) as it is saved"
    if not opened.config.is_stock:
        return "stock PEFT refuses an adapter of nn.MultiheadAttention or of tied embeddings as it is saved"
    try:
        source = source_of(opened, base, gguf_file)
        settings = load_settings(source, locate(source))
        settings.quantization_config = None  # the names are those of the plain model
        model = model_of(settings, source.name_or_path, torch.float32, task_type=task_type_of(opened))
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
