"""The textbook: every formula of the paper written out, in float64, with whole matrices. Slow on purpose.

The fast code (`linear.py`, `magnitude.py`) forms none of these matrices and works in deviations; the tests
hold its outputs and all of its gradients against this file. Read this one first.

    V  = W0 - s B0 A0 + s B A            direction (DuDe, arXiv 2505.14367, section 3; PiSSA, arXiv 2404.02948)
    n  = ||V||, one norm per output row  (DoRA, arXiv 2402.09353, calls it column-wise)
    V  = W0 + dW                         direction without a rank (full fine-tuning of the layer)
    W' = diag(m / n) V                   effective weight
    y  = x W'^T + bias

Two cases that the papers leave open, decided here for the whole project:
  * A zero row of W0 has no direction to normalise: it is adapted as LoRA adapts it, W'_j = V_j, its m is unused.
  * A row whose V became zero (n_j = 0) gives W'_j = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, where


def reference_direction(
    W0: Tensor, A: Tensor | None, B: Tensor, scaling: float, A0: Tensor | None = None, B0: Tensor | None = None
) -> Tensor:
    """Direction `V = W0 - s B0 A0 + s B A`.

    Args:
        W0: (out, in) base weight.
        A: (r, in) the factor itself, not its deviation; None for the identity, where B (out, in) is dW.
        B: (out, r) the factor itself.
        scaling: s.
        A0: (r, in) start of A where the start was taken out of W0; None for LoRA and DoRA.
        B0: (out, r) start of B, with A0.

    Returns:
        (out, in) float64.

    Source: DuDe section 3.
    """
    change = B.double() if A is None else B.double() @ A.double()
    V = W0.double() + scaling * change
    if A0 is not None and B0 is not None:
        V = V - scaling * (B0.double() @ A0.double())
    return V


def reference_gain(W0: Tensor, V: Tensor, m: Tensor, norm_gradient: str = "detached") -> Tensor:
    """Gain `g = m / ||V||` of every output row; 1 on zero rows of W0, 0 where V vanished.

    Args:
        W0: (out, in) base weight.
        V: (out, in) direction.
        m: (out,) magnitude.
        norm_gradient: "detached" takes ||V|| as a constant in the gradient, "exact" does not.

    Returns:
        (out,) float64.

    Source: DoRA section 4.1; section 4.3 for the detached norm.
    """
    n_squared = V.square().sum(dim=1)
    n = where(n_squared > 0, n_squared, 1.0).sqrt()
    if norm_gradient == "detached":
        n = n.detach()
    g = where(n_squared > 0, m.double() / n, 0.0)
    zero_row = W0.double().abs().amax(dim=1) == 0
    return where(zero_row, 1.0, g)


def reference_weight(W0: Tensor, V: Tensor, m: Tensor | None) -> Tensor:
    """Effective weight `W' = diag(g) V`, (out, in) float64; V itself for methods without a magnitude."""
    return V if m is None else reference_gain(W0, V, m)[:, None] * V


def reference_linear(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    V: Tensor,
    m: Tensor | None,
    norm_gradient: str = "detached",
    x_change: Tensor | None = None,
) -> Tensor:
    """Adapted linear layer `y = g * (x W0^T + x_change (V - W0)^T) + bias`, differentiable by plain autograd.

    Args:
        x: (*, in) input.
        W0: (out, in) base weight.
        bias: (out,) or None.
        V: (out, in) direction, from `reference_direction`.
        m: (out,) magnitude, or None.
        norm_gradient: see `reference_gain`.
        x_change: (*, in) what the change sees when dropout acts on it; None means x, and then y = x W'^T + bias.

    Returns:
        (*, out) float64.

    Source: DuDe section 3; dropout on the change only is ours (DESIGN section 2), so that a start with dropout is
    the base model.
    """
    W0, x = W0.double(), x.double()
    x_change = x if x_change is None else x_change.double()
    y = x @ W0.T + x_change @ (V - W0).T
    if m is not None:
        y = reference_gain(W0, V, m, norm_gradient) * y
    return y if bias is None else y + bias.double()


def reference_tangent_energy(G: Tensor, U: Tensor, Vh: Tensor, r: int) -> Tensor:
    """Energy of `P(G) = Pu G + G Pv - Pu G Pv`, where Pu and Pv project on the first r columns of U and rows of Vh.

    Args:
        G: (out, in) a gradient.
        U: (out, k) orthonormal columns.
        Vh: (k, in) orthonormal rows.
        r: at most k.

    Returns:
        Scalar, float64.

    Source: the tangent space of matrices of rank r at U_r S V_r^T.
    """
    G, U, Vh = G.double(), U.double()[:, :r], Vh.double()[:r]
    Pu, Pv = U @ U.T, Vh.T @ Vh
    return (Pu @ G + G @ Pv - Pu @ G @ Pv).square().sum()


def reference_orthogonality(W0: Tensor, changes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """PEGO's two penalties with squares: `sum_i ||W0 D_i^T||^2` and `sum_{i<j} ||D_i D_j^T||^2`.

    Args:
        W0: (out, in) base weight.
        changes: (out, in) delta weights of the groups, scaled.

    Returns:
        Two scalars, float64: to W0, and between groups.

    Source: PEGO, arXiv 2407.15085, with the squares that are an alternative in the authors' code; what they run adds up
    absolute values, which only the (out, out) matrices themselves tell.
    """
    D = [change.double() for change in changes]
    base, between = W0.double().new_zeros(()), W0.double().new_zeros(())
    for i in range(len(D)):
        base = base + (W0.double() @ D[i].T).square().sum()
        for j in range(i + 1, len(D)):
            between = between + (D[i] @ D[j].T).square().sum()
    return base, between
