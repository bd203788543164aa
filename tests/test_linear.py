"""core/linear.py and core/magnitude.py against the float64 textbook, away from the neutral point."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dude_peft.core.linear import FrozenProduct, adapted_linear
from dude_peft.core.magnitude import direction_norm, gain, norm_change, row_norm, rows_product
from dude_peft.core.reference import reference_direction, reference_gain, reference_linear, reference_weight

SCALING = 2.5  # alpha != r


class Case:
    """One layer with everything perturbed: odd sizes, a bias, out != in, zero rows, m = 0, tiny and negative m."""

    def __init__(self, dtype, principal=True, magnitude=True, bias=True, out=13, in_=7, r=3, tokens=(2, 5), seed=0):
        g = torch.Generator().manual_seed(seed)

        def randn(*size):
            return torch.randn(*size, generator=g, dtype=torch.float64)

        def leaf(t, to=None):
            return t.to(to or self.factor_dtype).requires_grad_()

        self.dtype = dtype
        self.factor_dtype = torch.promote_types(dtype, torch.float32)
        W0 = randn(out, in_)
        W0[3] = 0
        self.W0 = W0.to(dtype)
        self.bias = leaf(randn(out), dtype) if bias else None
        self.A0 = randn(r, in_).to(self.factor_dtype) if principal else None
        self.B0 = randn(out, r).to(self.factor_dtype) if principal else None
        if principal:
            self.B0[3] = 0
        self.dA, self.dB = leaf(0.3 * randn(r, in_)), leaf(0.3 * randn(out, r))
        self.m0 = row_norm(self.W0).to(self.factor_dtype)
        dm = 0.3 * randn(out).to(self.factor_dtype)
        dm[5] = -self.m0[5]  # m = 0
        dm[6] = -self.m0[6] * 1.001  # tiny and negative
        dm[7] = -2 * self.m0[7]  # negative
        self.dm = leaf(dm) if magnitude else None
        self.x = leaf(randn(*tokens, in_), dtype)
        self.dy = randn(*tokens, out).to(dtype)
        self.mask = None  # of dropout, on the input of the change

    @property
    def leaves(self):
        return [t for t in (self.x, self.dA, self.dB, self.dm, self.bias) if t is not None]

    def fast(self, mode="detached", inside=False):
        g = None
        if self.dm is not None:
            start = None if self.A0 is None else rows_product(self.W0, self.A0)
            q = norm_change(rows_product(self.W0, self.dA), start, self.dA, self.dB, self.A0, self.B0, SCALING)
            g = gain(self.m0, self.dm, q, mode)
        x = self.x if self.mask is None else self.x * self.mask
        base = torch.nn.functional.linear(self.x, self.W0, self.bias)
        if inside:
            base = FrozenProduct(self.x, self.W0)
        bias = self.bias if inside or g is not None else None
        return adapted_linear(base, x, self.dA, self.dB, self.A0, self.B0, g, bias, SCALING)

    def direction(self):
        A = self.dA if self.A0 is None else self.A0 + self.dA
        B = self.dB if self.B0 is None else self.B0 + self.dB
        return reference_direction(self.W0, A, B, SCALING, self.A0, self.B0)

    def reference(self, mode="detached"):
        m = None if self.dm is None else self.m0.double() + self.dm.double()
        x_change = None if self.mask is None else self.x * self.mask
        return reference_linear(self.x, self.W0, self.bias, self.direction(), m, mode, x_change)

    def outputs_and_gradients(self, function, mode, **settings):
        y = function(mode, **settings)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy.to(y.dtype))]


def relative_error(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("mode", ["detached", "exact"])
@pytest.mark.parametrize("principal", [True, False])
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_outputs_and_all_gradients_equal_the_textbook(dtype, bound, mode, principal, magnitude, bias, inside):
    case = Case(dtype, principal, magnitude, bias)
    ours = case.outputs_and_gradients(case.fast, mode, inside=inside)
    theirs = case.outputs_and_gradients(case.reference, mode)
    names = ["y", "x", "dA", "dB", *(["dm"] if magnitude else []), *(["bias"] if bias else [])]
    for name, value, expected in zip(names, ours, theirs, strict=True):
        assert torch.isfinite(value).all(), name
        assert relative_error(value, expected) <= bound, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_whose_factors_lie_in_shared_buffers_do_not_disturb_each_other(dtype, bound, bias):
    # Large enough for a buffer, of different sizes, and the backward passes come long after both forward passes.
    shapes = [(1031, 509, 33, (3, 101)), (515, 1023, 34, (9,))]
    cases = [Case(dtype, True, True, bias, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    outputs = [case.fast(inside=True) for case in cases]
    for case, y in zip(cases, outputs, strict=True):
        with torch.no_grad():
            assert torch.equal(case.fast(inside=True), y)
        ours = [y.detach(), *torch.autograd.grad(y, case.leaves, case.dy)]
        theirs = case.outputs_and_gradients(case.reference, "detached")
        assert all(relative_error(*pair) <= bound for pair in zip(ours, theirs, strict=True))


def test_a_buffer_lies_on_the_cpu_whatever_the_default_device_is():
    case = Case(torch.float32, out=521, in_=77, r=33)
    with torch.device("meta"):
        y = case.fast(inside=True)
    assert torch.equal(case.fast(inside=True), y)
    assert relative_error(y.detach(), case.outputs_and_gradients(case.reference, "detached")[0]) <= 5e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_half_precision_stays_within_its_rounding(dtype, bound, bias, inside):
    case = Case(dtype, bias=bias, out=64, in_=48, r=4, tokens=(40,))
    ours = case.outputs_and_gradients(case.fast, "detached", inside=inside)
    theirs = case.outputs_and_gradients(case.reference, "detached")
    for value, expected in zip(ours, theirs, strict=True):
        assert relative_error(value, expected) <= bound


def test_a_bias_that_dwarfs_the_product_does_not_spoil_the_gradient_of_the_magnitude():
    case = Case(torch.bfloat16, out=64, in_=48, r=4, tokens=(40,))
    with torch.no_grad():
        case.bias.mul_(300)
    ours = case.outputs_and_gradients(case.fast, "detached")[4]
    theirs = case.outputs_and_gradients(case.reference, "detached")[4]
    # The product reaches us as the frozen layer rounded it, bias included: that noise is there already.
    base = torch.nn.functional.linear(case.x, case.W0, case.bias) - case.bias
    exact = torch.nn.functional.linear(case.x.double(), case.W0.double())
    noise = relative_error(base, exact)
    assert relative_error(ours, theirs) <= 2 * noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_untouched_layer_gives_the_bits_it_was_given(dtype):
    case = Case(dtype, tokens=(33,))
    with torch.no_grad():
        for deviation in (case.dA, case.dB, case.dm):
            deviation.zero_()
    base = torch.nn.functional.linear(case.x, case.W0, case.bias)
    assert torch.equal(case.fast(), base)
    assert torch.equal(case.fast(inside=True), base)


@pytest.mark.parametrize("inside", [True, False])
def test_dropout_acts_on_the_change_alone(inside):
    case = Case(torch.float64)
    case.mask = (torch.rand(case.x.shape, generator=torch.Generator().manual_seed(9)) > 0.5).double() * 2
    ours = case.outputs_and_gradients(case.fast, "detached", inside=inside)
    theirs = case.outputs_and_gradients(case.reference, "detached")
    for value, expected in zip(ours, theirs, strict=True):
        assert relative_error(value, expected) <= 1e-13


def test_all_zero_weight_is_adapted_as_lora_adapts_it():
    case = Case(torch.float32)
    case.W0 = torch.zeros_like(case.W0)
    case.m0 = torch.zeros_like(case.m0)
    case.B0.zero_()
    ours = case.outputs_and_gradients(case.fast, "exact")
    theirs = case.outputs_and_gradients(case.reference, "exact")
    for index, (value, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.isfinite(value).all()
        assert relative_error(value, expected) <= 2e-6 or (index == 4 and not value.any())


@pytest.mark.parametrize("mode", ["detached", "exact"])
def test_a_direction_that_vanished_gives_zero_and_finite_gradients(mode):
    W0 = torch.eye(4, dtype=torch.float64)
    dA, dB = torch.eye(4, dtype=torch.float64).requires_grad_(), (-torch.eye(4, dtype=torch.float64)).requires_grad_()
    dm = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    q = norm_change(rows_product(W0, dA), None, dA, dB, None, None, 1.0)
    g = gain(row_norm(W0), dm, q, mode)
    y = adapted_linear(torch.ones(2, 4).double() @ W0.T, torch.ones(2, 4).double(), dA, dB, None, None, g, None, 1.0)
    gradients = torch.autograd.grad(y.sum(), [dA, dB, dm])
    assert not y.any()
    assert all(torch.isfinite(grad).all() for grad in gradients)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25])
def test_rows_of_extreme_size(scale):
    W0 = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    W0[1] *= scale
    expected = torch.linalg.vector_norm(W0.double(), dim=1)
    assert relative_error(row_norm(W0), expected) <= 1e-14
    zero = torch.zeros(5)
    assert torch.equal(gain(row_norm(W0), zero, zero.double()), torch.ones(5))


def test_a_product_kept_in_half_precision_costs_the_magnitude_nothing_that_counts():
    """From 512 tokens on float32 may keep v as bfloat16; all other gradients are untouched."""
    gradients = []
    for output_kept in (True, False):
        g = torch.Generator().manual_seed(0)
        x, dy, W0 = (torch.randn(*size, generator=g) for size in ((1024, 48), (1024, 64), (64, 48)))
        dA, dB = (0.1 * torch.randn(*size, generator=g) for size in ((4, 48), (64, 4)))
        gain = (1 + 0.01 * torch.randn(64, generator=g)).requires_grad_()
        leaves = [t.requires_grad_() for t in (x, dA, dB)] + [gain]
        y = adapted_linear(x @ W0.T, x, dA, dB, None, None, gain, None, 1.0, output_kept=output_kept)
        gradients.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    exact, compact = gradients
    assert all(torch.equal(a, b) for a, b in zip(exact[:4], compact[:4], strict=True))
    assert 0 < relative_error(compact[4], exact[4]) <= 3e-3
    # Against the noise that a gradient over 1,024 tokens has of itself: the spread of the sum's terms.
    spread = (dy * y.detach()).norm(dim=0)
    assert ((compact[4] - exact[4]).abs() / spread).max() <= 1e-2


def test_second_derivatives_are_refused():
    case = Case(torch.float64)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.fast().square().sum(), case.dA, create_graph=True)


def test_gradcheck():
    case = Case(torch.float64, out=8, in_=4, r=2, tokens=(3,))

    def function(x, dA, dB, dm, bias):
        case.x, case.dA, case.dB, case.dm, case.bias = x, dA, dB, dm, bias
        return case.fast("exact")

    with torch.no_grad():
        case.dm.clamp_(min=-0.5)  # g = 0 exactly is a kink of nothing but the check's own differences
    assert torch.autograd.gradcheck(function, tuple(case.leaves), atol=1e-6)


sizes = st.integers(1, 24)


@settings(max_examples=80, deadline=None)
@given(
    out=sizes,
    in_=sizes,
    r=st.integers(1, 6),
    scale=st.floats(1e-6, 1e6),
    scaling=st.floats(0.05, 20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10_000),
)
def test_the_factored_norm_is_the_norm(out, in_, r, scale, scaling, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    limit = 1e3 if dtype == torch.float16 else 1e6
    W0 = (torch.randn(out, in_, generator=g, dtype=torch.float64) * min(scale, limit)).to(dtype)
    factor = torch.promote_types(dtype, torch.float32)
    A0, dA = (torch.randn(r, in_, generator=g).to(factor) for _ in range(2))
    B0, dB = (torch.randn(out, r, generator=g).to(factor) for _ in range(2))
    q = norm_change(rows_product(W0, dA), rows_product(W0, A0), dA, dB, A0, B0, scaling)
    V = reference_direction(W0, A0 + dA, B0 + dB, scaling, A0, B0)
    expected = torch.linalg.vector_norm(V, dim=1)
    # Where parts cancel (within D, or between D and W0), any factored form loses digits: the bound is relative to the
    # size of what is summed.
    left, right = torch.cat([dB, B0], dim=1).double(), torch.cat([A0 + dA, dA]).double()
    summed = scaling * left.abs() @ torch.linalg.vector_norm(right, dim=1)
    weight = torch.linalg.vector_norm(W0.double(), dim=1) + summed
    eps = torch.finfo(factor).eps
    bound = (30 * eps) ** 0.5 * weight
    assert (
        (direction_norm(row_norm(W0), q) - expected).abs() <= torch.minimum(bound, 200 * eps * weight**2 / expected)
    ).all()


@settings(max_examples=40, deadline=None)
@given(out=sizes, in_=sizes, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_row_norm_is_the_row_norm(out, in_, dtype):
    W = torch.randn(out, in_, generator=torch.Generator().manual_seed(out * 100 + in_)).to(dtype)
    assert relative_error(row_norm(W), torch.linalg.vector_norm(W.double(), dim=1)) <= 1e-14
    assert relative_error(row_norm(W.T.contiguous().T), torch.linalg.vector_norm(W.double(), dim=1)) <= 1e-14


def test_rows_product_makes_no_full_copy_and_is_exact():
    W = torch.randn(3000, 40).bfloat16()
    rows = torch.randn(3, 40)
    assert torch.allclose(rows_product(W, rows), W.float() @ rows.T, rtol=1e-5, atol=1e-5)


def test_the_reference_itself():
    """The textbook against numbers that can be checked by hand."""
    W0 = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0], [2.0]])
    V = reference_direction(W0, A, B, 1.0)
    assert V.tolist() == [[6.0, 4.0], [2.0, 0.0]]
    g = reference_gain(W0, V, torch.tensor([52.0**0.5 * 2, 7.0]))
    assert torch.allclose(g, torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert torch.allclose(reference_weight(W0, V, None), V)
