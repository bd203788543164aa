"""One adapted layer as stock PEFT reads it, and back.

The change s (BA - B0 A0) of a trained layer is s (dB A + B0 dA), a product of rank 2r. So the trained adapter IS a
stock adapter of rank 2r on the untouched base weight, with r and alpha doubled (the scaling stays):

    lora_A.weight = [A0 + dA; dA] (2r, in)    lora_B.weight = [dB, B0] (out, 2r)    lora_magnitude_vector.weight = m

Methods without a frozen start are stock adapters as they are: lora_A = A (r, in), lora_B = B (out, r).

Three small tensors more, which stock PEFT ignores, let our loader go on bit by bit: A0 (r, in), m0 and dm (out,); the
rest is in the stock tensors already. A fixed magnitude has no dm: stock PEFT reads m0.

A change made out of small tensors (`methods.delta`) is a stock adapter too: lora_A = R (k, in), lora_B = L (out, k).
Its trained tensors are beside as lora_t.NAME and its frozen ones as lora_f.NAME, and our loader goes on from these; L
and R are made again only to see that the file's belong to them.

A change without a rank is no stock adapter: its trained tensors are all there is, and adapter_config.json names a type
that stock PEFT does not know and refuses.

Zero rows. Stock PEFT divides by the row norm, so a zero row of W0 loads as NaN there. We adapt such a row as LoRA does
(its gain is 1), so its stock magnitude is the norm of its change. Where that change is zero too, lora_B gets a 1 in the
row's first column and the magnitude is 0: stock PEFT then gives exactly 0 for the row, and our loader takes the 1 out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dude_peft.core.finite import is_finite
from dude_peft.errors import ArtifactError, NumericsError
from dude_peft.methods import Delta, DeltaStart, Method, Split
from dude_peft.methods.sizes import sides
from dude_peft.methods.start import Start

# PEFT itself writes the magnitude without ".weight", and reads both; transformers' load_adapter reads this one alone.
STOCK_A, STOCK_B, STOCK_M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"
STOCK_NAMES = (STOCK_A, STOCK_B, STOCK_M)
EXTRA_A0, EXTRA_M0, EXTRA_DM = "lora_A0", "lora_m0", "lora_dm"
EXTRA_TRAINED, EXTRA_FROZEN = "lora_t.", "lora_f."
# L and R that another machine made of the same tensors differ by its order of sums.
_SAME_FACTORS = 1e-5


class LayerTensors(NamedTuple):
    """The state of one adapted layer; what a method has not is None."""

    dA: Tensor | None
    """(r, in) deviation of A; A itself without a frozen start; R (k, in) of a delta, None for the identity."""
    dB: Tensor
    """(out, r) deviation of B; B itself without a frozen start; L (out, k) of a delta."""
    A0: Tensor | None = None
    """(r, in) frozen start of A."""
    B0: Tensor | None = None
    """(out, r) frozen start of B."""
    m0: Tensor | None = None
    """(out,) row norms of W0."""
    dm: Tensor | None = None
    """(out,) deviation of the magnitude; None also where it is fixed."""
    trained: Mapping[str, Tensor] | None = None
    """Of a delta: the tensors that L and R are made of, by name."""
    frozen: Mapping[str, Tensor] | None = None
    """Of a delta: those that stay."""

    @property
    def learned(self) -> list[Tensor]:
        """Every tensor that training changes."""
        change = (self.dA, self.dB, self.dm) if self.trained is None else (*self.trained.values(), self.dm)
        return [tensor for tensor in change if tensor is not None]

    @property
    def kept(self) -> dict[str, Tensor]:
        """What a layer holds of this state, by the names of `start_tensors`."""
        pair = {"dA": self.dA, "dB": self.dB, "A0": self.A0, "B0": self.B0} if self.trained is None else {}
        parts = {**pair, **(self.trained or {}), **(self.frozen or {}), "m0": self.m0, "dm": self.dm}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def magnitude_change(self) -> Tensor:
        """The deviation of a magnitude that is there, trained or fixed, (out,)."""
        assert self.m0 is not None
        return torch.zeros_like(self.m0) if self.dm is None else self.dm


def start_tensors(
    method: Method,
    start: Start | None,
    r: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """What a layer keeps at its start, by the names of `LayerTensors`, and of a delta by that method's own.

    Args:
        method: entry of the table.
        start: of the layer; None gives zeros, into which a file is loaded (they are the base model too).
        r: rank.
        shape: (out, in) of the base weight.
        dtype: float32 or better.
        device: where the tensors are made.
    """
    out, in_ = shape

    def own(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype).contiguous()

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    split = None if start is None else start.split
    if method.delta is not None:
        letters = {**method.delta.trained, **method.delta.frozen}
        if isinstance(split, DeltaStart):
            tensors = {name: own(split.tensors[name]) for name in letters}
        else:
            tensors = {name: zeros(*sides(letters[name], out, in_, r)) for name in letters}
    else:
        A, B = (split.A, split.B) if isinstance(split, Split) else (zeros(r, in_), zeros(out, r))
        tensors = {"dA": own(A), "dB": zeros(out, r)}
        if method.frozen_start:
            assert B is not None
            tensors |= {"dA": zeros(r, in_), "A0": own(A), "B0": own(B)}
    if method.normalised:
        tensors["m0"] = zeros(out) if start is None else own(start.m0)
    if method.magnitude == "trained":
        tensors["dm"] = zeros(out)
    return tensors


def layer_tensors(delta: Delta | None, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """State of a layer from what it keeps, named as in `start_tensors`; L and R are made here, where it has a delta."""
    get = tensors.get
    if delta is None:
        return LayerTensors(tensors["dA"], tensors["dB"], get("A0"), get("B0"), get("m0"), get("dm"))
    trained, frozen = ({name: tensors[name] for name in names} for names in (delta.trained, delta.frozen))
    L, R = delta.pair({**trained, **frozen})
    return LayerTensors(dA=R, dB=L, m0=get("m0"), dm=get("dm"), trained=trained, frozen=frozen)


def stock_shapes(method: Method, r: int, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a layer (out, in) of rank r has on disk."""
    out, in_ = shape
    k = method.multiple * r
    shapes: dict[str, tuple[int, ...]] = {STOCK_A: (k, in_), STOCK_B: (out, k)} if method.ranked else {}
    if method.frozen_start:
        shapes[EXTRA_A0] = (r, in_)
    if method.normalised:
        shapes |= {STOCK_M: (out,), EXTRA_M0: (out,)}
    if method.magnitude == "trained":
        shapes[EXTRA_DM] = (out,)
    if method.delta is not None:
        for prefix, group in ((EXTRA_TRAINED, method.delta.trained), (EXTRA_FROZEN, method.delta.frozen)):
            shapes |= {f"{prefix}{name}": sides(letters, out, in_, r) for name, letters in group.items()}
    return shapes


