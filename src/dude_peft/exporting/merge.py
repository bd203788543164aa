"""Merging: W0 + sum_i w_i (W'_i - W0), written shard by shard, with a few MiB of one weight in memory.

The folder is laid out as the base checkpoint: the same files, the same tensors in them, adapted ones replaced. A weight
that several parameters share (tied embeddings) and that only one of them changes is written once for each, and the
configuration says that they are tied no more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dude_peft.artifact.base_settings import PADDING
from dude_peft.artifact.companions import companions, copy_files
from dude_peft.artifact.durable import check_space, replace_file
from dude_peft.artifact.effective import combined_weight, rows_at_once, rows_of
from dude_peft.artifact.header import DTYPES, StoredTensor, chunks
from dude_peft.core.threads import single_threaded_pool
from dude_peft.core.weight_rounding import round_weight
from dude_peft.doors import read_json
from dude_peft.errors import ArtifactError, ConfigError, NumericsError
from dude_peft.exporting.adapter import SavedAdapter
from dude_peft.exporting.base import Base
from dude_peft.model.stream import NAMES, Piece, stored_piece, write_checkpoint
from dude_peft.model.weights import is_plain, loads_as
from dude_peft.show import shown
from dude_peft.task_types import SCORES
from dude_peft.tuner import frozen
from dude_peft.tuner.combine import Combination
from dude_peft.tuner.named import targets_named
from dude_peft.tuner.same_base import settings_fault


@dataclass(frozen=True)
class Weighted:
    """An adapter and the weight of its change."""

    adapter: SavedAdapter
    weight: float = 1.0


@dataclass
class Layer:
    """One adapted layer: where its weight lies, and who changes it."""

    stored: StoredTensor
    transposed: bool
    names: list[str]
    joint: bool
    """Whether all parameters with these names are changed as one (tied embeddings)."""
    changes: list[tuple[Weighted, str]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.stored.shape
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class MergePlan:
    """What will be written, everything checked that can be."""

    files: dict[str, list[Piece]]
    untied: bool
    layers: int
    size: int
    """Bytes."""


def plan_merge(
    base: Base,
    layers: dict[str, Layer],
    adapters: Sequence[Weighted],
    dtype: torch.dtype | None,
    combination: Combination,
) -> MergePlan:
    """What the merged checkpoint holds: every tensor of the base, changed or not.

    Args:
        base: the base model.
        layers: from `layers_of`.
        adapters: at least one.
        dtype: of the merged weights; None keeps each one's own.
        combination: how several changes become one.

    Raises:
        ArtifactError: a tensor that was trained whole does not fit the base.
        ConfigError: such a tensor, and several adapters.
    """
    tensors = base.checkpoint.tensors
    written: dict[str, tuple[str, Piece]] = {}  # key -> file, tensor
    shared: dict[str, StoredTensor] = {}  # all names of tied weights that change, each written by itself
    for name, layer in layers.items():
        out_dtype, others = dtype or DTYPES[layer.stored.dtype], [base.layout.key(other) for other in layer.names]
        keys = [base.layout.key(f"{name}.weight")]
        if layer.joint:  # as often as it is stored
            keys = sorted({layer.stored.name, *(key for key in others if key in tensors)})
        elif len(others) > 1:
            shared |= dict.fromkeys(others, layer.stored)
        for key in keys:
            output = Piece(key, NAMES[out_dtype], layer.stored.shape, _Merged(layer, name, out_dtype, combination))
            written[key] = Path(layer.stored.file).name, output
    last = list(base.checkpoint.files)[-1]
    for name, trained, folder in _trained_whole(adapters):
        if _is_new(base, name):
            key = base.layout.key(name)
            written[key] = last, stored_piece(key, trained, dtype or base.model.dtype)
            continue
        stored, names = _parameter(base, name)
        if stored.shape != trained.shape:
            raise ArtifactError(
                f"adapter {folder}: '{shown(name)}' has shape {trained.shape}, the base model's {stored.shape}: it "
                "was trained on a model with resized embeddings; resize the base model, save it, and use that"
            )
        key = base.layout.key(name)
        written[key] = Path(stored.file).name, stored_piece(key, trained, dtype or DTYPES.get(stored.dtype))
        shared |= {base.layout.key(other): stored for other in names if len(names) > 1}
    untied = [key for key in shared if key not in written]
    idle = _idle(base)
    for key, stored in {**tensors, **{key: shared[key] for key in untied}}.items():
        if key not in written and key not in idle:
            written[key] = Path(stored.file).name, stored_piece(key, stored, dtype)
    files: dict[str, list[Piece]] = {file: [] for file in base.checkpoint.files}
    for file, output in written.values():
        files[file].append(output)
    size = sum(output.size for _, output in written.values())
    return MergePlan(files, bool(shared), len(layers), size)


def write_merge(
    plan: MergePlan,
    base: Base,
    adapters: Sequence[Weighted],
    folder: Path,
    dtype: torch.dtype | None,
    done: Callable[[], None],
) -> None:
    """Write the merged model into an empty folder; calls `done` after every tensor.

    Raises:
        ResourceError: the disk is too small.
        NumericsError: a merged weight overflows its dtype.
    """
    check_space(folder, plan.size, folder.parent)
    write_checkpoint(folder, plan.files, done)
    _copy_companions(base.folder, folder, adapters)
    scores = _scoring(base, adapters[0].adapter) if base.task_type == SCORES else {}
    _write_config(base.folder / "config.json", folder / "config.json", dtype, plan.untied, scores)


def layers_of(base: Base, adapters: Sequence[Weighted]) -> dict[str, Layer]:
    """Every adapted layer by its name, its weight found in the base's checkpoint; not those that are merged in memory.

    Raises:
        ArtifactError: the base has no such layer, or its weight is no plain matrix.
    """
    modules = dict(base.model.named_modules())
    layers: dict[str, Layer] = {}
    for weighted in adapters:
        adapter = weighted.adapter
        loaded, found = adapter.loaded, targets_named(base.model, adapter.base)
        absent = [name for name in adapter.base if name not in found]
        if absent:
            raise ArtifactError(
                f"adapter {shown(adapter.folder, 300)} adapts {len(absent)} layers that the base model does not have "
                f"(first: '{shown(absent[0])}'); give the base model it was trained on with --base"
            )
        for name in adapter.base:
            if name in loaded:
                continue
            if name not in layers:
                module = modules[name]
                names = base.names[id(module.weight)]
                stored = base.layout.find(f"{name}.weight", names)
                if not is_plain(stored):
                    raise ArtifactError(
                        f"base tensor '{shown(stored.name)}' is {stored.dtype} of shape {stored.shape}, not a plain "
                        "matrix; give the unquantised base model"
                    )
                joint = isinstance(module, nn.Embedding) and len(names) > 1
                layers[name] = Layer(stored, frozen.is_transposed(module), names, joint)
            if isinstance(modules[name], nn.Embedding) and adapter.config.ensure_weight_tying != layers[name].joint:
                raise ArtifactError(
                    f"adapter {shown(adapter.folder, 300)} was trained where '{shown(name)}' and the output layer "
                    f"{'were two' if layers[name].joint else 'shared one weight'}; give the base model it was trained "
                    "on with --base"
                )
            layers[name].changes.append((weighted, name))
    for name, layer in layers.items():
        both = next((other for other in layers if f"{other}.weight" in layer.names and other != name), None)
        if layer.joint and both is not None:
            raise ConfigError(
                f"one adapter changes '{shown(name)}' and another '{shown(both)}' alone, which share their weight; "
                "they cannot be combined"
            )
    return layers


def check_base(base: Base, layers: dict[str, Layer]) -> ArtifactError | None:
    """Every adapter against the base on disk, before anything is written; the error to raise, if it is another one.

    What transformers makes of several tensors when it loads the model (stacked experts) can be told in memory alone.
    """
    if base.quantization is not None:
        return base.problem
    asked = [
        (layer.stored, change.adapter, name, change.adapter.base[name])
        for name, layer in layers.items()
        for change, _ in layer.changes
    ]
    parameters = dict(base.model.named_parameters(remove_duplicate=False))
    for adapter in {id(adapter): adapter for _, adapter, *_ in asked}.values():
        if fault := settings_fault(base.model.config, adapter.record):
            return ArtifactError(f"adapter {shown(adapter.folder, 300)} {fault}; give the base model it was trained on")
        for name, seen in adapter.record.beside.items():
            names = base.names[id(parameters[name])] if name in parameters else [name]
            stored = base.layout.whole(names)
            if stored is not None and not seen["dtype"].startswith("opaque:"):
                asked.append((stored, adapter, name, seen))
    with single_threaded_pool(len(asked)) as pool:
        held = list(pool.map(lambda one: loads_as(one[0], one[3]), asked))
    wrong = [(adapter, name) for (_, adapter, name, _), holds in zip(asked, held, strict=True) if not holds]
    if not wrong:
        return None
    adapter, name = wrong[0]
    return ArtifactError(
        f"adapter {shown(adapter.folder, 300)} was trained on weights that differ from those of "
        f"{shown(base.source.name_or_path, 300)}: {len(wrong)} of {len(asked)} differ (first: '{shown(name)}'); give "
        "the base model it was trained on, not a merged one"
    )


def check_shapes(layers: dict[str, Layer]) -> None:
    """Other values may be allowed, another size cannot be: no program could add the change. Raises ArtifactError."""
    for name, layer in layers.items():
        for change, _ in layer.changes:
            seen = change.adapter.base[name]
            if not seen["dtype"].startswith("opaque:") and list(layer.stored.shape) != seen["shape"]:
                raise ArtifactError(
                    f"adapter {shown(change.adapter.folder, 300)} was trained on a '{shown(name)}' of shape "
                    f"{tuple(seen['shape'])}, but the base model's has {layer.stored.shape}; give the right --base"
                )


def _trained_whole(adapters: Sequence[Weighted]) -> Iterator[tuple[str, StoredTensor, str]]:
    for weighted in adapters:
        folder = shown(weighted.adapter.folder, 300)
        for name, trained in weighted.adapter.whole():
            if len(adapters) > 1 or weighted.weight != 1:
                raise ConfigError(
                    f"adapter {folder} has '{shown(name)}', trained in full, which cannot be combined; merge this "
                    "adapter on its own"
                )
            yield name, trained, folder


def _is_new(base: Base, name: str) -> bool:
    """Whether it is the head of a model that scores, which the base's checkpoint has not."""
    return base.task_type == SCORES and name not in base.layout.places and name in base.model.state_dict()


