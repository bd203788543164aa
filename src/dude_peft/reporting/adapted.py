"""What training did to each adapted layer, from the saved adapter: how far its parts moved, and its spectra."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dude_peft.artifact.header import DTYPES
from dude_peft.artifact.stock import LayerTensors
from dude_peft.core.magnitude import direction_change, row_norm, rows_product, whole_direction_change
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.exporting.adapter import SavedAdapter, open_adapter
from dude_peft.exporting.base import open_base, source_of
from dude_peft.exporting.foreign import open_foreign
from dude_peft.exporting.merge import Layer, Weighted, check_base, layers_of
from dude_peft.measure.base_weights import WeightOf
from dude_peft.model.load import folder_of
from dude_peft.model.weights import read_weight
from dude_peft.show import shown

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer."""

    name: str
    block: int | None
    """Its number in the model; None of a layer outside the blocks."""
    module: str
    """What it is called within its block."""
    magnitude: float | None
    """Mean over rows of |m - m0| / m0; None without a trained magnitude."""
    direction: float | None
    """Mean over rows of 1 - cos(V, W0); None where the base weight was not at hand."""
    change: tuple[float, ...]
    """Singular values of the delta weight s D, the largest first."""
    relative: float | None
    """||s D|| / ||W0||."""
    start: tuple[float, ...]
    """Singular values of the start s B0 A0; empty for a method without one."""
    end: tuple[float, ...]
    """Of the same factors after training, s B A."""
    angle: float | None
    """The largest principal angle between the rows of A0 and of A, in degrees."""


@dataclass(frozen=True)
class Adapted:
    """All layers, in the order of the model."""

    method: str
    layers: tuple[AdaptedLayer, ...]
    problem: str | None
    """Why directions are not known; None where they are."""


@torch.no_grad()
def adapted(folder: Path, gguf_file: str | None, weight_of: WeightOf | None = None) -> Adapted:
    """What is in a saved adapter; its base model is read where it is on this machine, one layer at a time.

    Args:
        folder: of the adapter.
        gguf_file: name of the GGUF file that is the base model.
        weight_of: the base weights, where they are in memory; the same numbers come out.

    Raises:
        ArtifactError: the adapter is damaged.
        NumericsError: NaN or Inf.
    """
    if (foreign := open_foreign(folder)) is not None:
        return Adapted(
            foreign.method, (), f"{foreign.method} is an adapter of stock PEFT, which is not taken apart here"
        )
    adapter = open_adapter(folder)
    try:
        if weight_of is None:
            layers, problem = _beside_base(adapter, gguf_file), None
        else:
            layers, problem = [_layer(adapter, name, weight_of(name)) for name in adapter.base], None
    except (OSError, ConfigError, ArtifactError) as error:
        layers, problem = [_layer(adapter, name, None) for name in adapter.base], str(error)
    return Adapted(adapter.config.method, tuple(layers), problem)


def _beside_base(adapter: SavedAdapter, gguf_file: str | None) -> list[AdaptedLayer]:
    source = source_of(adapter, None, gguf_file)
    if folder_of(source.name_or_path) is None and not _is_cached(source.name_or_path, source.revision):
        raise ConfigError(f"the base model {shown(source.name_or_path, 300)} is not on this machine")
    with tempfile.TemporaryDirectory() as scratch, open_base(source, Path(scratch), [adapter]) as base:
        if adapter.loaded:
            raise ConfigError("the weights of experts and convolutions are read only during a run")
        layers = layers_of(base, [Weighted(adapter, 1.0)])
        if (problem := check_base(base, layers)) is not None:
            raise problem
        return [_layer(adapter, name, _read(layers[name])) for name in adapter.base]


def _is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:  # the path of a folder that is gone
        return False


