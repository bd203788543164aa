"""core/kernels.py against the torch path and the float64 textbook: on a GPU if there is one, else in the interpreter.

Small integers and gains of a few bits make every sum exact in float32, whatever its order and however operations are
fused; there the two paths must give the same bits. Elsewhere both are held against float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from night import by_night
from test_linear import Case, relative_error
from torch.library import wrap_triton
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="the kernels need triton, which is not installed here")

from dude_peft.core import compose as torch_path
from dude_peft.core import kernels
from dude_peft.core.linear import adapted_linear
from dude_peft.core.magnitude import rows_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALING = 2.5
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}  # float32: of a long sum


def sweep(*usual, nightly):
    """Values of a parameter; those for the night are slow, since Triton's interpreter is."""
    return [*usual, *by_night(*nightly)]


@pytest.fixture(autouse=True)
def _interpreter_knows_bfloat16(monkeypatch):
    """Triton's interpreter multiplies bfloat16 matrices as integers, and cuts off where a GPU rounds to nearest."""
    if DEVICE == "cuda":
        return
    try:
        wrap_triton(kernels._compose_kernel)
    except RuntimeError:
        pytest.skip("this release of torch takes no kernels of the interpreter")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(handle):
        data = torch.from_numpy(handle.data.copy()).view(torch.bfloat16).float().numpy()
        return TensorHandle(data, tl.float32)

    def cast_impl(self, src, dst_type):
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return widened(src)
        if pair == (tl.float32, tl.bfloat16):
            data = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(data, tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *rest):
        a, b = (widened(t) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def use(monkeypatch, path):
    """Force one path, whatever the device; float64 has no kernels."""
    chosen = kernels if path == "kernels" else None
    monkeypatch.setattr(torch_path, "kernels_for", lambda t: chosen if t.dtype in torch_path._KERNEL_DTYPES else None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def integers(limit, *size, dtype=torch.float32, seed=0):
    return torch.randint(-limit, limit + 1, size, generator=generator(seed)).to(dtype).to(DEVICE)


def normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=generator(seed), dtype=torch.float64).to(dtype).to(DEVICE)


def bits(t):
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()])


def exact_arguments(dtype, tokens, out, k, with_gain=True, with_bias=True):
    base = integers(100, tokens, out, dtype=dtype, seed=1)
    u, left = integers(2, tokens, k, dtype=dtype, seed=2), integers(2, out, k, dtype=dtype, seed=3)
    gain = 1 + integers(16, out, seed=4) / 128 if with_gain else None
    bias = integers(30, out, dtype=dtype, seed=5) if with_bias else None
    return base, u, left, gain, bias, SCALING


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", sweep(1, 16, nightly=(3, 32, 256)))
@pytest.mark.parametrize(("with_gain", "with_bias", "keep"), [(True, True, True), (True, False, False), (False,) * 3])
def test_compose_gives_the_bits_of_the_torch_path(monkeypatch, dtype, k, with_gain, with_bias, keep):
    arguments = exact_arguments(dtype, 70, 133, k, with_gain, with_bias)
    use(monkeypatch, "torch")
    expected, expected_kept = torch_path.compose(*arguments, dtype if keep else None)
    y, kept = kernels.compose(*arguments, dtype if keep else None)
    assert torch.equal(bits(y), bits(expected))
    if keep:
        assert torch.equal(bits(kept), bits(expected_kept))
    else:
        assert kept is None
        assert expected_kept is None


