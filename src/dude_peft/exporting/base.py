"""The base model of an adapter as a plain safetensors checkpoint, whatever it is stored as."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from dude_peft.artifact.companions import companions, copy_files
from dude_peft.config.schema import ModelSection
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.exporting.adapter import SavedAdapter
from dude_peft.exporting.dense import densify_
from dude_peft.exporting.foreign import ForeignAdapter
from dude_peft.exporting.rounded import narrower_dtype, write_rounded
from dude_peft.model.architecture import empty_model, fetch_checkpoint, parameter_names
from dude_peft.model.layout import Layout, layout_of
from dude_peft.model.load import folder_of, load_model, load_settings, load_tokenizer, locate, with_only_gguf
from dude_peft.model.quantised import packed_config, stored_config
from dude_peft.model.weights import WeightFiles, open_weights
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL, SCORES, TaskType
from dude_peft.tuner.same_base import check_base

_DTYPES = get_args(ModelSection.model_fields["dtype"].annotation)


@dataclass(frozen=True)
class Base:
    """A base model on disk, in transformers' own layout, not loaded."""

    source: ModelSection
    """Where it comes from; `load_model` loads it."""
    folder: Path
    checkpoint: WeightFiles
    model: Any
    """The model on the meta device."""
    names: dict[int, list[str]]
    """Names of every parameter of the model, by its id."""
    layout: Layout
    """Where the checkpoint keeps them."""
    quantization: dict[str, Any] | None = None
    """How the model is quantised in use; the checkpoint then is its dense equal, compared before it was written."""
    problem: ArtifactError | None = None
    """What that comparison found."""
    task_type: TaskType = CAUSAL
    """Which head the model has."""

    @property
    def dtype(self) -> str | None:
        """Dtype of a quantised model beside its quantised weights; None where nothing is quantised."""
        return None if self.quantization is None else str(self.quantization["dtype"])


def source_of(adapter: SavedAdapter | ForeignAdapter, name: str | None, gguf_file: str | None) -> ModelSection:
    """Which base model an adapter means, or the user says, in the dtype that the adapter was trained on.

    Raises:
        ConfigError: neither tells.
    """
    name = name or adapter.config.base_model_name_or_path
    if not name:
        raise ConfigError(f"adapter {shown(adapter.folder, 300)} does not name its base model; give it with --base")
    source = source_named(name, gguf_file, adapter.config.revision)
    dtype = adapter.record.dtype
    return source.model_copy(update={"dtype": dtype}) if dtype in _DTYPES else source


def source_named(name: str, gguf_file: str | None = None, revision: str | None = None) -> ModelSection:
    """The model of a name; in a folder that holds one GGUF file and no other model, that file."""
    folder = folder_of(name)
    revision = revision if folder is None else None
    return with_only_gguf(ModelSection(name_or_path=name, gguf_file=gguf_file or None, revision=revision))


@contextlib.contextmanager
def open_base(
    source: ModelSection, scratch: Path, adapters: Sequence[SavedAdapter], *, rounded: bool = True
) -> Iterator[Base]:
    """The base model as a plain checkpoint; what is not (GGUF, quantised) is written out in `scratch` for the time.

    Args:
        source: where it comes from.
        scratch: a folder that is there.
        adapters: trained on it; what they say of its quantisation is done again.
        rounded: write it out as well where the adapters were trained on it in a narrower dtype.

    Raises:
        ConfigError: it cannot be found, or is no causal language model.
        ArtifactError: its files are damaged.
    """
    where = locate(source)
    task_type = task_type_of(adapters[0])
    quantization = next((adapter.quantization for adapter in adapters if adapter.quantization is not None), None)
    folder = scratch / "base"
    if source.gguf_file is None:
        original = Path(where) if Path(where).is_dir() else fetch_checkpoint(where, source.revision)
        if quantization is None and not _is_dequantised(source, where):
            opened, trained_on = _opened(source, original, task_type), adapters[0].record
            narrower = narrower_dtype(opened.layout, trained_on) if rounded else None
            if narrower is not None:
                folder.mkdir()
                write_rounded(original, opened.checkpoint, opened.layout, trained_on, narrower, folder)
                opened = _opened(source, folder, task_type)
            yield opened
            return
    try:
        model = load_model(source, where, quantization, task_type=task_type)
        problem = None
        if quantization is not None:
            problem = _compare(model, adapters)
        if source.gguf_file is None:
            densify_(model)
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            model.save_pretrained(folder)
        if source.gguf_file is None:
            copy_files(original, folder, companions(original))
        else:
            load_tokenizer(source, where).save_pretrained(folder)
        del model
        yield replace(_opened(source, folder, task_type), quantization=quantization, problem=problem)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_dequantised(source: ModelSection, where: str) -> bool:
    """Whether the checkpoint is stored in a format that loading turns into dense weights."""
    settings = load_settings(source, where)
    return stored_config(settings) is not None and packed_config(settings) is None


def _compare(model: nn.Module, adapters: Sequence[SavedAdapter]) -> ArtifactError | None:
    """A quantised model with what the adapters recorded, which only it can tell; the error to raise."""
    try:
        for adapter in adapters:
            check_base(model, adapter.record, str(adapter.folder))
    except ArtifactError as error:
        return error
    return None


def task_type_of(adapter: SavedAdapter) -> TaskType:
    """Which head its base model has."""
    return SCORES if adapter.config.task_type == SCORES else CAUSAL


def _opened(source: ModelSection, folder: Path, task_type: TaskType) -> Base:
    checkpoint = open_weights(folder)
    model = empty_model(source.name_or_path, folder, checkpoint.dtype, task_type=task_type)
    layout = layout_of(model, checkpoint)
    return Base(source, folder, checkpoint, model, parameter_names(model), layout, task_type=task_type)
