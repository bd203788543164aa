"""One layer in the folded form: W0 - s B0 A0 quantised, and an adapter that starts at A0 and B0 on top of it.

The adapter is a DoRA (of a PiSSA: a LoRA) whose base is the quantised residual Q, so B A is added to Q as it is:

    V = Q(W0 - s B0 A0) + s B A,    A = A0, B = B0, m = ||V|| at the start (g = 1),    m0 = ||Q||

Only here: everywhere else DuDe leaves the base alone and trains deviations. With this adapter disabled, or its weights
decayed to zero, what is left is Q, not the pretrained model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.artifact.stock import LayerTensors, to_stock
from dude_peft.core.magnitude import row_norm
from dude_peft.init.bnb import quantise
from dude_peft.init.layer import LayerTask
from dude_peft.methods import Method, SplitOptions
from dude_peft.methods.start import start_of
from dude_peft.model.weights import read_weight


@dataclass(frozen=True)
class ResidualLayer:
    """What one layer gives."""

    adapter: dict[str, Tensor]
    """As stock PEFT reads them, by the names of `artifact.stock`."""
    base: dict[str, Tensor]
    """The quantised residual, by the names of `bnb.QuantisedWeight`."""
    print: TensorPrint
    """Fingerprint of the quantised residual."""
    error: float
    """||Q(W0 - s B0 A0) + s B0 A0 - W0|| / ||W0||."""
    plain_error: float
    """||Q(W0) - W0|| / ||W0||."""


def compute(task: LayerTask, method: Method, options: SplitOptions, form: str) -> ResidualLayer:
    """The folded form of one layer.

    Args:
        task: the layer.
        method: dude or pissa.
        options: settings of its split.
        form: nf4 or int8.

    Raises:
        ArtifactError: the file ends early.
        ConfigError: a layer that cannot be quantised.
        NumericsError: NaN or Inf in the weight, or a weight outside the format's range.
    """
    dtype = getattr(torch, task.dtype)
    stored, _ = read_weight(task.stored, dtype)
    W0 = stored.T.contiguous() if task.transposed else stored
    split, _ = start_of(method, W0, task.r, task.scaling, replace(options, overwrite=False), task.name)
    A0, B0 = split.A.to(torch.float32).contiguous(), split.B.to(torch.float32).contiguous()  # type: ignore[union-attr]
    norm = float(W0.norm()) or 1.0
    plain_error = float((quantise(W0, form, dtype, task.name).values - W0).norm()) / norm
    quantised = quantise(torch.addmm(W0, B0.to(W0), A0.to(W0), alpha=-task.scaling), form, dtype, task.name)
    V = torch.addmm(quantised.values, B0, A0, alpha=task.scaling)
    error = float((V - W0).norm()) / norm
    m0 = dm = None
    if method.normalised:
        m0 = row_norm(quantised.values).float()
        dm = (row_norm(V) - m0).float()
    state = LayerTensors(dA=A0, dB=B0, m0=m0, dm=dm)
    return ResidualLayer(to_stock(state, task.scaling), quantised.tensors, quantised.base, error, plain_error)