def test_a_float32_layer_can_keep_its_product_in_bfloat16(monkeypatch):
    arguments = exact_arguments(torch.float32, 33, 70, 16)
    use(monkeypatch, "torch")
    expected = torch_path.compose(*arguments, torch.bfloat16)[1]
    kept = kernels.compose(*arguments, torch.bfloat16)[1]
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, expected)
    dy, gain = normal(33, 70, dtype=torch.float32), 1 + 0.1 * normal(70)
    dot = kernels.spread(dy, gain, kept, None)[1]
    assert torch.allclose(dot.double(), (dy.double() * kept.double()).sum(dim=0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("tokens", "out"), [(1, 1), (1, 300), (65, 1), (64, 128), (5, 17), (0, 9), (9, 0)])
def test_every_size(monkeypatch, tokens, out):
    arguments = exact_arguments(torch.bfloat16, tokens, out, 5)
    use(monkeypatch, "torch")
    y, kept = kernels.compose(*arguments, torch.bfloat16)
    expected, expected_kept = torch_path.compose(*arguments, torch.bfloat16)
    assert torch.equal(y, expected)
    assert torch.equal(kept, expected_kept)
    dy = integers(4, tokens, out, dtype=torch.bfloat16, seed=6)
    for ours, theirs in zip(
        kernels.spread(dy, arguments[3], kept, arguments[2]),
        torch_path.spread(dy, arguments[3], kept, arguments[2]),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert torch.allclose(ours.double(), theirs.double(), rtol=2**-7)


def test_the_pattern_starts_again_after_65536_rows(monkeypatch):
    arguments = exact_arguments(torch.bfloat16, (1 << 16) + 100, 3, 1)
    use(monkeypatch, "torch")
    monkeypatch.setattr(kernels, "_compose_tile", lambda dtype, k: (4096, 16, 16))  # fewer programs to interpret
    assert torch.equal(kernels.compose(*arguments, None)[0], torch_path.compose(*arguments, None)[0])


def test_strides_are_taken_as_they_come(monkeypatch):
    base, u, left, gain, bias, scaling = exact_arguments(torch.bfloat16, 40, 50, 7)
    use(monkeypatch, "torch")
    expected, _ = torch_path.compose(base, u, left, gain, bias, scaling, None)
    strided = [t.T.contiguous().T for t in (base, u, left)]
    assert torch.equal(kernels.compose(*strided, gain, bias, scaling, None)[0], expected)
    dy = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand(40, 50)  # of y.sum()
    ours, theirs = kernels.spread(dy, gain, base, left), torch_path.spread(dy, gain, base, left)
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compose_on_drawn_numbers_stays_within_one_rounding(dtype):
    tokens, out, k = 70, 133, 32
    base, u, left = normal(tokens, out, dtype=dtype), normal(tokens, k, dtype=dtype), normal(out, k, dtype=dtype)
    gain, bias = 1 + 0.1 * normal(out), normal(out, dtype=dtype)
    y, kept = kernels.compose(base, u, left, gain, bias, SCALING, dtype)
    v = base.double() + SCALING * u.double() @ left.double().T
    g, b = gain.double(), bias.double()
    expected = g * v + (1 - g) * b
    accumulated = 1e-6 * (v.abs() + SCALING * u.double().abs() @ left.double().abs().T + b.abs())
    ulp = 2 * HALF_ULP[dtype]
    assert ((y.double() - expected).abs() <= ulp * expected.abs() + accumulated + 6e-8).all()
    assert ((kept.double() - (v - b)).abs() <= ulp / 2 * (v - b).abs() + accumulated + 6e-8).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_finite_stays_what_it_is(monkeypatch, dtype):
    nan_of_cuda = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()
    assert nan_of_cuda != nan_of_cuda
    base = torch.ones(70, 20, dtype=dtype, device=DEVICE)
    base[:, 0], base[:, 1], base[:, 2] = torch.nan, torch.inf, -torch.inf
    base[:, 3] = torch.finfo(dtype).max
    gain = torch.ones(20, device=DEVICE)
    gain[4:6] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32).to(DEVICE)
    u, left = torch.zeros(70, 1, dtype=dtype, device=DEVICE), torch.zeros(20, 1, dtype=dtype, device=DEVICE)
    y, _ = kernels.compose(base, u, left, gain, None, 1.0, None)
    assert y[:, [0, 4, 5]].isnan().all()
    assert torch.equal(y[:, 1:4], base[:, 1:4])
    assert torch.equal(y[:, 6:], base[:, 6:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_fits_stays_as_it_is(dtype):
    finite = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    base = (finite[finite.isfinite()] if dtype == torch.bfloat16 else normal(1 << 15)).to(dtype).to(DEVICE)
    base = base[: base.numel() // 64 * 64].view(-1, 64)
    u, left = (torch.zeros(n, 3, dtype=dtype, device=DEVICE) for n in base.shape)
    gain, bias = torch.ones(64, device=DEVICE), normal(64, dtype=dtype)
    y, _ = kernels.compose(base, u, left, gain, bias, SCALING, None)
    assert torch.equal(y, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", sweep(1, 100, nightly=(32, 256)))
def test_spread(monkeypatch, dtype, k):
    tokens, out = 150, 301  # three blocks of rows, three spans of columns
    monkeypatch.setattr(kernels, "_span", lambda k: 128)
    dy, kept, left = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([(tokens, out)] * 2 + [(out, k)]))
    gain = 1 + 0.1 * normal(out)
    use(monkeypatch, "torch")
    dv, dot, w = kernels.spread(dy, gain, kept, left)
    assert torch.equal(bits(dv), bits(torch_path.spread(dy, gain, None, None)[0]))
    products = dy.double() * kept.double()
    assert dot.dtype == torch.float32
    assert ((dot.double() - products.sum(0)).abs() <= 1e-6 * products.abs().sum(0)).all()
    expected = dv.double() @ left.double()
    assert w.dtype == dtype
    slack = 1e-6 * (dv.double().abs() @ left.double().abs())
    assert ((w.double() - expected).abs() <= HALF_ULP[dtype] * expected.abs() + slack).all()
    again = kernels.spread(dy, gain, kept, left)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip((dv, dot, w), again, strict=True))


def test_spread_does_only_what_is_asked():
    dy, gain = normal(5, 6, dtype=torch.bfloat16), normal(6)
    dv, dot, w = kernels.spread(dy, gain, None, None)
    assert dot is None
    assert w is None
    assert torch.equal(kernels.spread(dy, gain, dy, None)[0], dv)
    assert kernels.spread(dy, gain, dy, None)[2] is None
    assert kernels.spread(dy, gain, None, normal(6, 2, dtype=torch.bfloat16))[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", sweep(16, nightly=(1, 100)))
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_product_is_as_good_as_float32(monkeypatch, dtype, k, transposed):
    out, in_ = 35, 301  # three depths
    monkeypatch.setattr(kernels, "_DEPTH", 128)
    W0 = normal(in_, out, dtype=dtype).T if transposed else normal(out, in_, dtype=dtype)
    rows = normal(k, in_, seed=1).requires_grad_()
    use(monkeypatch, "kernels")
    product = rows_product(W0, rows)
    assert product.dtype == torch.float32
    exact = W0.double() @ rows.double().T
    assert relative_error(product, exact) <= 1e-6
    assert torch.equal(product, rows_product(W0, rows))
    coefficients = normal(out, k, seed=2)
    (grad,) = torch.autograd.grad(product, rows, coefficients)
    assert relative_error(grad, coefficients.double().T @ W0.double()) <= 1e-6


def test_rows_product_keeps_small_and_large_rows(monkeypatch):
    use(monkeypatch, "kernels")
    W0 = normal(20, 33, dtype=torch.float16)
    for scale in (1e-20, 1e20):
        rows = scale * normal(3, 33, seed=1)
        assert relative_error(rows_product(W0, rows), W0.double() @ rows.double().T) <= 1e-6


def on_device(case):
    for name in ("W0", "bias", "A0", "B0", "m0", "dm", "dA", "dB", "x", "dy"):
        t = getattr(case, name)
        if t is not None:
            setattr(case, name, t.detach().to(DEVICE).requires_grad_(t.requires_grad))
    return case


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("mode", ["detached", "exact"])
@pytest.mark.parametrize(("principal", "magnitude", "bias"), [(1, 1, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
def test_the_layer_on_kernels_equals_the_textbook(monkeypatch, dtype, bound, mode, principal, magnitude, bias):
    use(monkeypatch, "kernels")
    case = on_device(Case(dtype, principal, magnitude, bias, out=65, in_=48, r=5, tokens=(4, 21)))
    ours = case.outputs_and_gradients(case.fast, mode)
    theirs = case.outputs_and_gradients(case.reference, mode)
    for value, expected in zip(ours, theirs, strict=True):
        assert torch.isfinite(value).all()
        assert relative_error(value, expected) <= bound


def test_recomputing_under_checkpointing_gives_the_same_bits(monkeypatch):
    use(monkeypatch, "kernels")
    case = on_device(Case(torch.bfloat16, out=65, in_=48, r=5, tokens=(4, 21)))
    plain = case.outputs_and_gradients(case.fast, "detached")
    again = case.outputs_and_gradients(lambda mode: checkpoint(case.fast, mode, use_reentrant=False), "detached")
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("state", ["start", "trained"])
@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_small_changes_of_the_gain_arrive(monkeypatch, path, state):
    use(monkeypatch, path)
    base, x = normal(512, 256, dtype=torch.bfloat16), normal(512, 4, dtype=torch.bfloat16, seed=1)
    dA, dB = torch.zeros(2, 4, device=DEVICE), torch.zeros(256, 2, device=DEVICE)
    A0, B0 = normal(2, 4, seed=2), normal(256, 2, seed=3)
    gain = torch.ones(256, device=DEVICE)
    if state == "trained":  # off the grid of bfloat16 everywhere
        dA, dB, gain = 0.1 * normal(2, 4, seed=4), 0.1 * normal(256, 2, seed=5), 1 + 0.01 * normal(256, seed=6)

    def output(eps):
        return adapted_linear(base, x, dA, dB, A0, B0, gain * (1 + eps), None, SCALING).double()

    change = SCALING * (x.double() @ (A0 + dA).double().T @ dB.double().T + x.double() @ dA.double().T @ B0.double().T)
    exact = gain.double() * (base.double() + change)
    for eps in (1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2):
        slope = ((output(eps) - output(0)) * exact).sum() / (eps * exact.square().sum())
        assert 0.9 <= slope <= 1.1, eps


def test_the_choice_goes_by_device_and_dtype(monkeypatch):
    assert torch_path.kernels_for(torch.zeros(1)) is None
    if DEVICE == "cuda":
        for dtype in (*DTYPES, torch.float64):
            chosen = torch_path.kernels_for(torch.zeros(1, dtype=dtype, device=DEVICE))
            assert chosen is (None if dtype == torch.float64 else kernels)


def run(*arguments):
    """A process of its own that has the real compiler instead of the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_importing_the_core_does_not_import_triton():
    done = run("-c", "import sys, dude_peft.core.linear, dude_peft.core.magnitude; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", ["trace", "compile"])
def test_without_the_interpreter(what):
    """Every kernel compiles for real GPUs, and torch.compile sees one kernel a pass, without a graph break."""
    done = run(str(Path(__file__).parent / "without_interpreter.py"), what)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
