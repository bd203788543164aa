"""One adapted layer as stock PEFT reads it, and back.

The change s (BA - B0 A0) of a trained layer is s (dB A + B0 dA), a product of rank 2r. So the trained adapter IS a
stock adapter of rank 2r on the untouched base weight, with r and alpha doubled (the scaling stays):

    lora_A.weight = [A0 + dA; dA] (2r, in)    lora_B.weight = [dB, B0] (out, 2r)    lora_magnitude_vector.weight = m

Methods without a frozen start are stock adapters as they are: lora_A = A (r, in), lora_B = B (out, r).

Three small tensors more, which stock PEFT ignores, let our loader go on bit by bit: A0 (r, in), m0 and dm (out,); the
rest is in the stock tensors already. A fixed magnitude has no dm: stock PEFT reads m0.

Zero rows. Stock PEFT divides by the row norm, so a zero row of W0 loads as NaN there. We adapt such a row as LoRA does
(its gain is 1), so its stock magnitude is the norm of its change. Where that change is zero too, lora_B gets a 1 in the
row's first column and the magnitude is 0: stock PEFT then gives exactly 0 for the row, and our loader takes the 1 out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dude_peft.core.finite import is_finite
from dude_peft.errors import ArtifactError, NumericsError
from dude_peft.methods import Method

# PEFT itself writes the magnitude without ".weight", and reads both; transformers' load_adapter reads this one alone.
STOCK_A, STOCK_B, STOCK_M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"
EXTRA_A0, EXTRA_M0, EXTRA_DM = "lora_A0", "lora_m0", "lora_dm"


@dataclass(frozen=True)
class LayerTensors:
    """The state of one adapted layer; what a method has not is None."""

    dA: Tensor
    """(r, in) deviation of A; A itself without a frozen start."""
    dB: Tensor
    """(out, r) deviation of B; B itself without a frozen start."""
    A0: Tensor | None = None
    """(r, in) frozen start of A."""
    B0: Tensor | None = None
    """(out, r) frozen start of B."""
    m0: Tensor | None = None
    """(out,) row norms of W0."""
    dm: Tensor | None = None
    """(out,) deviation of the magnitude; None also where it is fixed."""

    def magnitude_change(self) -> Tensor:
        """The deviation of a magnitude that is there, trained or fixed, (out,)."""
        assert self.m0 is not None
        return torch.zeros_like(self.m0) if self.dm is None else self.dm


def stock_names(method: Method) -> tuple[str, ...]:
    """Names of the tensors that a layer of a method has on disk."""
    names = [STOCK_A, STOCK_B]
    if method.frozen_start:
        names.append(EXTRA_A0)
    if method.normalised:
        names += [STOCK_M, EXTRA_M0]
    if method.magnitude == "trained":
        names.append(EXTRA_DM)
    return tuple(names)


def to_stock(layer: LayerTensors, scaling: float) -> dict[str, Tensor]:
    """Tensors of one layer on disk, by name.

    Args:
        layer: state of the layer.
        scaling: s, needed for the norm of zero rows.

    Returns:
        The names of `stock_names`, each contiguous and with a storage of its own.
    """
    if layer.A0 is not None and layer.B0 is not None:
        A = layer.A0 + layer.dA
        lora_A = torch.cat([A, layer.dA.to(A.dtype)])
        lora_B = torch.cat([layer.dB.to(layer.B0.dtype), layer.B0], dim=1)
        tensors = {STOCK_A: lora_A, STOCK_B: lora_B, EXTRA_A0: layer.A0.clone()}
    else:
        lora_A, lora_B = layer.dA.clone(), layer.dB.clone()
        tensors = {STOCK_A: lora_A, STOCK_B: lora_B}
    if layer.m0 is not None:
        m = layer.m0 + layer.magnitude_change()
        zero = torch.nonzero(layer.m0 == 0).flatten()
        if zero.numel():
            norm = scaling * (lora_B[zero].to(m.dtype) @ lora_A.to(m.dtype)).norm(dim=1)
            m[zero] = norm
            lora_B[zero[norm == 0], 0] = 1
        tensors |= {STOCK_M: m, EXTRA_M0: layer.m0.clone()}
        if layer.dm is not None:
            tensors[EXTRA_DM] = layer.dm.clone()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def from_stock(
    tensors: Mapping[str, Tensor],
    method: Method,
    r: int,
    shape: tuple[int, int],
    where: str,
) -> LayerTensors:
    """State of one layer from its tensors on disk; the inverse of `to_stock`, bit by bit.

    Args:
        tensors: by name, exactly those of `stock_names`.
        method: of the adapter.
        r: rank of the layer as the user set it (the file holds 2r with a frozen start).
        shape: (out, in) of the base weight.
        where: name of the layer, for messages.

    Returns:
        LayerTensors.

    Raises:
        ArtifactError: a shape or dtype is wrong, or the stock tensors and ours disagree.
        NumericsError: NaN or Inf.
    """
    out, in_ = shape
    ranks = 2 * r if method.frozen_start else r
    shapes = {
        STOCK_A: (ranks, in_),
        STOCK_B: (out, ranks),
        EXTRA_A0: (r, in_),
        STOCK_M: (out,),
        EXTRA_M0: (out,),
        EXTRA_DM: (out,),
    }
    for name in stock_names(method):
        tensor = tensors[name]
        if tuple(tensor.shape) != shapes[name]:
            raise ArtifactError(
                f"tensor '{where}.{name}' has shape {tuple(tensor.shape)}, but the base layer and rank {r} need "
                f"{shapes[name]}; load the adapter on the base model it was trained on"
            )
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ArtifactError(
                f"tensor '{where}.{name}' has dtype {tensor.dtype}, not a float dtype; save the adapter again"
            )
        if not is_finite(tensor):
            raise NumericsError(
                f"tensor '{where}.{name}' holds NaN or Inf; training diverged, use an earlier checkpoint"
            )
    lora_A, lora_B = tensors[STOCK_A], tensors[STOCK_B].clone()
    m0 = dm = None
    if method.normalised:
        m0, dm, m = tensors[EXTRA_M0], tensors.get(EXTRA_DM), tensors[STOCK_M]
        own = m0 if dm is None else m0 + dm
        if not torch.equal(own, m):
            zero = m0 == 0
            if not torch.equal(own[~zero], m[~zero]):
                raise _disagreement(where, STOCK_M)
        if not bool(m0.all()):
            lora_B[(m0 == 0) & (m == 0), 0] = 0
    if not method.frozen_start:
        return LayerTensors(dA=lora_A.clone(), dB=lora_B, m0=m0, dm=dm)
    A0, dA = tensors[EXTRA_A0], lora_A[r:].clone()
    if not torch.equal(A0 + dA, lora_A[:r]):
        raise _disagreement(where, STOCK_A)
    return LayerTensors(dA=dA, dB=lora_B[:, :r].clone(), A0=A0, B0=lora_B[:, r:].clone(), m0=m0, dm=dm)


def _disagreement(where: str, name: str) -> ArtifactError:
    return ArtifactError(
        f"tensor '{where}.{name}' does not match the start stored in the same file; the file was edited or mixed from "
        "two adapters: use the file as it was saved"
    )
