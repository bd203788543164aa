"""Row norms and the gain g = m / n, without ever forming the direction V.

The norm of V = W0 + s D, with D = dB A + B0 dA, follows from the change alone:

    n^2 = m0^2 + q,    q = 2 s <D, W0> + s^2 ||D||^2         (one number per output row, m0 = ||W0||)
      = 2 s rowsum(L * (W0 R^T + s/2 L R R^T)),              L = [dB, B0] (out, 2r),  R = [A; dA] (2r, in)

so the only thing that touches W0 is a product with r rows, which works through a quantised layer's own forward.
The gain is computed from the two deviations,

    g = 1 + (dm - (n - m0)) / n,    n - m0 = q / (n + m0),

so that it is exactly 1 where nothing changed, whatever the dtypes. Sums run in float64 (they are (out, r)-sized),
which keeps rows of 1e-25 and of 1e+25 alive; the result is handed out in the adapter's precision, float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dude_peft.core import compose
from dude_peft.core.rounding import is_half
from dude_peft.core.scratch import scratch
from dude_peft.core.stack import stack_product

# Elements converted at a time when a half-precision weight meets float32 factors: 4 MiB of float32.
_CHUNK_ELEMENTS = 1 << 20
# |g| is kept away from 0 by this much: far below any rounding of an output, and y / g still gives the product back.
_SMALLEST_GAIN = 1e-30

Change: TypeAlias = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]
"""What a norm is computed from: W0 dA^T, W0 A0^T, dA, dB, A0, B0, as `norm_change` takes them."""


def row_norm(W: Tensor) -> Tensor:
    """L2 norm of every output row, `m0_j = ||W_j||`.

    Args:
        W: (out, in), any floating dtype; or a stack (experts, out, in).

    Returns:
        (out,) float64 (float32 on devices without float64), or (experts, out). Overflow- and underflow-free for every
        float32 entry.

    Source: DoRA section 4.1 (there called column-wise).
    """
    if W.ndim == 3:
        return torch.stack([row_norm(expert) for expert in W])
    # Into one tensor: small results kept between large temporaries would fragment the heap, by a copy of W and more.
    norms = torch.empty(W.shape[0], dtype=_wide(W), device=W.device)
    start = 0
    for chunk in _chunks(W.detach()):
        norms[start : start + len(chunk)] = chunk.to(norms.dtype).square().sum(dim=1).sqrt()
        start += len(chunk)
    return norms


def rows_product(W0: Tensor, rows: Tensor) -> Tensor:
    """Product `W0 rows^T` accumulated in the precision of `rows`, without a full copy of W0.

    Args:
        W0: (out, in) base weight, any floating dtype; it gets no gradient. Or a stack (experts, out, in).
        rows: (k, in) a few rows, float32 or float64; of a stack (experts, k, in).

    Returns:
        (out, k) in the dtype of `rows`, differentiable in `rows`; of a stack (experts, out, k).
    """
    W0 = W0.detach()
    if W0.ndim == 3:
        return stack_product(W0, rows)
    if W0.dtype == rows.dtype:
        return W0 @ rows.T
    kernels = compose.kernels_for(W0)
    if kernels is not None and rows.dtype == torch.float32 and is_half(W0.dtype):
        return kernels.rows_product(W0, rows)
    product: Tensor = _RowsProduct.apply(W0, rows)
    return product


class _RowsProduct(torch.autograd.Function):
    """The product in chunks of W0, each converted into the same buffer: fresh memory would cost more than the work."""

    @staticmethod
    def forward(ctx: Any, W0: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(W0)
        product = rows.new_empty(W0.shape[0], rows.shape[0])
        rows_t = rows.T.contiguous()
        for at, chunk in _converted(W0, rows.dtype):
            torch.mm(chunk, rows_t, out=product[at])
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (W0,) = ctx.saved_tensors
        total = grad.new_zeros(grad.shape[1], W0.shape[1])
        for at, chunk in _converted(W0, grad.dtype):
            total.addmm_(grad[at].T, chunk)
        return None, total


def norm_change(
    W0_dA: Tensor,
    W0_A0: Tensor | None,
    dA: Tensor,
    dB: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
) -> Tensor:
    """Change of the squared row norm, `q = 2 s <D, W0> + s^2 ||D||^2`; of a stack, each tensor has one axis more.

    Args:
        W0_dA: (out, r) W0 dA^T, from `rows_product` or the frozen layer itself.
        W0_A0: (out, r) W0 A0^T; None with A0.
        dA: (r, in) deviation of A.
        dB: (out, r) deviation of B.
        A0: (r, in) frozen start; None where the method has none (then dA is A itself).
        B0: (out, r) frozen start, with A0.
        scaling: s.

    Returns:
        (out,) float64, differentiable in W0_dA, dA and dB.

    Source: DESIGN section 2; the factored norm is DoRA's with the whole matrix multiplied out.
    """
    left, products, squares = norm_terms((W0_dA, W0_A0, dA, dB, A0, B0))
    added = torch.baddbmm if left.ndim == 3 else torch.addmm
    return change_of(left, added(products, left, squares, alpha=scaling / 2), scaling)


def norm_terms(change: Change, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What the change of the norm is made of: L, `W0 R^T` (out, k), `R R^T` (k, k); k is 2r, or r without A0.

    The first two are written into `out`, where it is given.
    """
    W0_dA, W0_A0, dA, dB, A0, B0 = change
    if W0_A0 is None or A0 is None or B0 is None:
        if out is None:
            return dB, W0_dA, dA @ dA.mT
        return out[0].copy_(dB), out[1].copy_(W0_dA), dA @ dA.mT
    right = torch.cat([A0 + dA, dA], dim=-2)
    L, products = (None, None) if out is None else out
    left = torch.cat([dB, B0], dim=-1, out=L)
    return left, torch.cat([W0_A0 + W0_dA, W0_dA], dim=-1, out=products), right @ right.mT


