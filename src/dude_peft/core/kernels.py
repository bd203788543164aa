"""The passes of `compose.py` and the product of `magnitude.py` as Triton kernels, for GPUs (CUDA, ROCm).

    compose        y = g * (base + s u L^T) + (1 - g) * bias         reads base once, writes y once
    spread         dv = g * dy,  dot = sum_t dy * kept,  w = dv L     reads dy and kept once, writes dv once
    rows_product   W0 rows^T in float32 from a half-precision W0     reads W0 once

What these passes cost is the memory they move: 4 bytes an element of (tokens, out) in half precision for `compose`,
6 for `spread` (8 if w were a product of its own, which reads dv again). Everything else a kernel needs is (tokens, k)-
or (out, k)-sized and stays in the caches, and the dither is computed where it is used, a few integer
operations an element. The base product and the small products around it are cuBLAS's.

- Tiles are fixed by dtype and by k, not tuned when a size is first seen: sequence lengths change from step to step,
  every tuning run would stop training, and a memory-bound kernel has little to win. Tensor cores want k padded to a
  power of two from 16 on; above 64, `compose` goes over k in blocks. `spread` holds (64, k) of w in registers, so
  above 128 w is cuBLAS's, as it is in float32, where the exact product runs outside the tensor cores.
- All sums have a fixed order: a program writes its part, a second pass adds the parts. No atomics, so the same bits
  come out every time, which gradient checkpointing relies on.
- `rows_product` splits the float32 rows into three bfloat16 parts, hi + mid + lo, 8 bits each, which is all 24 of them
  (and float16 weights into two), so the products run on the tensor cores and only the accumulation rounds.
- The rounding is that of `rounding.py`, bit by bit, and so is its guard: a GPU's own NaN is 0x7fffffff, and adding a
  threshold to that would give -0.0.
- The compiler may contract `g * v + shift` to one fused operation, one rounding in float32 fewer than on a CPU.

The operators are `torch.library.triton_op`s: torch.compile sees through them. This module imports triton; only
`compose.kernels_for` imports this module.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# Inputs a program of `rows_product` sums over: enough programs for a (4096, 4096) weight, and sums that stay accurate.
_DEPTH = 2048
_FUSED_K = 128  # the widest (64, k) of float32 that a program holds in registers


def compose(
    base: Tensor,
    u: Tensor,
    left: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Output of the adapted layer from the frozen layer's: `compose.compose`, arguments and results the same.

    Half precision and float32 only; u and left in base's dtype.
    """
    y, kept = _compose(base, u, left, gain, bias if gain is not None else None, scaling, keep)
    return y, None if keep is None else kept


