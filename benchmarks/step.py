"""Time of one training step (forward, backward, optimizer) against PEFT LoRA, per model and per layer.

    python benchmarks/step.py model --dtype float32
    python benchmarks/step.py layer --dtype bfloat16 --shapes 4096x4096,11008x4096 --tokens 256,1024 --ranks 16
    python benchmarks/step.py growth

The calls are those of transformers' Trainer: `model.train()` before every micro-batch, --accumulation of them a step.
Beside each ratio of times stand those of counted operations and bytes (`work.py`): the bound that the mathematics sets.
The physical limit of a case is the frozen base: `flops` counts its products (forward, and backward to the input), and
`roofline` is the time these take at the speed of a plain matrix product of the same size on the same machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import arguments, exponents, finish, interleaved, numbers, set_threads, show
from subjects import (
    BASELINE,
    OneLinear,
    adapt,
    common_settings,
    configurations,
    layer_step,
    llama,
    model_step,
    other_version,
)
from subjects import growth as grown
from work import counted, spent

COLUMNS = ["ratio", "ratio_low", "ratio_high", "flops_ratio", "bytes_ratio", "median_seconds"]


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("what", choices=["model", "layer", "growth"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--tokens", default="1024", help="model: in sequences of 512")
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="out x in, of the layers")
    parser.add_argument("--accumulation", default="1", help="micro-batches of that many tokens in a step")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing (model)")
    parser.add_argument("--compile", action="store_true", help="under torch.compile (model); nothing is counted")
    parser.add_argument("--profile", action="store_true", help="show in what the time goes, after it was taken (model)")
    parser.add_argument("--against", type=Path, default=None, help="src folder of another version, timed beside ours")
    parser.add_argument("--cases", default=None, help="names to keep, comma-separated")
    settings = parser.parse_args()
    set_threads(settings)
    results = {"model": model, "layer": layer, "growth": growth}[settings.what](settings)
    finish(f"step {settings.what}", settings, results)


def model(settings: Any) -> dict[str, Any]:
    """Step of a whole language model."""
    results: dict[str, Any] = {}
    dtype = getattr(torch, settings.dtype)
    base = llama(dtype, settings.hidden, settings.layers, settings.intermediate, settings.vocabulary)
    base.to(settings.device)
    parameters = sum(p.numel() for p in base.parameters())
    products = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear))
    for rank, accumulation in itertools.product(numbers(settings.ranks), numbers(settings.accumulation)):
        for tokens in numbers(settings.tokens):
            length = min(512, tokens)
            ids = torch.randint(settings.vocabulary, (tokens // length, length), device=settings.device)
            steps = {}
            for name, adapted in _models(settings, base, rank).items():
                if settings.checkpointing:
                    adapted.gradient_checkpointing_enable({"use_reentrant": False})
                trained = torch.compile(adapted) if settings.compile else adapted
                steps[name] = model_step(trained, ids, accumulation=accumulation)
            rows = _timed(steps, settings)
            flops = 4 * products * tokens * accumulation
            title = f"{parameters / 1e6:.1f} M Llama, {settings.dtype}, {_batch(tokens, accumulation)}, r = {rank}"
            show(title, rows, COLUMNS)
            results[title] = {"flops_of_the_frozen_base": flops, "rows": rows}
            if settings.profile:
                parts = spent(steps, BASELINE, settings.rounds)
                show(f"{title}: parts of a step, over all of PEFT LoRA's", parts, list(parts[BASELINE]))
                results[title]["parts"] = parts
    return results


def layer(settings: Any) -> dict[str, Any]:
    """Step of one linear layer."""
    results: dict[str, Any] = {}
    dtype = getattr(torch, settings.dtype)
    for shape in settings.shapes.split(","):
        out, in_ = (int(n) for n in shape.split("x"))
        base = OneLinear(in_, out, dtype).to(settings.device)
        for rank in numbers(settings.ranks):
            models = _models(settings, base, rank)
            for tokens, accumulation in itertools.product(numbers(settings.tokens), numbers(settings.accumulation)):
                x, dy = (torch.randn(tokens, n, device=settings.device).to(dtype) for n in (in_, out))
                cases = {name: layer_step(m, x, dy, accumulation) for name, m in models.items()}
                weight = base.linear.weight
                cases["roofline"] = lambda x=x, dy=dy, weight=weight, times=accumulation: [
                    (x @ weight.T, dy @ weight) for _ in range(times)
                ]
                rows = _timed(cases, settings)
                title = f"linear {out} x {in_}, {settings.dtype}, {_batch(tokens, accumulation)}, r = {rank}"
                show(title, rows, COLUMNS)
                bytes_ = accumulation * weight.element_size() * (2 * weight.numel() + 2 * tokens * (in_ + out))
                results[title] = {"flops": 4 * out * in_ * tokens * accumulation, "bytes": bytes_, "rows": rows}
    return results


def growth(settings: Any) -> dict[str, Any]:
    """Time of DuDe's step against rank, tokens, width and depth, with the exponent of a fitted power law."""

    def measure(base: Any, ids: Any, rank: int) -> dict[str, Any]:
        cases = configurations(rank)
        steps = {name: model_step(adapt(base, cases[name]()), ids) for name in (BASELINE, "DuDe")}
        timed = interleaved(steps, settings.rounds, settings.device, BASELINE)
        return {**timed["DuDe"], "lora_seconds": timed[BASELINE]["median_seconds"]}

    results: dict[str, Any] = {}
    for axis, rows in grown(measure, getattr(torch, settings.dtype), settings.device):
        fitted = exponents(rows, {"DuDe": "median_seconds", BASELINE: "lora_seconds"})
        show(f"growth with {axis}: seconds ~ {axis}^{fitted['DuDe']:.2f}", rows, COLUMNS)
        results[axis] = {"exponents": fitted, "rows": rows}
    return results


def _timed(steps: dict[str, Callable[[], Any]], settings: Any) -> dict[str, dict[str, Any]]:
    # A compiled step has no operators left to count.
    work = {name: {} for name in steps} if settings.compile else counted(steps, BASELINE)
    timed = interleaved(steps, settings.rounds, settings.device, BASELINE)
    return {name: {**timed[name], **work[name]} for name in steps}


def _batch(tokens: int, accumulation: int) -> str:
    return f"{tokens} tokens" if accumulation == 1 else f"{accumulation} x {tokens} tokens"


def _models(settings: Any, base: torch.nn.Module, rank: int) -> dict[str, torch.nn.Module]:
    cases = configurations(rank)
    wanted = set(cases) if settings.cases is None else {BASELINE, *settings.cases.split(",")}
    models = {name: adapt(base, case()) for name, case in cases.items() if name in wanted}
    if settings.against is not None:
        with other_version(settings.against) as config:
            models["DuDe, other version"] = adapt(base, config(**common_settings(rank)))
    return {name: model.to(settings.device) for name, model in models.items()}


if __name__ == "__main__":
    main()