def _layer(adapter: SavedAdapter, name: str, W0: Tensor | None) -> AdaptedLayer:
    tensors, scaling = _tensors(adapter, name, W0), adapter.scaling(name)
    if tensors.dA is None:
        return _whole_layer(name, scaling * tensors.dB.float(), W0)
    dA, dB = tensors.dA.float(), tensors.dB.float()
    experts = len(dA) if dA.ndim == 3 else 1
    A = dA if tensors.A0 is None else tensors.A0.float() + dA
    B = dB if tensors.B0 is None else tensors.B0.float() + dB
    # s D = s (dB A + B0 dA)
    left = dB if tensors.B0 is None else torch.cat([dB, tensors.B0.float()], dim=-1)
    right = A if tensors.B0 is None else torch.cat([A, dA], dim=-2)
    change = _singular_values(left, right, scaling)
    start = end = torch.zeros(0)
    angle = None
    if tensors.A0 is not None and tensors.B0 is not None:
        start = _singular_values(tensors.B0.float(), tensors.A0.float(), scaling)
        end = _singular_values(B, A, scaling)
        angle = _largest_angle(tensors.A0.float(), A)
    magnitude = norm = None
    if tensors.m0 is not None:
        m0 = tensors.m0.float()
        norm = float(m0.norm())
        if tensors.dm is not None:
            magnitude = float(torch.where(m0 > 0, tensors.dm.float().abs() / m0, 0.0).mean())
    direction = None
    if W0 is not None:
        m0 = row_norm(W0)
        norm = float(m0.norm())
        start_product = None if tensors.A0 is None else rows_product(W0, tensors.A0.float())
        turned = (rows_product(W0, dA), start_product, dA, dB, tensors.A0, tensors.B0)
        direction = float(direction_change(*turned, scaling, m0).mean())
    return AdaptedLayer(
        *_place(name),
        magnitude=magnitude,
        direction=direction,
        change=_plain(change),
        relative=float(change.norm()) * math.sqrt(experts) / norm if norm else None,
        start=_plain(start),
        end=_plain(end),
        angle=angle,
    )


def _whole_layer(name: str, change: Tensor, W0: Tensor | None) -> AdaptedLayer:
    """Of a method that trains the whole delta weight (out, in)."""
    direction = relative = None
    if W0 is not None:
        direction = float(whole_direction_change(W0, change).mean())
        relative = float(change.norm() / W0.norm()) if W0.any() else None
    values = _plain(torch.linalg.svdvals(change))
    return AdaptedLayer(*_place(name), None, direction, values, relative, (), (), None)


def _place(name: str) -> tuple[str, int | None, str]:
    """The name, the number of the block in it, and the rest."""
    block = _BLOCK.search(name)
    return (name, None, name) if block is None else (name, int(block[1]), name[block.end() :])


def _read(weight: Layer) -> Tensor:
    stored, _ = read_weight(weight.stored, DTYPES[weight.stored.dtype])
    return (stored.T if weight.transposed else stored).float()


def _tensors(adapter: SavedAdapter, name: str, W0: Tensor | None) -> LayerTensors:
    if W0 is not None:
        return adapter.layer(name, tuple(W0.shape))
    if adapter.is_other(name):
        return adapter.layer(name, adapter.shape(name))
    out, in_ = adapter.base[name]["shape"]
    try:
        return adapter.layer(name, (out, in_))
    except ArtifactError:  # GPT-2's layers keep their weights as (in, out)
        return adapter.layer(name, (in_, out))


def _singular_values(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Of s left right, (out, k) and (k, in), without forming it; of experts their mean over these, in squares."""
    small = torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT
    values: Tensor = torch.linalg.svdvals(small)
    if values.ndim == 2:
        values = values.square().mean(dim=0).sqrt()
    return abs(scaling) * values


def _largest_angle(one: Tensor, other: Tensor) -> float:
    """Between the spans of the rows, in degrees, from the sine: the cosine cannot tell small angles."""
    first, second = torch.linalg.qr(one.double().mT).Q, torch.linalg.qr(other.double().mT).Q
    sine = float(torch.linalg.matrix_norm(second - first @ (first.mT @ second), 2).max())
    return math.degrees(math.asin(min(1.0, sine)))


def _plain(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
