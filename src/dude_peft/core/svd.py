"""The leading singular triplets of a weight matrix, in a second instead of a minute.

DuDe starts from the top r singular triplets of every target weight, and a full SVD of every one of them takes
hours on a 7B model. `top_svd` grows a Krylov subspace a few columns at a time and stops once the energy of its
top r singular values no longer rises. Traded off:

- A small block (16 columns) needs more passes over W than one of r columns but far fewer columns in all. Its
  weakness, singular values repeated more often than the block is wide, is met when the energy first stalls: random
  columns widen the block, and the search ends only if the energy still does not rise.
- Every new column is orthogonalised against all earlier ones. At r = 128 that takes up to half of the time; it buys
  factors orthonormal to rounding and no spurious copies of singular values.
- Small problems (k x k) are solved in float64 on the CPU whatever the device, large ones stay in W's precision.
- `tol` bounds a gain, not an error: the energy that is missed in the end is usually far below it, but a spectrum
  that stays dense up to its very top can miss a few times `tol`. The basis never exceeds 16 r + 512 columns.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dude_peft.errors import ConfigError, NumericsError

_LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_BLOCK = 16  # columns per step: 8 are slower on one core, 32 need 1.5 times the basis
_SMALL = 512  # up to this side, or up to 6 r, a full SVD is as quick


class TopSVD(NamedTuple):
    """The leading part of W ≈ U diag(S) Vh; U and Vh are orthonormal to rounding, also where S is zero."""

    U: Tensor  # (out, r) orthonormal columns; the largest entry of each, by absolute value, is positive
    S: Tensor  # (r,) descending, >= 0; what cannot be told from rounding noise is exactly 0
    Vh: Tensor  # (r, in) orthonormal rows
    captured: float  # sum(S²) / ||W||_F², in [0, 1]; 1.0 for a zero matrix
    rank: int  # how many of S are not zero


@torch.no_grad()
def top_svd(
    W: Tensor, r: int, *, tol: float = 1e-3, seed: int = 0, exact: bool = False, overwrite: bool = False
) -> TopSVD:
    """Return the r largest singular values of W and their vectors.

        W (out, in) ≈ U (out, r) diag(S) Vh (r, in),     captured = sum(S²) / ||W||_F²

    The result depends only on W, r, tol, seed, the device and the number of threads; the global random state is
    neither read nor changed. Where S is zero (a matrix of lower rank), U and Vh are completed with arbitrary
    orthonormal vectors, so that the promise about them holds without exception.

    Args:
        W: (out, in), bfloat16, float16, float32 or float64; half precision is computed and returned in float32.
        r: how many triplets, 1 to min(out, in).
        tol: stop when the captured energy of the top r rises by less than this fraction, twice in a row; in (0, 1).
        seed: of the random start block, which is drawn on the CPU and so is the same for every device.
        exact: compute a full SVD, as is always done for small matrices and for r close to min(out, in).
        overwrite: work in W's own memory where its precision allows, and leave other numbers there: no copy is made.

    Raises:
        ConfigError: W is not a dense floating-point matrix with values, or r, tol or seed is out of range.
        NumericsError: W has NaN or Inf, an SVD does not converge, or a singular value is too large for its dtype.

    Source: the use, DuDe, arXiv 2505.14367; the method, block Krylov iteration, Musco & Musco 2015,
    arXiv 1504.05477, here with small blocks and full reorthogonalisation (Golub-Kahan).
    """
    _check_arguments(W, r, tol, seed)
    exponent = _binary_exponent(W)  # a power of two scales exactly, and then no square overflows or is lost
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    A = W.to(dtype, copy=not overwrite).mul_(2.0**-exponent)
    full = exact or min(A.shape) <= max(_SMALL, 6 * r)
    with full_precision_products(A.device):
        U, S, Vh = _full_svd(A) if full else _krylov_svd(A, r, tol, seed)
    U, S, Vh = U[:, :r], S[:r], Vh[:r]

    noise = torch.finfo(S.dtype).eps * sum(map(math.sqrt, A.shape)) * S[0]  # norm of independent rounding errors
    S = torch.where(noise < S, S, 0.0)
    energy = float(torch.linalg.vector_norm(A, dim=1).cpu().double().square().sum())
    captured = min(1.0, float(S.cpu().double().square().sum()) / energy) if energy else 1.0

    peak = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).squeeze(0)  # (r,)
    sign = torch.where(peak < 0, -1.0, 1.0).to(U)
    rank = int(torch.count_nonzero(S))
    S = S * 2.0**exponent
    if not math.isfinite(S[0]):
        raise NumericsError(f"the largest singular value does not fit {S.dtype}: pass the weight as float64")
    return TopSVD((U * sign).contiguous(), S, (Vh * sign[:, None]).contiguous(), captured, rank)


def _check_arguments(W: Tensor, r: int, tol: float, seed: int) -> None:
    shape = tuple(W.shape)
    if W.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ConfigError(f"an SVD needs a floating-point weight, not {W.dtype}: dequantise it first")
    if W.layout != torch.strided:
        raise ConfigError(f"an SVD needs a dense weight, not {W.layout}: pass W.to_dense()")
    if W.is_meta:
        raise ConfigError(f"the weight of shape {shape} is on the meta device and has no values: load it first")
    if W.ndim != 2:
        raise ConfigError(f"an SVD needs a matrix, not shape {shape}: reshape the weight to (out, in)")
    if not isinstance(r, int) or not 1 <= r <= min(shape):
        raise ConfigError(f"r = {r} is not an integer from 1 to {min(shape)}, the limit for shape {shape}: change r")
    if not 0 < tol < 1:
        raise ConfigError(f"tol = {tol} is not between 0 and 1: 1e-3 is usual, exact=True leaves no error")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed = {seed} is not an integer from 0 to 2**63 - 1: choose one")


def _binary_exponent(W: Tensor) -> int:
    """Return e with max |W| near 2**e, such that 2**e and 2**-e are normal numbers of the dtype computed in."""
    lowest, highest = map(float, torch.aminmax(W))  # one pass without a copy; NaN and Inf show up in it
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        row, column = torch.nonzero(~torch.isfinite(W))[0].tolist()
        raise NumericsError(f"the weight is {float(W[row, column])} at [{row}, {column}]: repair the checkpoint")
    limit = 1022 if W.dtype == torch.float64 else 126
    return max(-limit, min(limit, math.frexp(max(-lowest, highest))[1]))


@contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """Switch off autocast and TF32, in which new columns could not be told from rounding noise.

    TF32's switch is the process's: who takes SVDs in several threads enters this around them all.
    """
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    with torch.autocast(device.type, enabled=False):
        try:
            if device.type == "cuda":
                matmul.fp32_precision = "ieee"
            yield
        finally:
            if device.type == "cuda":
                matmul.fp32_precision = "none"  # what it is told for all of torch, which may have been the case
                if matmul.fp32_precision != precision:
                    matmul.fp32_precision = precision


def _full_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        return U, S, Vh
    except _LinAlgError:
        pass  # rare, and a matter of rounding: other bits in another order go through
    try:
        V, S, Uh = torch.linalg.svd(_on_cpu_in_float64(A).T, full_matrices=False)
    except _LinAlgError as error:
        what = f"the SVD of a {A.shape[0]} x {A.shape[1]} matrix does not converge, not even in float64"
        raise NumericsError(f"{what}: look for damaged values in the weight") from error
    return Uh.T.to(A), S.to(A), V.T.to(A)


def _krylov_svd(A: Tensor, r: int, tol: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block Golub-Kahan: grow orthonormal rows `left` and `right` with left A = coreᵀ right, until the top r settle."""
    if A.shape[0] > A.shape[1]:
        V, S, Uh = _krylov_svd(A.T, r, tol, seed)
        return Uh.T, S, V.T
    rows, columns = A.shape
    generator = torch.Generator(device="cpu").manual_seed(seed)
    left, right = A.new_empty(0, rows), A.new_empty(0, columns)
    core = torch.empty(0, 0, dtype=torch.float64, device="cpu")
    newest = right  # the rows of `right` that A has not been applied to yet
    width, limit = _BLOCK, min(rows, 16 * r + 512)
    spacing = max(2 * _BLOCK, r // 2)
    energy, stalls, next_check = 0.0, 0, r + spacing
    while True:
        n_random = min(width - newest.shape[0], columns - right.shape[0])
        if n_random > 0:
            newest = torch.cat([newest, _random_directions(right, n_random, generator)])
        new_left, _, _ = _split_off(newest @ A.T, left)
        newest, old_part, new_part = _split_off(new_left @ A, right)
        left, right = torch.cat([left, new_left]), torch.cat([right, newest])
        grown = torch.nn.functional.pad(core, (0, 0, 0, newest.shape[0]))
        core = torch.cat([grown, torch.cat([old_part, new_part])], dim=1)

        size = left.shape[0]
        if size >= limit or (n_random > 0 and new_left.shape[0] == 0):  # nothing is left of A outside the basis
            break
        if size >= next_check:
            next_check = size + max(spacing, size // 8)
            previous, energy = energy, _top_energy(core, r)
            stalls = stalls + 1 if energy - previous < tol * energy else 0
            if stalls == 2:
                break
            width += _BLOCK * stalls

    P, S, Qh = _leading(core, r, wide=A.dtype == torch.float64)  # A ≈ leftᵀ coreᵀ right
    U = _completed(Qh.to(A) @ left, r, generator)
    V = _completed(P.T.to(A) @ right, r, generator)
    return U.T, torch.nn.functional.pad(S, (0, r - len(S))).to(A), V


def _leading(core: Tensor, r: int, *, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The top r singular triplets of `core`, or all where it has fewer; `wide`: to the precision of float64.

    The eigenvectors of core coreᵀ take a fourth of an SVD's time. Singular values below 1e-8 of the first are lost in
    it, and vectors of those below 1e-4 are not orthonormal to more than float32's rounding.
    """
    if not wide and r <= core.shape[0]:
        try:
            squares, P = torch.linalg.eigh(core @ core.T)
            S, P = squares[-r:].flip(0).clamp(min=0).sqrt(), P[:, -r:].flip(1)
            if S[-1] > 1e-4 * S[0]:
                return P, S, (P.T @ core) / S[:, None]
        except _LinAlgError:
            pass
    P, S, Qh = _full_svd(core)
    return P[:, :r], S[:r], Qh[:r]


def _top_energy(core: Tensor, r: int) -> float:
    try:
        return float(torch.linalg.eigvalsh(core @ core.T)[-r:].sum())  # four times as quick as an SVD
    except _LinAlgError:
        return float(_full_svd(core)[1][:r].square().sum())


def _split_off(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write blockᵀ (n, b) = basisᵀ (n, k) old (k, b) + directionsᵀ (n, d) new (d, b), all rows orthonormal; d <= b.

    Two rounds suffice since the first keeps nothing within 10 roundings of `basis`; what half vanishes in the second
    was not new. `old` and `new` are float64 on the CPU.
    """
    noise = 10 * torch.finfo(block.dtype).eps * float(torch.linalg.vector_norm(block))
    old = basis @ block.T
    directions, lengths = _orthonormal_directions(torch.addmm(block, old.T, basis, alpha=-1), shortest=noise)
    correction = basis @ directions.T
    directions, rotation = _orthonormal_directions(torch.addmm(directions, correction.T, basis, alpha=-1), shortest=0.5)
    return directions, _on_cpu_in_float64(old) + _on_cpu_in_float64(correction) @ lengths, rotation @ lengths


def _orthonormal_directions(block: Tensor, shortest: float) -> tuple[Tensor, Tensor]:
    """Write blockᵀ (n, b) ≈ directionsᵀ (n, d) coefficients (d, b), without the directions up to `shortest`."""
    Q, R = torch.linalg.qr(block.T)
    R = _on_cpu_in_float64(R)
    inverse, singular = torch.linalg.inv_ex(R)
    if not singular and float(torch.linalg.vector_norm(inverse)) * shortest < 1:  # nothing in R is that short
        return Q.T, R
    U, S, Vh = _full_svd(R)
    keep = shortest < S
    return U[:, keep].T.to(Q) @ Q.T, S[keep, None] * Vh[keep]


def _random_directions(basis: Tensor, count: int, generator: torch.Generator) -> Tensor:
    start = torch.randn(count, basis.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    return _split_off(start.to(basis), basis)[0]


def _completed(basis: Tensor, r: int, generator: torch.Generator) -> Tensor:
    while basis.shape[0] < r:
        basis = torch.cat([basis, _random_directions(basis, r - basis.shape[0], generator)])
    return basis


def _on_cpu_in_float64(matrix: Tensor) -> Tensor:
    return matrix.cpu().double()  # in this order: some devices have no float64
