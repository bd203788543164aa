"""What a rank is worth in every layer: by the weight's own spectrum, or by the loss's gradient on training rows.

The gradient of a weight is never formed. Its products with the weight's leading singular vectors are gathered while
the model runs, so a frozen, quantised or tied weight serves as well, and memory is that of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from dude_peft.core.svd import TopSVD, full_precision_products, top_svd
from dude_peft.core.tangent import tangent_energy
from dude_peft.core.threads import one_thread, single_threaded_pool
from dude_peft.data.batches import pad_right
from dude_peft.data.seeded import shuffled
from dude_peft.errors import NumericsError
from dude_peft.methods import SplitOptions

# Every thread holds a copy of its weight.
_MOST_THREADS = 8
_STREAM = 7  # of the seeded order: no other choice of rows follows it


def leading(
    weights: Mapping[str, Callable[[], Tensor]],
    ranks: Mapping[str, int],
    options: SplitOptions,
    device: torch.device | None = None,
) -> Iterator[tuple[str, TopSVD]]:
    """Leading singular triplets of every layer, in order; each on one thread, so the number of threads changes no bit.

    Args:
        weights: name -> a function that gives W0 (out, in), float32 or float64.
        ranks: how many triplets.
        options: tolerance and seed of the SVD.
        device: where the weights are; None is the CPU, on which several layers are computed at a time.

    Raises:
        NumericsError: NaN or Inf in a weight.
    """
    most = _MOST_THREADS if device is None or device.type == "cpu" else 1

    def of(name: str) -> TopSVD:
        with torch.no_grad(), one_thread():
            W0 = weights[name]()
            try:
                with full_precision_products(W0.device):
                    tol, exact = options.svd_tol or 1e-3, options.svd_tol == 0
                    return top_svd(W0, ranks[name], tol=tol, seed=options.svd_seed, exact=exact)
            except NumericsError as error:
                raise NumericsError(f"base weight of '{name}': {error}") from error

    with single_threaded_pool(len(weights), most) as pool:
        yield from zip(weights, pool.map(of, weights), strict=True)


def spectrum_worths(found: Iterator[tuple[str, TopSVD]]) -> dict[str, list[float]]:
    """Share of ||W0||^2 that the leading r singular values capture, for r = 0, 1, ..."""
    worths = {}
    for name, svd in found:
        energy = svd.S.double().square().cumsum(dim=0)
        share = svd.captured / float(energy[-1]) if float(energy[-1]) else 0.0
        worths[name] = [0.0, *(energy * share).tolist()]
    return worths


@dataclass
class _Gathered:
    """U_k^T G (k, in) and G V_k (out, k) of one layer, summed over what has run."""

    svd: TopSVD
    left: Tensor | None = None
    right: Tensor | None = None

    def add(self, x: Tensor, dy: Tensor) -> None:
        """X (*, in) came in, and dy (*, out) is the gradient of what came out; G gains dy^T x."""
        U, Vh = self.svd.U, self.svd.Vh
        x, dy = x.detach().flatten(0, -2).to(U), dy.detach().flatten(0, -2).to(U)
        left, right = (dy @ U).T @ x, dy.T @ (x @ Vh.T)
        self.left = left if self.left is None else self.left + left
        self.right = right if self.right is None else self.right + right

    def energy(self) -> Tensor:
        """(k + 1,) float64 on the CPU; zero for a layer that no gradient has reached."""
        if self.left is None or self.right is None:
            return torch.zeros(self.svd.S.shape[0] + 1, dtype=torch.float64)
        return tangent_energy(self.left, self.right, self.left @ self.svd.Vh.T).cpu()


def gradient_worths(
    model: Any,
    layers: Mapping[str, nn.Module],
    found: Iterator[tuple[str, TopSVD]],
    examples: Sequence[Mapping[str, Sequence[int]]],
    pad_id: int,
    *,
    each_row: bool,
) -> dict[str, list[float]]:
    """Energy of the loss's gradient in the tangent space of every layer's leading r triplets, for r = 0, 1, ...

        gradient   E(r) = || P_r( sum_n G_n ) ||^2 / N        fisher   E(r) = sum_n || P_r(G_n) ||^2 / N

    G_n is the gradient of row n's summed cross-entropy with respect to W0, P_r as in `core.tangent`. The second is the
    trace of the empirical Fisher matrix, restricted to what the factors can do to first order.

    Args:
        model: the base model; it is in evaluation mode afterwards.
        layers: name -> the layer in it.
        found: from `leading`.
        examples: the calibration rows, N of them.
        pad_id: of the tokenizer.
        each_row: fisher.

    Raises:
        NumericsError: a loss or gradient is not finite.
    """
    gathered = {name: _Gathered(svd) for name, svd in found}
    sums = {name: torch.zeros(each.svd.S.shape[0] + 1, dtype=torch.float64) for name, each in gathered.items()}
    model.eval()
    with _gathering(model, layers, gathered):
        for example in examples:
            batch = {name: tensor.to(model.device) for name, tensor in pad_right([example], pad_id).items()}
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits
            one = torch.tensor(1, device=logits.device)  # the row's sum, and not its mean
            loss: Any = ForCausalLMLoss(logits, labels, logits.shape[-1], one)
            loss.backward()
            if each_row:
                for name, each in gathered.items():
                    sums[name] += each.energy()
                    each.left = each.right = None
    worths = sums if each_row else {name: each.energy() for name, each in gathered.items()}
    for name, energy in worths.items():
        if not math.isfinite(float(energy[-1])):
            raise NumericsError(
                f"adapter.budget: the gradient of '{name}' on the calibration rows is not finite; use model.dtype: "
                "float32 or bfloat16"
            )
    return {name: (energy / len(examples)).tolist() for name, energy in worths.items()}


@contextmanager
def _gathering(model: Any, layers: Mapping[str, nn.Module], gathered: Mapping[str, _Gathered]) -> Iterator[None]:
    """Within: what runs through the layers, forth and back, is added to `gathered`; no parameter gets a gradient."""

    def hook(each: _Gathered) -> Callable[..., None]:
        def forward(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            x = inputs[0]
            if output.requires_grad:
                output.register_hook(lambda dy: each.add(x, dy))

        return forward

    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(gathered[name])).remove)
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        embeddings = model.get_input_embeddings()
        stack.callback(embeddings.register_forward_hook(_wants_gradient).remove)
        stack.enter_context(torch.enable_grad())
        try:
            yield
        finally:
            for parameter, wanted in trained:
                parameter.requires_grad_(wanted)


def _wants_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def calibration_rows(examples: Any, count: int, seed: int) -> list[Any]:
    """`count` of the domain's training rows, or all of them: the first ones of a seeded order."""
    return [examples[int(row)] for row in shuffled(examples.domain, seed, _STREAM)[:count]]
