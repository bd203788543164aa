"""A saved adapter, checked, its tensors read one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dude_peft.artifact.base_settings import PADDING
from dude_peft.artifact.companions import TEMPLATES
from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.artifact.form import EMBEDDING_A, MATRIX, OUT_PROJECTION, Form
from dude_peft.artifact.header import DTYPES, StoredTensor, chunks, read_header
from dude_peft.artifact.manifest import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    BaseRecord,
    check_complete,
    tokenizer_files,
)
from dude_peft.artifact.stacks import from_disk
from dude_peft.artifact.stock import EXTRA_TRAINED, STOCK_A, STOCK_B, LayerTensors, stock_names
from dude_peft.doors import read_json
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.folder.identity import NAME as RUN
from dude_peft.folder.record import ADAPTER
from dude_peft.show import reason_of, shown
from dude_peft.tuner import DudeConfig
from dude_peft.tuner.config import adapter_folder
from dude_peft.tuner.patterns import check_patterns

_PREFIX = "base_model.model."
_TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
}  # fmt: skip


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder whose files are whole and belong together."""

    folder: Path
    config: DudeConfig
    record: BaseRecord
    """What it remembers of its base model."""
    tensors: dict[str, StoredTensor]
    vouched: dict[str, str] | None = None
    """Name of every file of its tokenizer -> sha256, compared; None of an adapter that was saved without."""
    writing: dict[str, str] | None = None
    """How its run wrote rows, where its tokenizer alone does not tell (`Manifest.writing`)."""

    @property
    def base(self) -> dict[str, TensorPrint]:
        """Name of every adapted layer -> fingerprint of its base weight."""
        return self.record.layers

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How its base was quantised, if it was."""
        return self.record.quantization

    def scaling(self, layer: str) -> float:
        """S of one layer."""
        return self.config.spec.scaling(*self.config.rank_and_alpha(layer))

    def layer(self, layer: str, shape: tuple[int, ...]) -> LayerTensors:
        """State of one layer.

        Args:
            layer: its name in the base model.
            shape: (out, in) of the base weight; (experts, out, in) of a stack.

        Raises:
            ArtifactError: a tensor is missing, or does not fit.
            NumericsError: NaN or Inf.
        """
        spec, (r, _) = self.config.spec, self.config.rank_and_alpha(layer)
        names, form = stock_names(spec), self._form(layer)
        absent = [name for name in names if self._key(layer, form.name(name)) not in self.tensors]
        if absent:
            raise ArtifactError(
                f"'{self.folder / WEIGHTS_FILE}': layer '{shown(layer)}' has no {absent[0]}; save the adapter again"
            )
        found = {name: read_tensor(self.tensors[self._key(layer, form.name(name))]) for name in names}
        return from_disk(form.read(found), spec, r, shape, layer)

    @property
    def stacks(self) -> list[str]:
        """Names of the stacks of experts among its layers."""
        wanted = self.config.target_parameters or ()
        return [name for name in self.base if any(name == one or name.endswith(f".{one}") for one in wanted)]

    def shape(self, layer: str) -> tuple[int, ...]:
        """(out, in) of one layer, or (experts, out, in), as the adapter's own tensors have it; zeros where these are
        damaged.
        """
        delta = self.config.spec.delta
        left, right = STOCK_B, STOCK_A
        if delta is not None and not self.config.spec.ranked:
            left = right = EXTRA_TRAINED + next(name for name, own in delta.trained.items() if own == ("out", "in"))
        form = self._form(layer)
        stored = [self.tensors.get(self._key(layer, form.name(name))) for name in (left, right)]
        out, in_ = (
            (one.shape[0] if side == 0 else math.prod(one.shape[1:])) if one is not None and len(one.shape) > 1 else 0
            for side, one in enumerate(stored)
        )
        return (self.base[layer]["shape"][0], out, in_) if layer in self.stacks else (out, in_)

    def whole(self) -> Iterator[tuple[str, StoredTensor]]:
        """Tensors that were trained whole (biases, modules_to_save), by their names in the base model."""
        spec = self.config.spec
        names = stock_names(spec)
        own = {self._key(layer, self._form(layer).name(name)) for layer in self.base for name in names}
        for key, stored in self.tensors.items():
            if key not in own:
                yield key.removeprefix(_PREFIX).replace(".base_layer.", "."), stored

    def labels(self, *heads: str) -> int | None:
        """Numbers that a head of one of these names gives: rows of its last matrix; None where it has none."""
        ends = tuple(f"{head}.weight" for head in heads)
        return next((stored.shape[0] for name, stored in self.whole() if name.endswith(ends)), None)

    @property
    def padding(self) -> int | None:
        """The padding token of its base, where that decides what it computes: a model that scores reads behind it."""
        found: int | None = (self.record.settings or {}).get(PADDING)
        return found

    def tokenizer(self) -> list[str]:
        """Names of its tokenizer's files; of an adapter that vouches for none, those that transformers names so."""
        found = tokenizer_files(self.folder)
        if self.vouched is not None:
            return [name for name in found if name in self.vouched]
        return [name for name in found if name in _TOKENIZER or name.startswith(TEMPLATES)]

    @property
    def loaded(self) -> list[str]:
        """Names of the layers that are merged in memory: their weight is no matrix, or no layer's (attention)."""
        attentions = {name.removesuffix(OUT_PROJECTION) for name in self.base if name.endswith(OUT_PROJECTION)}
        return [
            name
            for name, seen in self.base.items()
            if len(seen["shape"]) > 2 or name.removesuffix(OUT_PROJECTION) in attentions
        ]

    def is_other(self, layer: str) -> bool:
        """Whether a layer is no linear layer: experts, an embedding, a convolution."""
        return layer in self.loaded or self._form(layer).embedding

    def _form(self, layer: str) -> Form:
        right = self.tensors.get(self._key(layer, STOCK_A))
        if self._key(layer, EMBEDDING_A) in self.tensors:
            return Form(embedding=True)
        return Form(kernel=right.shape[1:]) if right is not None and len(right.shape) > 2 else MATRIX

    @staticmethod
    def _key(layer: str, name: str) -> str:
        return f"{_PREFIX}{layer}.{name}"