def change_of(left: Tensor, terms: Tensor, scaling: float) -> Tensor:
    """Change of the squared row norm, `q = 2 s rowsum(L * terms)` with terms W0 R^T + s/2 L R R^T: (*, out) float64."""
    return 2 * scaling * (left.to(_wide(left)) * terms).sum(dim=-1)


def gain(m0: Tensor, dm: Tensor, q: Tensor, norm_gradient: str = "detached") -> Tensor:
    """Gain `g = (m0 + dm) / sqrt(m0^2 + q)` of every output row, exactly 1 where dm = 0 and q = 0.

    Args:
        m0: (out,) row norms of W0.
        dm: (out,) trained deviation of the magnitude.
        q: (out,) change of the squared norm, from `norm_change`.
        norm_gradient: "detached" (DoRA section 4.3) or "exact".

    Returns:
        (out,) in dm's dtype, at least float32, differentiable in dm and, with "exact", in q. Zero rows of W0 (m0 = 0)
        give 1, rows whose V vanished give 0 and, like rows with m = 0, come out as 2e-30. Finite arguments give finite
        gains.
    """
    wide = _wide(dm)
    m0, q = m0.to(wide), q.to(wide)
    if norm_gradient == "detached":
        q = q.detach()
    n_squared = m0.square() + q
    alive = n_squared > 0
    n = torch.where(alive, n_squared, 1.0).sqrt()
    g = torch.where(alive, 1 + (dm.to(wide) - q / (n + m0)) / n, 0.0)
    g = torch.where(m0 == 0, 1.0, g)
    narrow = torch.promote_types(dm.dtype, torch.float32)
    # A denormal row under a large m would overflow float32; the clamp keeps it finite.
    limit = torch.finfo(narrow).max
    g = torch.where(g.abs() < _SMALLEST_GAIN, g + 2 * _SMALLEST_GAIN, g)  # a sum, so that the gradient stays
    # One NaN for all: the dithered rounding counts on the bits of its arguments.
    g = torch.where(g.isnan(), torch.nan, g)
    return g.clamp(-limit, limit).to(narrow)


def direction_change(
    W0_dA: Tensor,
    W0_A0: Tensor | None,
    dA: Tensor,
    dB: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
    m0: Tensor,
) -> Tensor:
    """How far every row of the direction turned, `1 - cos(V, W0)`, from what `norm_change` takes and m0 (out,).

    Returns:
        (out,) float64, 0 where W0 or V has a zero row.

    Source: DoRA section 3.2.
    """
    q = norm_change(W0_dA, W0_A0, dA, dB, A0, B0, scaling)
    # The squared part alone: the same formula with the products with W0 left out.
    zeros = torch.zeros_like(W0_dA)
    t = norm_change(zeros, None if W0_A0 is None else zeros, dA, dB, A0, B0, scaling)
    return turned_by((q - t) / 2, t, m0)


def turned_by(p: Tensor, t: Tensor, m0: Tensor) -> Tensor:
    """`1 - cos(V, W0)` of every row from p = s <D, W0>, t = ||s D||^2 and m0, (out,) each.

    It is (m0^2 t - p^2) / (n m0 (n m0 + m0^2 + p)), which does not cancel for small turns as 1 minus the cosine would.

    Returns:
        (out,) float64, 0 where W0 or V has a zero row.
    """
    m0 = m0.to(_wide(m0))
    n = direction_norm(m0, 2 * p + t)
    turned = (m0.square() * t - p.square()).clamp_min(0)
    below = n * m0 * (n * m0 + m0.square() + p)
    return torch.where(below > 0, turned / below, 0.0)


def whole_direction_change(W0: Tensor, D: Tensor) -> Tensor:
    """`1 - cos(V, W0)` of every row of V = W0 + D, from both (out, in) matrices: (out,) float64."""
    W0, D = W0.double(), D.double()
    return turned_by((D * W0).sum(dim=1), D.square().sum(dim=1), row_norm(W0))


def gain_slope(m0: Tensor, q: Tensor) -> Tensor:
    """Slope of the gain, `dg / ddm = 1 / n`, the norm a constant: (out,) float64, 0 on zero rows of W0 and V."""
    n = direction_norm(m0, q)
    return torch.where((n > 0) & (m0 != 0), 1 / n, 0.0)


def direction_norm(m0: Tensor, q: Tensor) -> Tensor:
    """Row norm `n = sqrt(m0^2 + q)` of the direction V, (out,) float64; 0 where V vanished."""
    return (m0.to(_wide(m0)).square() + q).clamp_min(0).sqrt()


def _chunks(W: Tensor) -> tuple[Tensor, ...]:
    return W.split(max(1, _CHUNK_ELEMENTS // max(1, W.shape[1])))


def _converted(W: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    if torch.compiler.is_compiling():
        yield slice(0, W.shape[0]), W.to(dtype)
        return
    start = 0
    for chunk in _chunks(W):
        stop = start + chunk.shape[0]
        buffer = scratch(chunk, dtype, "weight")
        yield slice(start, stop), buffer.copy_(chunk)
        start = stop


def _wide(t: Tensor) -> torch.dtype:
    """float64, but float32 on devices that have no float64."""
    return torch.float32 if t.device.type == "mps" else torch.float64
