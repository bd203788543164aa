"""What an adapted layer asks of a GPU, counted without one: kernels started, bytes moved, and what that should take.

    python benchmarks/launches.py --json benchmarks/results/DATE-launches.json

The layers are those of one Llama block, their tensors are fake ones, and our passes are the Triton kernels. Every
operator that is no view counts as one kernel, ours as what they start. `forward` and `backward` are of a micro-batch,
`step` is what an optimizer step adds (the norm). Predicted time of a kernel is the longest of three: its bytes by the
bandwidth, its operations by the speed, and its start. Starts are counted again as a sum, for a GPU that waits for them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import arguments, finish, show
from subjects import BASELINE, configurations
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dude_peft.core import compose, kernels
from dude_peft.planning.live_bytes import flops_of
from dude_peft.tuner import DudeLinear, together

CASES = (BASELINE, "DuDe", "our lora", "PEFT DoRA")
# What is no kernel, though it is no view, and how many kernels our operators start with sums and casts behind them.
_NONE = ("empty", "prim", "detach", "promote_types", "_unsafe_view", "scalar_tensor", "alias", "lift_fresh")
_OURS = {"dude_peft::compose": 1, "dude_peft::spread": 4, "dude_peft::rows_product": 2}


class Asked(TorchDispatchMode):
    """Within: counts kernels, the bytes that they read and write, and the seconds predicted for them."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.launches = self.bytes = 0
        self.seconds = 0.0
        self._settings = settings

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts one call."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.is_view or name.partition("::")[2].startswith(_NONE) or name.startswith("prim"):
            return result
        moved = sum(t.numel() * t.element_size() for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor))
        started = _OURS.get(name, 1)
        work = flops_of(func, args, kwargs or {}, result) / (1e12 * self._settings.teraflops)
        self.launches += started
        self.bytes += moved
        self.seconds += max(moved / (1e12 * self._settings.terabytes), work, started * 1e-6 * self._settings.start)
        return result

    def found(self, layers: int) -> dict[str, float]:
        """By layer."""
        return {
            "kernels": self.launches / layers,
            "mib": self.bytes / layers / 2**20,
            "us": 1e6 * self.seconds / layers,
        }


class Block(nn.Module):
    """The linear layers of some Llama blocks, each on its own."""

    def __init__(self, hidden: int, intermediate: int, blocks: int) -> None:
        super().__init__()
        shapes = [(hidden, hidden)] * 4 + [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
        self.layers = nn.ModuleList(nn.Linear(*shape, bias=False, device="meta") for shape in shapes * blocks)
        self.to(torch.bfloat16)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Each layer's output for its own input."""
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def main() -> None:
    """Counts, and prints."""
    parser = arguments(__doc__, rounds=40)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--blocks", type=int, default=8, help="of seven layers: gains are computed together")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--terabytes", type=float, default=2.7, help="a second, of an H100: 80 %% of what it can")
    parser.add_argument("--teraflops", type=float, default=600, help="of bfloat16, likewise: what products reach")
    parser.add_argument("--start", type=float, default=3, help="microseconds, of one kernel")
    settings = parser.parse_args()
    compose.kernels_for = lambda tensor: kernels if tensor.dtype in compose._KERNEL_DTYPES else None
    # Of fake tensors on the CPU, as if they were plain ones on a GPU.
    together._PLAIN_TYPES = (*together._PLAIN_TYPES, FakeTensor)
    together._AT_ONCE_ON_CPU = together._AT_ONCE
    host = host_seconds(settings.rounds)
    results = {name: {**asked(settings, name), "host": host[name]} for name in CASES}
    base = results[BASELINE]
    for row in results.values():
        for part in ("forward", "backward"):
            row[f"{part}_us_ratio"] = row[f"{part}_us"] / base[f"{part}_us"]
    columns = [key for key in results["DuDe"] if not key.endswith("_ratio")]
    show(f"a layer, {settings.tokens} tokens, r = {settings.r}, bfloat16", results, columns)
    finish("launches", settings, results)


def asked(settings: Any, name: str) -> dict[str, float]:
    """One case, averaged over its layers."""
    from peft import get_peft_model

    config = configurations(settings.r)[name]()
    config.target_modules = {f"layers.{n}" for n in range(7 * settings.blocks)}
    config._is_sent = True  # ours then wants no weights to start from
    block = Block(settings.hidden, settings.intermediate, settings.blocks).requires_grad_(False)
    model = get_peft_model(block, config, low_cpu_mem_usage=True)
    layers = 7 * settings.blocks
    found: dict[str, float] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        tensors[key] = _fake_like(tensor)
        inputs = [
            torch.empty(settings.tokens, layer.in_features, dtype=torch.bfloat16).requires_grad_()
            for layer in model.base_model.model.layers
        ]
        model(inputs)  # W0 A0^T, once ever
        for module in model.modules():
            if isinstance(module, DudeLinear):
                module._gains.clear()
        with Asked(settings) as first:
            model(inputs)
        with Asked(settings) as forward:
            outputs = model(inputs)
        gradients = [torch.empty_like(y) for y in outputs]
        with Asked(settings) as backward:
            torch.autograd.backward(outputs, gradients)
    for part, work in (("forward", forward), ("backward", backward)):
        found |= {f"{part}_{key}": value for key, value in work.found(layers).items()}
    once, every = first.found(layers), forward.found(layers)
    return {**found, **{f"step_{key}": once[key] - every[key] for key in once}}


def host_seconds(rounds: int) -> dict[str, float]:
    """Microseconds of Python and dispatch a layer, forward, backward and norm: of layers too small to compute much."""
    from peft import get_peft_model

    width = 16
    models = {}
    for name in CASES:
        config = configurations(4)[name]()
        config.target_modules = {f"{n}" for n in range(50)}
        plain = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(50))).requires_grad_(False)
        models[name] = get_peft_model(plain, config)
    x = torch.randn(4, width, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in models}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kept, compose.kernels_for = compose.kernels_for, lambda tensor: None
    for _ in range(rounds):
        for name, model in models.items():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(1e-4)
            times[name].append(_seconds(lambda model=model: model(x).sum().backward()))
    compose.kernels_for = kept
    torch.set_num_threads(threads)
    return {name: 1e6 * statistics.median(taken) / 50 for name, taken in times.items()}


def _seconds(call: Callable[[], Any]) -> float:
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def _fake_like(tensor: Tensor) -> Tensor:
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


if __name__ == "__main__":
    main()