def _idle(base: Base) -> set[str]:
    """Names of stored tensors that a model which scores does not read: the output layer over the vocabulary."""
    if base.task_type != SCORES:
        return set()
    known = base.model.state_dict()
    return {stored.name for name, stored in base.layout.places.items() if name not in known}


def _scoring(base: Base, adapter: SavedAdapter) -> dict[str, Any]:
    """What config.json says of a model that scores, so that transformers makes it, and reads the score where it did."""
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {"architectures": [type(base.model).__name__], **labels, PADDING: adapter.padding}


def _parameter(base: Base, name: str) -> tuple[StoredTensor, list[str]]:
    parameters = dict(base.model.named_parameters(remove_duplicate=False))
    if name not in parameters:
        raise ArtifactError(f"adapter tensor '{shown(name)}' is not in the base model; give the right --base")
    names = base.names[id(parameters[name])]
    return base.layout.find(name, names), names


@dataclass(frozen=True)
class _Merged:
    """Content of one merged weight, in blocks of rows; the whole matrix where rows do not stand alone."""

    layer: Layer
    name: str
    dtype: torch.dtype
    combination: Combination

    def __call__(self) -> Iterator[Any]:
        stored, layer = self.layer.stored, self.layer
        out, in_ = layer.shape
        parts = [
            (weighted.weight, weighted.adapter.layer(name, (out, in_)), weighted.adapter.scaling(name))
            for weighted, name in layer.changes
        ]
        whole = layer.transposed or not self.combination.by_rows
        count = out if whole else rows_at_once(in_)
        combine = None if self.combination.by_rows else self._combine
        start = 0
        source = DTYPES[stored.dtype]
        wide = torch.promote_types(source, torch.float32)
        for view in chunks(stored, stored.size if whole else count * in_ * source.itemsize):
            W0 = torch.frombuffer(view, dtype=source).view(-1, stored.shape[1]).to(wide, copy=True)
            W0 = W0.T.contiguous() if layer.transposed else W0
            rows = slice(start, start + len(W0))
            merged = combined_weight(W0, [(w, rows_of(state, rows), s) for w, state, s in parts], combine)
            rounded = _rounded(merged, self.dtype, start, self.name)
            stored_layout = rounded.T.contiguous() if layer.transposed else rounded
            yield stored_layout.view(torch.uint8).numpy().data
            start = rows.stop

    def _combine(self, deltas: list[Tensor], weights: list[float]) -> Tensor:
        return self.combination.of(deltas, weights, self.name)