def stock_names(method: Method) -> tuple[str, ...]:
    """Names of the tensors that a layer of a method has on disk."""
    return tuple(stock_shapes(method, 1, (1, 1)))


def to_stock(layer: LayerTensors, scaling: float) -> dict[str, Tensor]:
    """Tensors of one layer on disk, by name.

    Args:
        layer: state of the layer.
        scaling: s, needed for the norm of zero rows.

    Returns:
        The names of `stock_names`, each contiguous and with a storage of its own.
    """
    tensors: dict[str, Tensor] = {}
    if layer.dA is None:
        pass  # the trained tensors are all
    elif layer.A0 is not None and layer.B0 is not None:
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
    for prefix, group in ((EXTRA_TRAINED, layer.trained), (EXTRA_FROZEN, layer.frozen)):
        tensors |= {f"{prefix}{name}": tensor.clone() for name, tensor in (group or {}).items()}
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
        r: rank of the layer as the user set it (the file holds a multiple of it).
        shape: (out, in) of the base weight.
        where: name of the layer, for messages.

    Returns:
        LayerTensors.

    Raises:
        ArtifactError: a shape or dtype is wrong, or the stock tensors and ours disagree.
        NumericsError: NaN or Inf.
    """
    for name, wanted in stock_shapes(method, r, shape).items():
        tensor = tensors[name]
        if tuple(tensor.shape) != wanted:
            raise ArtifactError(
                f"tensor '{where}.{name}' has shape {tuple(tensor.shape)}, but the base layer and rank {r} need "
                f"{wanted}; load the adapter on the base model it was trained on"
            )
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ArtifactError(
                f"tensor '{where}.{name}' has dtype {tensor.dtype}, not a float dtype; save the adapter again"
            )
        if not is_finite(tensor):
            raise NumericsError(
                f"tensor '{where}.{name}' holds NaN or Inf; training diverged, use an earlier checkpoint"
            )
    if method.delta is not None and not method.ranked:
        trained = {name: tensors[f"{EXTRA_TRAINED}{name}"].clone() for name in method.delta.trained}
        return layer_tensors(method.delta, trained)
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
    if method.delta is not None:
        return _from_delta(method.delta, tensors, lora_A, lora_B, m0, dm, where)
    if not method.frozen_start:
        return LayerTensors(dA=lora_A.clone(), dB=lora_B, m0=m0, dm=dm)
    A0, dA = tensors[EXTRA_A0], lora_A[r:].clone()
    if not torch.equal(A0 + dA, lora_A[:r]):
        raise _disagreement(where, STOCK_A)
    return LayerTensors(dA=dA, dB=lora_B[:, :r].clone(), A0=A0, B0=lora_B[:, r:].clone(), m0=m0, dm=dm)


def _from_delta(
    delta: Delta,
    tensors: Mapping[str, Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    m0: Tensor | None,
    dm: Tensor | None,
    where: str,
) -> LayerTensors:
    """The file's own L and R, as stock PEFT computes with them, after a look whether its small tensors make them."""
    trained, frozen = (
        {name: tensors[f"{prefix}{name}"].clone() for name in names}
        for prefix, names in ((EXTRA_TRAINED, delta.trained), (EXTRA_FROZEN, delta.frozen))
    )
    L, R = delta.pair({name: tensor.double() for name, tensor in {**trained, **frozen}.items()})
    assert R is not None
    for name, stored, made in ((STOCK_B, lora_B, L), (STOCK_A, lora_A, R)):
        if not bool((stored.double() - made).norm() <= _SAME_FACTORS * made.norm()):
            raise _disagreement(where, name)
    return LayerTensors(dA=lora_A.clone(), dB=lora_B, m0=m0, dm=dm, trained=trained, frozen=frozen)


def _disagreement(where: str, name: str) -> ArtifactError:
    return ArtifactError(
        f"tensor '{where}.{name}' does not match the start stored in the same file; the file was edited or mixed from "
        "two adapters: use the file as it was saved"
    )
