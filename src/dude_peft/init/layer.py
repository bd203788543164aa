"""The start of one layer: its weight read, hashed and split, and the tensors that go into the adapter file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.artifact.header import StoredTensor
from dude_peft.artifact.stock import layer_tensors, start_tensors, to_stock
from dude_peft.methods import Method, SplitOptions
from dude_peft.methods.start import start_of
from dude_peft.model.weights import read_weight


@dataclass(frozen=True)
class LayerTask:
    """One layer to initialise; plain values, since it travels to another process."""

    name: str
    stored: StoredTensor
    dtype: str
    """Of the weight in the model."""
    transposed: bool
    """Whether the weight is kept as (in, out)."""
    r: int
    scaling: float
    generator: str = ""
    """State of torch's generator before this layer, in hexadecimal, for methods that draw from it."""

    def read(self) -> tuple[Tensor, TensorPrint]:
        """The weight (out, in) in float32 (float64 stays), rounded to the model's dtype first, and its fingerprint.

        Raises ArtifactError where the file ends early.
        """
        weight, base = read_weight(self.stored, getattr(torch, self.dtype))
        return weight.T if self.transposed else weight, base


@dataclass(frozen=True)
class LayerStart:
    """What one layer gives."""

    tensors: dict[str, Tensor]
    """As stock PEFT reads them, by the names of `artifact.stock`."""
    base: TensorPrint
    captured: float | None
    """Share of the weight's energy that the factors hold, where an SVD was taken."""


def compute(task: LayerTask, method: Method, options: SplitOptions) -> LayerStart:
    """Start of one layer; the bits of `DudeLinear.add` on the same weight, then of saving it.

    Raises:
        ArtifactError: the file ends early.
        NumericsError: NaN or Inf in the weight.
    """
    W0, base = task.read()
    out, in_ = W0.shape
    if task.generator:
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(task.generator)), dtype=torch.uint8))
    start = start_of(method, W0, task.r, task.scaling, options, task.name)
    state = layer_tensors(method.delta, start_tensors(method, start, task.r, (out, in_), W0.dtype))
    return LayerStart(to_stock(state, task.scaling), base, start.split.captured)
