"""One adapter of several: the weighted sum of their changes W' - W0, or one of PEFT's other combinations of them.

Every adapter of the table is W' = g (W0 + s L R) with a gain g per row, so a weighted sum of changes is one again,
exactly, with the ranks added up (2r for methods with a frozen start, r for the others):

    W0 + sum_i w_i (W'_i - W0) = G (W0 + F),   G = 1 + sum_i w_i (g_i - 1),   F = sum_i w_i g_i s_i L_i R_i / G

It is a DoRA with the magnitude G ||W0 + F||, and where no adapter has a magnitude a plain LoRA with G = 1. Of a smaller
rank the best F is taken, in the norm of the change; the gains stay exact. What has no low rank (entries that were
dropped one by one) is split into the gains that explain most of it and the best F of the wanted rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dude_peft.core.magnitude import direction_norm, norm_change, row_norm
from dude_peft.core.svd import top_svd
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.tuner.combine import KINDS, Combination
from dude_peft.tuner.config import DudeConfig, closest
from dude_peft.tuner.layer import DudeLinear

# PEFT's names: "linear", "cat" and "svd" are the weighted sum, whole or of a smaller rank.
COMBINATIONS = ("svd", "cat", *KINDS, *(f"{kind}_svd" for kind in KINDS if kind != "linear"))


@dataclass(frozen=True)
class Sum:
    """What is added up: adapters with their weights, in which way, of which rank."""

    parts: list[tuple[str, float]]
    combination: Combination
    rank: int | None
    """None: as large as the sum is."""
    magnitude: bool
    """Whether the new adapter has one, because one of the others has."""
    multiples: dict[str, int]
    """How many times r the rank of each adapter's change is."""

    def rank_in(self, layer: DudeLinear) -> int:
        """Rank of the new adapter in one layer."""
        present = [name for name, _ in self._present(layer)]
        whole = sum(self.multiples[name] * layer.r[name] for name in present) if self.rank is None else self.rank
        return max(1, min(whole, layer.out_features, layer.in_features))

    def factors(self, layer: DudeLinear) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (r, in), B (out, r) and dm (out,) of the new adapter in one layer, with a scaling of 1.

        Raises:
            NumericsError: the weights take the gain of a row to zero, or the sum is not finite.
        """
        gain, E, R = self._sum(layer) if self.combination.by_rows else self._combined(layer)
        if not bool((gain.abs() > 1e-6).all()) or not bool(torch.isfinite(E).all()):
            raise NumericsError(
                f"the weights take a row of '{layer.layer_name}' to zero or to infinity; choose smaller weights"
            )
        A, B = _reduced(E, R, self.rank_in(layer))
        B = B / gain[:, None]
        return A, B, self._magnitude(layer, A, B, gain) if self.magnitude else None

    def _present(self, layer: DudeLinear) -> list[tuple[str, float]]:
        return [(name, weight) for name, weight in self.parts if name in layer.r]

    def _sum(self, layer: DudeLinear) -> tuple[Tensor, Tensor, Tensor]:
        """The gains G (out,), and G F as E (out, k) R (k, in), in float64."""
        gain = torch.ones(layer.out_features, dtype=torch.float64)
        left, right = [], []
        for name, weight in self._present(layer):
            state, g = layer.tensors(name), layer.gain(name)
            g = torch.ones_like(gain) if g is None else g.detach().cpu().double()
            gain += weight * (g - 1)
            scale = (weight * layer.scaling[name] * g)[:, None]
            assert state.dA is not None
            dA, dB = state.dA.detach().cpu().double(), state.dB.detach().cpu().double()
            A = dA if state.A0 is None else state.A0.cpu().double() + dA
            left.append(scale * dB)
            right.append(A)
            if state.B0 is not None:
                left.append(scale * state.B0.cpu().double())
                right.append(dA)
        return gain, torch.cat(left, dim=1), torch.cat(right)

    def _combined(self, layer: DudeLinear) -> tuple[Tensor, Tensor, None]:
        """The same for a change without a low rank, E (out, in)."""
        W0 = layer.effective_weight([]).cpu()
        present = self._present(layer)
        deltas = [layer.effective_weight([name]).cpu().sub_(W0) for name, _ in present]
        E = self.combination.of(deltas, [weight for _, weight in present], layer.layer_name).double()
        gain = torch.ones(len(E), dtype=torch.float64)
        if self.magnitude:  # the share of each row that lies along W0's own
            W0 = W0.double()
            squared = W0.square().sum(dim=1)
            along = torch.where(squared > 0, (E * W0).sum(dim=1) / squared.clamp_min(1e-300), 0.0)
            gain += along
            E = E - along[:, None] * W0
        return gain, E, None

    def _magnitude(self, layer: DudeLinear, A: Tensor, B: Tensor, gain: Tensor) -> Tensor:
        """`dm = G n - m0` with the norm n of W0 + B A, free of cancellation."""
        W0 = layer.effective_weight([]).cpu().double()
        m0 = row_norm(W0)
        q = norm_change(W0 @ A.T, None, A, B, None, None, 1.0)
        n = direction_norm(m0, q)
        return torch.where(m0 > 0, n * (gain - 1) + q / (n + m0).clamp_min(1e-300), 0.0)


def plan_sum(
    configs: dict[str, DudeConfig],
    adapters: list[str],
    weights: list[float],
    kind: str,
    rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> Sum:
    """The sum that is asked for, checked.

    Raises:
        ConfigError: it cannot be.
    """
    if kind not in COMBINATIONS:
        raise ConfigError(f"combination_type {kind!r} is unknown; {closest(kind, COMBINATIONS)}")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
    if not all(abs(weight) < float("inf") for weight in weights):
        raise ConfigError(f"weights={weights}: give finite numbers")
    if rank is not None and rank < 1:
        raise ConfigError(f"svd_rank={rank}; a rank is a whole number of at least 1")
    for name in adapters:
        if not configs[name].spec.ranked:
            raise ConfigError(
                f"adapter '{name}' is of method {configs[name].method}, which has no rank, so it is no part of a new "
                "adapter; use dude merge, which adds up the changes of the weights"
            )
        if configs[name].modules_to_save or configs[name].bias != "none":
            raise ConfigError(
                f"adapter '{name}' trains {'modules' if configs[name].modules_to_save else 'biases'} in full, which "
                "cannot be combined; merge this adapter on its own"
            )
    base = kind.removesuffix("_svd")
    whole = kind in ("linear", "cat")
    how = Combination("linear" if whole or kind == "svd" else base, density, 0, majority_sign_method)
    if rank is None and not whole:
        rank = max(_most_columns(configs[name]) for name in adapters)
    magnitude = any(configs[name].spec.normalised for name in adapters)
    multiples = {name: configs[name].spec.multiple for name in adapters}
    return Sum(list(zip(adapters, weights, strict=True)), how, rank, magnitude, multiples)


def _most_columns(config: DudeConfig) -> int:
    r = max(config.r, *config.rank_pattern.values(), 1)
    return config.spec.multiple * r


def _reduced(E: Tensor, R: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with B A the best there is for E R (for E alone without R)."""
    if R is not None and len(R) <= rank:  # whole; rows of zeros where another layer needs more
        pad = rank - len(R)
        return torch.cat([R, R.new_zeros(pad, R.shape[1])]), torch.cat([E, E.new_zeros(len(E), pad)], dim=1)
    if R is None:
        top = top_svd(E, rank)
        U, S, Vh = top.U, top.S, top.Vh
    else:  # through matrices of the ranks' size
        Q_left, T_left = torch.linalg.qr(E)
        Q_right, T_right = torch.linalg.qr(R.T)
        U, S, Vh = torch.linalg.svd(T_left @ T_right.T)
        U, S, Vh = Q_left @ U[:, :rank], S[:rank], Vh[:rank] @ Q_right.T
    root = S.sqrt()
    return root[:, None] * Vh, U * root