def spread(
    dy: Tensor, gain: Tensor, kept: Tensor | None, left: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient before the gain and its two products: `compose.spread`, arguments and results the same.

    Half precision and float32 only; left in dy's dtype.
    """
    fused = left is not None and dy.dtype != torch.float32 and left.shape[1] <= _FUSED_K
    dv, dot, w = _spread(dy, gain, kept, left if fused else None)
    if left is None:
        return dv, dot if kept is not None else None, None
    return dv, dot if kept is not None else None, w if fused else dv @ left


def rows_product(W0: Tensor, rows: Tensor) -> Tensor:
    """Product `W0 rows^T` as accurate as in float32: `magnitude.rows_product` for a half-precision W0.

    Args:
        W0: (out, in) bfloat16 or float16, any strides.
        rows: (k, in) float32, finite.

    Returns:
        (out, k) float32, differentiable in rows.
    """
    product: Tensor = _rows_product(W0, rows)
    return product


@triton_op("dude_peft::compose", mutates_args=())
def _compose(
    base: Tensor,
    u: Tensor,
    left: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    base, u, left = base.contiguous(), u.contiguous(), left.contiguous()
    tokens, out = base.shape
    k = left.shape[1]
    y = torch.empty_like(base)
    kept = base.new_empty(0) if keep is None else torch.empty_like(base, dtype=keep)
    if base.numel() == 0:
        return y, kept
    BM, BN, BK = _compose_tile(base.dtype, k)
    grid = (_ceil(tokens, BM) * _ceil(out, BN),)
    with _on(base):
        wrap_triton(_compose_kernel)[grid](
            base,
            u,
            left,
            base if gain is None else gain.to(torch.float32).contiguous(),
            base if bias is None else bias.contiguous(),
            y,
            base if keep is None else kept,
            tokens,
            out,
            scaling,
            K=k,
            HAS_GAIN=gain is not None,
            HAS_BIAS=bias is not None,
            KEEP=keep is not None,
            BM=BM,
            BN=BN,
            BK=BK,
            num_warps=4,
            num_stages=2,
        )
    return y, kept


@triton_op("dude_peft::spread", mutates_args=())
def _spread(dy: Tensor, gain: Tensor, kept: Tensor | None, left: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy.contiguous()
    tokens, out = dy.shape
    k = 0 if left is None else left.shape[1]
    BM, BN = 64, 64
    span = _span(k)
    row_blocks, spans = _ceil(tokens, BM), _ceil(out, span)
    dv = torch.empty_like(dy)
    dots = dy.new_empty((0, 0) if kept is None else (row_blocks, out), dtype=torch.float32)
    parts = dy.new_empty((0, 0, 0) if left is None else (spans, tokens, k), dtype=torch.float32)
    if dy.numel() > 0:
        with _on(dy):
            wrap_triton(_spread_kernel)[(row_blocks, spans)](
                dy,
                dy if kept is None else kept.contiguous(),
                gain.to(torch.float32).contiguous(),
                dy if left is None else left.contiguous(),
                dv,
                dy if kept is None else dots,
                dy if left is None else parts,
                tokens,
                out,
                K=k,
                HAS_DOT=kept is not None,
                HAS_W=left is not None,
                BM=BM,
                BN=BN,
                BK=_padded(k),
                SPAN=span,
                num_warps=4,
                num_stages=3,
            )
    return dv, dots.sum(dim=0), parts.sum(dim=0).to(dy.dtype)


@triton_op("dude_peft::rows_product", mutates_args=())
def _rows_product(W0: Tensor, rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    out, in_ = W0.shape
    k = rows.shape[0]
    BM, BN, BK = 32, 64, min(_padded(k), 64)
    depths = _ceil(in_, _DEPTH)
    parts = rows.new_empty(depths, out, k)
    if parts.numel() > 0:
        with _on(W0):
            wrap_triton(_rows_product_kernel)[(_ceil(out, BM), depths, _ceil(k, BK))](
                W0,
                rows,
                parts,
                out,
                in_,
                W0.stride(0),
                W0.stride(1),
                K=k,
                SPLIT=W0.dtype == torch.float16,
                BM=BM,
                BN=BN,
                BK=BK,
                DEPTH=_DEPTH,
                num_warps=4,
                num_stages=3,
            )
    return parts.sum(dim=0)


def _keep_weight(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _rows_product_backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
    (W0,) = ctx.saved_tensors
    return None, _rows_product(W0.T, grad.T).T


_rows_product.register_autograd(_rows_product_backward, setup_context=_keep_weight)


def _compose_tile(dtype: torch.dtype, k: int) -> tuple[int, int, int]:
    """What a program of `compose` holds of tokens, of columns, and of k at a time."""
    return (64, 64, min(_padded(k), 32)) if dtype == torch.float32 else (64, 128, min(_padded(k), 64))


def _span(k: int) -> int:
    """Columns that a program of `spread` goes through.

    Fewer make more programs, which a few hundred tokens need to fill a GPU, but also more parts of w, in float32, to
    write and add up: by what the pass moves itself, 4 k / (3 span), which is 8 % for k = 32 and 17 % for 64 and 128.
    A product of its own for w would add 33 %.
    """
    return 512 if k <= 64 else 1024


def _ceil(length: int, block: int) -> int:
    """How many blocks cover the length."""
    return -(-length // block)


def _padded(k: int) -> int:
    """The power of two, 16 or more, that tensor cores take k as."""
    return max(16, 1 << (k - 1).bit_length())


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """The tensor's device as the current one: kernels start on that. Not where shapes are traced without a GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda and torch.cuda.is_initialized() else nullcontext()


@triton.jit
def _compose_kernel(
    base_ptr,
    u_ptr,
    left_ptr,
    gain_ptr,
    bias_ptr,
    y_ptr,
    kept_ptr,
    tokens,
    out,
    scaling,
    K: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    column_blocks = tl.cdiv(out, BN)
    program = tl.program_id(0)
    rows = (program // column_blocks) * BM + tl.arange(0, BM)
    columns = (program % column_blocks) * BN + tl.arange(0, BN)
    row_here, column_here = rows < tokens, columns < out
    here = row_here[:, None] & column_here[None, :]
    # tokens * out can pass 2^31, and so can tokens * k.
    at = rows.to(tl.int64)[:, None] * out + columns[None, :]
    # First, so that it is under way while the small product runs.
    base = tl.load(base_ptr + at, mask=here, other=0.0)

    change = tl.zeros((BM, BN), dtype=tl.float32)
    for start in tl.range(0, K, BK):
        inner = start + tl.arange(0, BK)
        inner_here = inner < K
        u_at = rows.to(tl.int64)[:, None] * K + inner[None, :]
        u = tl.load(u_ptr + u_at, mask=row_here[:, None] & inner_here[None, :], other=0.0)
        left_at = columns.to(tl.int64)[None, :] * K + inner[:, None]
        left = tl.load(left_ptr + left_at, mask=column_here[None, :] & inner_here[:, None], other=0.0)
        change = tl.dot(u, left, change, input_precision="ieee")

    # torch.compile's launcher hands Python's numbers over as float64.
    v = base.to(tl.float32) + tl.cast(scaling, tl.float32) * change
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_here, other=0.0).to(tl.float32)
    if KEEP:
        kept = v
        if HAS_BIAS:
            kept = v - bias[None, :]
        tl.store(kept_ptr + at, kept.to(kept_ptr.dtype.element_ty), mask=here)
    if HAS_GAIN:
        gain = tl.load(gain_ptr + columns, mask=column_here, other=1.0)
        v = v * gain[None, :]
        if HAS_BIAS:
            v = v + ((1.0 - gain) * bias)[None, :]
    if y_ptr.dtype.element_ty == tl.bfloat16:
        v = _round_dithered(v, _threshold(base, columns, 16), 16)
    elif y_ptr.dtype.element_ty == tl.float16:
        v = _round_dithered(v, _threshold(base, columns, 13), 13)
    tl.store(y_ptr + at, v.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _spread_kernel(
    dy_ptr,
    kept_ptr,
    gain_ptr,
    left_ptr,
    dv_ptr,
    dots_ptr,
    parts_ptr,
    tokens,
    out,
    K: tl.constexpr,
    HAS_DOT: tl.constexpr,
    HAS_W: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPAN: tl.constexpr,
):
    row_block, span = tl.program_id(0), tl.program_id(1)
    rows = row_block * BM + tl.arange(0, BM)
    inner = tl.arange(0, BK)
    row_here, inner_here = rows < tokens, inner < K
    w = tl.zeros((BM, BK), dtype=tl.float32)
    for start in tl.range(span * SPAN, tl.minimum(span * SPAN + SPAN, out), BN):
        columns = start + tl.arange(0, BN)
        column_here = columns < out
        here = row_here[:, None] & column_here[None, :]
        at = rows.to(tl.int64)[:, None] * out + columns[None, :]
        dy = tl.load(dy_ptr + at, mask=here, other=0.0).to(tl.float32)
        if HAS_DOT:
            kept = tl.load(kept_ptr + at, mask=here, other=0.0).to(tl.float32)
            dots_at = row_block.to(tl.int64) * out + columns
            tl.store(dots_ptr + dots_at, tl.sum(dy * kept, axis=0), mask=column_here)
        gain = tl.load(gain_ptr + columns, mask=column_here, other=0.0)
        dv = (dy * gain[None, :]).to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + at, dv, mask=here)
        if HAS_W:
            left_at = columns.to(tl.int64)[:, None] * K + inner[None, :]
            left = tl.load(left_ptr + left_at, mask=column_here[:, None] & inner_here[None, :], other=0.0)
            w = tl.dot(dv, left, w)
    if HAS_W:
        w_at = (span.to(tl.int64) * tokens + rows)[:, None] * K + inner[None, :]
        tl.store(parts_ptr + w_at, w, mask=row_here[:, None] & inner_here[None, :])


@triton.jit
def _rows_product_kernel(
    W0_ptr,
    rows_ptr,
    parts_ptr,
    out,
    in_,
    stride_out,
    stride_in,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    depth = tl.program_id(1)
    features = tl.program_id(0) * BM + tl.arange(0, BM)
    picked = tl.program_id(2) * BK + tl.arange(0, BK)
    feature_here, picked_here = features < out, picked < K
    total = tl.zeros((BM, BK), dtype=tl.float32)
    for start in tl.range(depth * DEPTH, tl.minimum(depth * DEPTH + DEPTH, in_), BN):
        inputs = start + tl.arange(0, BN)
        input_here = inputs < in_
        W0_at = features.to(tl.int64)[:, None] * stride_out + inputs.to(tl.int64)[None, :] * stride_in
        W0 = tl.load(W0_ptr + W0_at, mask=feature_here[:, None] & input_here[None, :], other=0.0)
        rows_at = picked.to(tl.int64)[None, :] * in_ + inputs[:, None]
        rest = tl.load(rows_ptr + rows_at, mask=picked_here[None, :] & input_here[:, None], other=0.0)
        hi = _leading(rest)
        rest = rest - hi
        mid = _leading(rest)
        lo = (rest - mid).to(tl.bfloat16)
        hi, mid = hi.to(tl.bfloat16), mid.to(tl.bfloat16)
        if SPLIT:  # float16 has three bits more than bfloat16
            W0_wide = W0.to(tl.float32)
            W0_hi = _leading(W0_wide)
            W0_lo = (W0_wide - W0_hi).to(tl.bfloat16)
            total = tl.dot(W0_lo, lo, total)
            total = tl.dot(W0_lo, mid, total)
            total = tl.dot(W0_lo, hi, total)
            W0 = W0_hi.to(tl.bfloat16)
        total = tl.dot(W0, lo, total)
        total = tl.dot(W0, mid, total)
        total = tl.dot(W0, hi, total)
    parts_at = (depth.to(tl.int64) * out + features)[:, None] * K + picked[None, :]
    tl.store(parts_ptr + parts_at, total, mask=feature_here[:, None] & picked_here[None, :])


@triton.jit
def _leading(v):
    """A float32 cut after its 8 leading significant bits: what bfloat16 holds exactly."""
    return (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _round_dithered(v, threshold, DROPPED: tl.constexpr):
    """`rounding.round_dithered_`: add the threshold to the bits that are dropped, and drop them; NaN stays."""
    bits = v.to(tl.int32, bitcast=True) + threshold
    bits = bits & (-1 << DROPPED)
    return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)


@triton.jit
def _threshold(base, columns, DROPPED: tl.constexpr):
    """`rounding.content_thresholds`: leading bits of a product with the frozen layer's output; unsigned, it wraps."""
    mixed = base.to(tl.float32).to(tl.uint32, bitcast=True) * 0x9E379E37 + _mixed(columns)[None, :]
    return ((mixed >> (32 - DROPPED)) ^ (1 << (DROPPED - 1))).to(tl.int32)


@triton.jit
def _mixed(j):
    """`rounding._mixed` of column j; unsigned 32-bit products wrap as the masks there do."""
    h = (j + 1).to(tl.uint32) * 0x9E3779B1
    h = (h ^ (h >> 15)) * 0x85EBCA6B
    return h ^ (h >> 13)
