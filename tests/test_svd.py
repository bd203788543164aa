"""`top_svd` against float64 LAPACK and against matrices of known spectrum, on the full and on the Krylov path."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dude_peft.core.svd as svd_module
from dude_peft.core.svd import TopSVD, top_svd
from dude_peft.errors import ConfigError, NumericsError

KRYLOV_SHAPES = [(600, 900), (900, 600)]  # past the side up to which a full SVD is taken
SIDE = 600


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def with_spectrum():
    """(shape, singular values) -> a float64 matrix that has them, with random singular vectors."""
    bases = {n: torch.linalg.qr(gaussian(n, SIDE, seed=n))[0] for n in (600, 900)}

    def build(shape: tuple[int, int], S: Tensor) -> Tensor:
        out, in_ = shape
        return (bases[out] * S) @ bases[in_].T.roll(1, 0)

    return build


def check_promises(found: TopSVD, W: Tensor, r: int) -> None:
    """Everything that holds for every result, however hard the matrix."""
    U, S, Vh = found.U, found.S, found.Vh
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    assert U.dtype == S.dtype == Vh.dtype == dtype
    assert (U.shape, S.shape, Vh.shape) == ((W.shape[0], r), (r,), (r, W.shape[1]))
    assert U.is_contiguous()
    assert Vh.is_contiguous()

    eps = torch.finfo(dtype).eps
    U, S, Vh, W = U.double(), S.double(), Vh.double(), W.detach().double()
    identity = torch.eye(r, dtype=torch.float64)
    assert (U.T @ U - identity).abs().max() <= 40 * eps
    assert (Vh @ Vh.T - identity).abs().max() <= 40 * eps
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()
    assert found.rank == torch.count_nonzero(S)

    peak = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    assert (peak > 0).all()

    scale = W.abs().max()
    if scale == 0:
        assert found.captured == 1.0
    else:  # (relative residual)² = 1 - captured: true only if U, S and Vh belong together
        residual = (W - U * S @ Vh) / scale
        rest = residual.square().sum() / (W / scale).square().sum()
        assert 0 <= found.captured <= 1
        assert abs(1 - rest - found.captured) <= 100 * eps


@st.composite
def small_matrices(draw) -> tuple[Tensor, int]:
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    out, in_ = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    rank = draw(st.integers(0, min(out, in_)))
    seed = draw(st.integers(0, 2**20))
    decay = draw(st.sampled_from([0.0, 0.5, 2.0]))
    exponent = draw(st.integers(-3, 2) if dtype == torch.float16 else st.integers(-20, 20))
    spectrum = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay
    W = (gaussian(out, rank, seed=seed) * spectrum) @ gaussian(rank, in_, seed=seed + 1)
    return (10.0**exponent * W).to(dtype), draw(st.integers(1, min(out, in_)))


@settings(max_examples=150, deadline=None)
@given(small_matrices())
@example((torch.zeros(5, 3), 3))
@example((torch.tensor([[-2.0]]), 1))
@example((torch.tensor([[3.0, -4.0, 0.0]]), 1))
@example((torch.eye(7), 4))
@example((torch.full((4, 6), 1e-25), 2))
@example((torch.full((4, 6), 1e30), 2))
def test_small_matrices_match_lapack_in_float64(case):
    W, r = case
    found = top_svd(W, r)
    check_promises(found, W, r)
    true = torch.linalg.svdvals(W.double())[:r]
    slack = torch.finfo(found.S.dtype).eps * 2 * (math.sqrt(W.shape[0]) + math.sqrt(W.shape[1])) * true[0]
    assert (found.S.double() - true).abs().max() <= slack


@settings(max_examples=50, deadline=None)
@given(small_matrices())
def test_full_rank_reconstructs_the_matrix(case):
    W, _ = case
    r = min(W.shape)
    U, S, Vh, captured, _ = top_svd(W, r)
    scale = W.double().abs().max().clamp_min(1e-300)
    error = ((U * S) @ Vh).double() / scale - W.double() / scale
    assert error.abs().max() <= 200 * torch.finfo(U.dtype).eps
    assert captured == pytest.approx(1.0, abs=200 * torch.finfo(U.dtype).eps)


# --- Krylov path ------------------------------------------------------------------------------------------------

index = torch.arange(1, SIDE + 1, dtype=torch.float64)
SPECTRA = {
    "slow decay": index**-0.25,
    "decay": index**-0.5,
    "fast decay": index**-2,
    "exponential": torch.exp(-index / 20),
    "condition 1e12": torch.logspace(0, -12, SIDE, dtype=torch.float64),
    "linear": 1 - index / (SIDE + 1),
    "flat": torch.ones(SIDE, dtype=torch.float64),
    "clustered": torch.where(index <= 100, 1 - 1e-4 * index / 100, 0.3),
    "repeated, plain tail": torch.where(index <= 50, 1.0, 0.1).double(),
    "repeated, dense tail": torch.where(index <= 80, 1.0, 0.6 * (1 - index / (SIDE + 1))),
    "one outlier": torch.where(index <= 1, 1e4, 1 - index / (2 * SIDE)),
    "weight-like": 1 - index / (SIDE + 1) + 6 * index**-0.7,
    "rank 10": torch.where(index <= 10, index**-0.5, 0.0),
    "rank 40": torch.where(index <= 40, index**-0.5, 0.0),
}


@pytest.mark.parametrize("shape", KRYLOV_SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_krylov_misses_no_more_than_tol(name, shape, with_spectrum):
    S = SPECTRA[name]
    cases = [(32, torch.float32), (5, torch.float64), (90, torch.float64)]
    for r, dtype in cases if shape[0] < shape[1] else cases[:1]:  # a tall matrix is transposed first
        W = with_spectrum(shape, S).to(dtype)
        found = top_svd(W, r)
        check_promises(found, W, r)
        true, got = S[:r].square().sum(), found.S.double().square().sum()
        slack = 50 * torch.finfo(dtype).eps
        assert (1 - slack) * (1 - 1e-3) * true <= got <= (1 + slack) * true


@pytest.mark.parametrize("name", ["decay", "fast decay", "exponential", "weight-like", "one outlier", "rank 10"])
def test_krylov_with_a_tight_tol_matches_the_full_svd(name, with_spectrum):
    W = with_spectrum((600, 900), SPECTRA[name])
    tight, full = top_svd(W, 12, tol=1e-12), top_svd(W, 12, exact=True)
    torch.testing.assert_close(full.S, SPECTRA[name][:12], rtol=1e-12, atol=0)
    torch.testing.assert_close(tight.S, full.S, rtol=1e-9, atol=1e-12 * float(full.S[0]))
    torch.testing.assert_close(tight.U * tight.S @ tight.Vh, full.U * full.S @ full.Vh, rtol=0, atol=1e-5)


def test_tol_buys_accuracy_with_time(with_spectrum):
    S = SPECTRA["linear"]
    W = with_spectrum((600, 900), S)
    missed = [1 - float(top_svd(W, 16, tol=tol).S.square().sum() / S[:16].square().sum()) for tol in (0.1, 1e-3, 1e-6)]
    assert missed[0] > 10 * missed[1] > 100 * missed[2]


@pytest.mark.parametrize("rank", [10, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_is_found_and_the_rest_of_s_is_zero(rank, dtype, with_spectrum):
    W = with_spectrum((900, 600), SPECTRA[f"rank {rank}"]).to(dtype)
    found = top_svd(W, 64)
    assert found.rank == rank
    assert (found.S[rank:] == 0).all()
    assert found.captured == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shape", [*KRYLOV_SHAPES, (6, 9)])
def test_zero_and_single_entry_matrices_have_orthonormal_factors(shape):
    W = torch.zeros(shape)
    found = top_svd(W, 5)
    check_promises(found, W, 5)
    assert (found.rank, found.captured) == (0, 1.0)

    W[3, 4] = -2.0
    found = top_svd(W, 5)
    check_promises(found, W, 5)
    assert (found.rank, found.captured) == (1, 1.0)
    assert found.S.tolist() == pytest.approx([2.0, 0, 0, 0, 0])


def test_a_few_huge_entries_neither_hide_the_rest_nor_break_orthonormality():
    W = gaussian(600, 900, dtype=torch.float32)
    W[7, 11], W[500, 3], W[20, 800] = 1e6, -2e5, 3e5
    found = top_svd(W, 16)
    check_promises(found, W, 16)
    true = torch.linalg.svdvals(W.double())[:16]
    torch.testing.assert_close(found.S[:3].double(), true[:3], rtol=1e-5, atol=0)
    assert found.S[3] > 0.8 * true[3]
    assert found.S[3] < 1.01 * true[3]


@pytest.mark.parametrize("shape", [(40, 30), (600, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_change_no_bit_but_the_scale(shape, dtype):
    W = gaussian(*shape, dtype=dtype)
    plain = top_svd(W, 8)
    for exponent in (-90, 110):
        scaled = top_svd(W * 2.0**exponent, 8)
        assert torch.equal(scaled.U, plain.U)
        assert torch.equal(scaled.Vh, plain.Vh)
        assert torch.equal(scaled.S, plain.S * 2.0**exponent)
        assert scaled.captured == plain.captured


@pytest.mark.parametrize("scale", [1e-25, 1e-40, 1e30])
def test_extreme_scales_on_the_krylov_path(scale):
    W = gaussian(600, 900, dtype=torch.float32) * scale
    found = top_svd(W, 4)
    unit = W.double() / scale
    missed = 1 - (found.S.double() / scale).square().sum() / torch.linalg.svdvals(unit)[:4].square().sum()
    assert abs(missed) < 2e-3
    assert found.captured == pytest.approx(float((found.U.double().T @ unit).norm() / unit.norm()) ** 2, rel=1e-3)


def test_largest_and_smallest_doubles():
    for value in (1.7e308, 5e-324):
        found = top_svd(torch.diag(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)) * value, 3)
        assert found.S.tolist() == pytest.approx([value, value, 0.0], rel=1e-9)
        assert found.captured == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 60), (600, 900)])
def test_half_precision_is_computed_in_float32(shape, dtype):
    W = gaussian(*shape, dtype=dtype)
    half, single = top_svd(W, 6), top_svd(W.float(), 6)
    for a, b in zip(half, single, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


# --- the same bits, whatever surrounds the call ----------------------------------------------------------------


def assert_same_bits(a: TopSVD, b: TopSVD) -> None:
    assert torch.equal(a.U, b.U)
    assert torch.equal(a.S, b.S)
    assert torch.equal(a.Vh, b.Vh)
    assert a[3:] == b[3:]


@pytest.mark.parametrize("shape", [(50, 70), *KRYLOV_SHAPES])
def test_the_same_call_gives_the_same_bits_and_leaves_the_random_state(shape):
    W = gaussian(*shape, dtype=torch.float32)
    first = top_svd(W, 8)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = top_svd(W, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(first, second)


def test_the_seed_changes_the_start_and_hardly_the_result(with_spectrum):
    W = with_spectrum((600, 900), SPECTRA["decay"])
    a, b = top_svd(W, 8, seed=0), top_svd(W, 8, seed=1)
    assert not torch.equal(a.U, b.U)
    torch.testing.assert_close(a.S, b.S, rtol=1e-4, atol=0)
    assert_same_bits(top_svd(W, 8, exact=True), top_svd(W, 8, seed=1, exact=True))


def test_thread_counts_agree_to_rounding(with_spectrum):
    W = with_spectrum((900, 600), SPECTRA["decay"]).float()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = top_svd(W, 8)
        torch.set_num_threads(2)
        two = top_svd(W, 8)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(two.S, one.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(two.U, one.U, rtol=0, atol=1e-3)
    torch.testing.assert_close(two.Vh, one.Vh, rtol=0, atol=1e-3)


def test_surrounding_contexts_do_not_reach_in():
    W = gaussian(600, 700, dtype=torch.float32)
    plain = top_svd(W, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(top_svd(W, 4), plain)
    with torch.device("meta"):
        assert_same_bits(top_svd(W, 4), plain)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_same_bits(top_svd(W, 4), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_tf32_is_off_inside_and_as_it_was_afterwards():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with svd_module.full_precision_products(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(KeyError), svd_module.full_precision_products(torch.device("cuda")):
            raise KeyError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_tf32_that_all_of_torch_has_is_not_pinned_to_products():
    """Who switches it off for all of torch later would have found products in TF32 still."""
    backends = torch.backends
    before = backends.fp32_precision
    try:
        backends.fp32_precision = "tf32"
        with svd_module.full_precision_products(torch.device("cuda")):
            assert backends.cuda.matmul.fp32_precision == "ieee"
        assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        backends.fp32_precision = before


@pytest.mark.parametrize("shape", [(40, 60), (600, 900)])
def test_views_and_parameters(shape):
    out, in_ = shape
    W = gaussian(out, in_, dtype=torch.float32)
    padded = gaussian(2 * out, in_ + 5, dtype=torch.float32)
    padded[::2, 5:] = W
    plain, strided = top_svd(W, 5), top_svd(padded[::2, 5:], 5)
    transposed = top_svd(W.T.contiguous().T, 5)
    for other in (strided, transposed):
        torch.testing.assert_close(other.S, plain.S, rtol=1e-4, atol=0)
        check_promises(other, W, 5)
    repeated = top_svd(W[:1].expand(out, in_), 2)
    assert repeated.rank == 1
    assert float(repeated.S[0]) == pytest.approx(float(W[0].norm()) * math.sqrt(out), rel=1e-5)

    weight = torch.nn.Parameter(W.clone())
    found = top_svd(weight, 5)
    assert_same_bits(found, plain)
    assert type(found.U) is Tensor
    assert not any(factor.requires_grad for factor in (found.U, found.S, found.Vh))
    assert torch.equal(weight, W)  # nothing was scaled in place


@pytest.mark.parametrize("shape", [(500, 700), (600, 900), (900, 600)])
def test_factors_keep_no_larger_storage_alive(shape):
    found = top_svd(gaussian(*shape, dtype=torch.float32), 4)
    for factor in (found.U, found.S, found.Vh):
        assert factor.untyped_storage().nbytes() == factor.numel() * 4


class LargestResult(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("shape", [(520, 6000), (6000, 520)])
def test_nothing_larger_than_the_weight_is_built(shape):
    W = gaussian(*shape, dtype=torch.float32)
    with LargestResult() as largest:
        top_svd(W, 4)
    assert largest.numel == W.numel()


# --- which path, and signs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "r", "exact", "full"),
    [
        ((512, 700), 4, False, True),
        ((700, 512), 4, False, True),
        ((513, 700), 4, False, False),
        ((700, 700), 116, False, False),  # 6 r = 696
        ((700, 700), 117, False, True),  # 6 r = 702
        ((513, 700), 4, True, True),
    ],
)
def test_a_full_svd_where_it_is_as_quick(shape, r, exact, full, monkeypatch):
    class KrylovError(Exception):
        pass

    def krylov(*args):
        raise KrylovError

    monkeypatch.setattr(svd_module, "_krylov_svd", krylov)
    W = torch.zeros(shape)
    W[0, 0] = 1.0
    if full:
        assert top_svd(W, r, exact=exact).rank == 1
    else:
        with pytest.raises(KrylovError):
            top_svd(W, r, exact=exact)


def test_the_largest_entry_of_each_u_column_is_positive_and_the_first_wins_a_tie():
    assert top_svd(torch.tensor([[-1.0], [1.0]]), 1).U[0, 0] > 0
    assert top_svd(torch.tensor([[1.0], [-1.0]]), 1).U[0, 0] > 0
    assert top_svd(torch.tensor([[1.0], [-2.0]]), 1).U[1, 0] > 0
    W = gaussian(30, 20)
    flipped = top_svd(-W, 20)
    torch.testing.assert_close(flipped.U, top_svd(W, 20).U)  # the minus goes to Vh
    torch.testing.assert_close(flipped.Vh, -top_svd(W, 20).Vh)


# --- failures ---------------------------------------------------------------------------------------------------


def failing(function, times: int):
    """`function`, which raises LinAlgError the first `times` times."""
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("did not converge")
        return function(*args, **kwargs)

    wrapper.calls = calls
    return wrapper


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (600, 900)])
def test_an_svd_that_does_not_converge_is_done_again_in_float64(shape, monkeypatch):
    W = gaussian(*shape, dtype=torch.float32)
    expected = top_svd(W, 6, exact=True)
    svd = failing(torch.linalg.svd, times=1)
    monkeypatch.setattr(torch.linalg, "svd", svd)
    found = top_svd(W, 6, exact=True)
    assert len(svd.calls) == 2
    assert svd.calls[1][0].dtype == torch.float64
    check_promises(found, W, 6)
    torch.testing.assert_close(found.S, expected.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.U, expected.U, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.Vh, expected.Vh, rtol=0, atol=1e-3)


@pytest.mark.parametrize("function", ["svd", "eigvalsh"])
def test_the_krylov_path_survives_a_failure_inside(function, monkeypatch):
    W = gaussian(600, 900)
    expected = top_svd(W, 6)
    monkeypatch.setattr(torch.linalg, function, failing(getattr(torch.linalg, function), times=1))
    found = top_svd(W, 6)
    check_promises(found, W, 6)
    torch.testing.assert_close(found.S, expected.S, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(40, 60), (600, 900)])
def test_an_svd_that_never_converges_is_a_numerics_error(shape, monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", failing(torch.linalg.svd, times=10**9))
    with pytest.raises(NumericsError, match=r"does not converge.*look for damaged values"):
        top_svd(gaussian(*shape), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_nan_and_inf_are_named_with_the_first_index(value, text, dtype):
    W = torch.ones(20, 30, dtype=dtype)
    W[3, 7] = value
    W[3, 9] = W[11, 2] = math.nan
    with pytest.raises(NumericsError, match=rf"^the weight is {text} at \[3, 7\]: "):
        top_svd(W, 2)


def test_a_singular_value_beyond_the_dtype_is_an_error_not_inf():
    W = torch.full((40, 40), 3e38)
    with pytest.raises(NumericsError, match=r"does not fit torch\.float32: pass the weight as float64"):
        top_svd(W, 2)
    assert float(top_svd(W.double(), 2).S[0]) == pytest.approx(1.2e40, rel=1e-6)


@pytest.mark.parametrize(
    ("W", "options", "message"),
    [
        (torch.ones(4, 6), {"r": 0}, "r = 0 is not an integer from 1 to 4, the limit for shape (4, 6): change r"),
        (torch.ones(4, 6), {"r": -1}, "r = -1 is not"),
        (torch.ones(4, 6), {"r": 5}, "r = 5 is not"),
        (torch.ones(4, 6), {"r": 2.0}, "r = 2.0 is not"),
        (torch.ones(0, 6), {}, "r = 1 is not an integer from 1 to 0"),
        (torch.ones(4, 6), {"tol": 0.0}, "tol = 0.0 is not between 0 and 1: "),
        (torch.ones(4, 6), {"tol": 1.0}, "tol = 1.0 is not"),
        (torch.ones(4, 6), {"tol": math.nan}, "tol = nan is not"),
        (torch.ones(4, 6), {"seed": -1}, "seed = -1 is not an integer from 0 to 2**63 - 1: "),
        (torch.ones(4, 6), {"seed": 2**63}, "seed = 9223372036854775808 is not"),
        (torch.ones(4, 6), {"seed": 0.5}, "seed = 0.5 is not"),
        (torch.ones(6), {}, "an SVD needs a matrix, not shape (6,): reshape"),
        (torch.ones(2, 3, 4), {}, "an SVD needs a matrix, not shape (2, 3, 4): reshape"),
        (torch.ones(4, 6, dtype=torch.int8), {}, "not torch.int8: dequantise"),
        (torch.ones(4, 6, dtype=torch.complex64), {}, "not torch.complex64: dequantise"),
        (torch.ones(4, 6).to(torch.float8_e4m3fn), {}, "not torch.float8_e4m3fn: dequantise"),
        (torch.ones(4, 6, device="meta"), {}, "shape (4, 6) is on the meta device and has no values: load it first"),
        (torch.eye(4).to_sparse(), {}, "not torch.sparse_coo: pass W.to_dense()"),
    ],
)
def test_bad_arguments_are_config_errors_of_one_line(W, options, message):
    with pytest.raises(ConfigError) as caught:
        top_svd(W, **{"r": 1, **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)  # what is wrong: what to do


def test_overwriting_gives_the_same_bits():
    W = torch.randn(600, 700, generator=torch.Generator().manual_seed(0))
    for layout in (W, W.T.contiguous().T):
        expected = top_svd(layout, 4)
        found = top_svd(layout.clone(), 4, overwrite=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:3], expected[:3], strict=True))