def _rounded(merged: Tensor, dtype: torch.dtype, first_row: int, name: str) -> Tensor:
    rounded = round_weight(merged, dtype, first_row)
    if not bool(torch.isfinite(rounded).all()):
        raise NumericsError(
            f"the merged weight of '{shown(name)}' overflows {dtype}; choose --dtype bfloat16 or float32"
        )
    return rounded


def _copy_companions(base: Path, folder: Path, adapters: Sequence[Weighted]) -> None:
    """Configuration, tokenizer, chat template and licence of the base; an adapter's own tokenizer comes first."""
    copy_files(base, folder, companions(base))
    own = adapters[0].adapter
    if len(adapters) == 1 and (own.folder / "tokenizer_config.json").is_file():
        copy_files(own.folder, folder, own.tokenizer())


def _write_config(source: Path, target: Path, dtype: torch.dtype | None, untied: bool, scores: dict[str, Any]) -> None:
    config = {**read_json(source), **scores}
    for key in ("auto_map", "quantization_config"):
        config.pop(key, None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        _untie(config)
    replace_file(target, (json.dumps(config, indent=2) + "\n").encode())


def _untie(config: dict[str, Any]) -> None:
    """Say at every place that the two matrices are two: readers of a model in parts ask the part."""
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            _untie(part)