def open_adapter(path: str | Path) -> SavedAdapter:
    """The adapter in a folder or on the hub, every byte checked against its manifest.

    Raises:
        ArtifactError: a file is missing, damaged, edited, or not ours, the tokenizer's among them.
    """
    refuse_run_folder(Path(path))
    folder = adapter_folder(str(path))
    if not Path(path).is_dir():
        _fetch_tokenizer(str(path))
    config = DudeConfig.from_pretrained(str(folder))
    manifest = config._loading
    assert manifest is not None
    check_complete(folder, manifest)
    tensors = read_header(folder / WEIGHTS_FILE).tensors
    return SavedAdapter(folder, config, manifest.record, tensors, manifest.files, manifest.writing)


def refuse_run_folder(folder: Path) -> None:
    """Raises ConfigError for a run's own folder, and names the adapter in it, where the run has ended."""
    adapter = folder / ADAPTER
    if (folder / CONFIG_FILE).is_file():
        return
    if (adapter / CONFIG_FILE).is_file():
        raise ConfigError(f"{shown(folder, 300)} is a run's folder; give the adapter inside it, {shown(adapter, 300)}")
    if (folder / RUN).is_file():
        raise ConfigError(
            f"{shown(folder, 300)} is the folder of a run that has not ended; run its dude train again, or give the "
            "adapter of one of its checkpoints"
        )


def _fetch_tokenizer(name: str) -> None:
    """Get an adapter's tokenizer from the hub, beside its other files; its repository may have none."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, allow_patterns=list(TOKENIZER_FILES))
    except Exception as error:  # the hub client's errors have no common base
        reason = reason_of(error, 200)
        raise ConfigError(
            f"the tokenizer of {shown(name)} cannot be downloaded ({reason}); download the adapter, and give its folder"
        ) from error


def check_names(adapter: SavedAdapter, names: Sequence[str]) -> None:
    """Make sure that the adapter's patterns, ours and stock PEFT's, end on a base model's names.

    Raises:
        ArtifactError: one does not.
    """
    try:
        for settings in (vars(adapter.config), read_json(adapter.folder / CONFIG_FILE)):
            check_patterns(settings, names)
    except ConfigError as error:
        raise ArtifactError(f"{shown(adapter.folder / WEIGHTS_FILE, 300)}: {error}") from error


def read_tensor(stored: StoredTensor) -> Tensor:
    """A whole float tensor as it is stored.

    Raises:
        ArtifactError: it holds no floats, or the file ends early.
    """
    dtype = DTYPES.get(stored.dtype)
    if dtype is None:
        raise ArtifactError(
            f"'{stored.file}': tensor '{shown(stored.name)}' has dtype {stored.dtype}, not a float dtype; save it again"
        )
    tensor = torch.empty(stored.shape, dtype=dtype)
    flat, done = tensor.view(-1).view(torch.uint8), 0
    for view in chunks(stored):
        flat[done : done + len(view)] = torch.frombuffer(view, dtype=torch.uint8)
        done += len(view)
    return tensor
