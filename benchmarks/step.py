"""Time of one training step (forward, backward, optimizer) against PEFT LoRA, per model and per layer.

    python benchmarks/step.py model --dtype float32
    python benchmarks/step.py layer --dtype bfloat16 --shapes 4096x4096,11008x4096 --tokens 256,1024 --ranks 16
    python benchmarks/step.py growth

The physical limit of a case is the frozen base: `flops` counts its products (forward, and backward to the input), and
`roofline` is the time these take at the speed of a plain matrix product of the same size on the same machine.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from measure import arguments, finish, interleaved, set_threads, show
from subjects import BASELINE, OneLinear, adapt, configurations, layer_step, llama, model_step

COLUMNS = ["ratio", "ratio_low", "ratio_high", "median_seconds"]


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("what", choices=["model", "layer", "growth"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--tokens", default="1024", help="model: in sequences of 512")
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="out x in, of the layers")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing (model)")
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
    for rank in _numbers(settings.ranks):
        for tokens in _numbers(settings.tokens):
            length = min(512, tokens)
            ids = torch.randint(settings.vocabulary, (tokens // length, length), device=settings.device)
            steps = {}
            for name, configuration in _kept(settings, configurations(rank)).items():
                adapted = adapt(base, configuration()).to(settings.device)
                if settings.checkpointing:
                    adapted.gradient_checkpointing_enable({"use_reentrant": False})
                steps[name] = model_step(adapted, ids)
            rows = interleaved(steps, settings.rounds, settings.device, BASELINE)
            flops = 4 * products * tokens
            title = f"{parameters / 1e6:.1f} M Llama, {settings.dtype}, {tokens} tokens, r = {rank}"
            show(title, rows, COLUMNS)
            results[title] = {"flops_of_the_frozen_base": flops, "rows": rows}
    return results


def layer(settings: Any) -> dict[str, Any]:
    """Step of one linear layer."""
    results: dict[str, Any] = {}
    dtype = getattr(torch, settings.dtype)
    for shape in settings.shapes.split(","):
        out, in_ = (int(n) for n in shape.split("x"))
        base = OneLinear(in_, out, dtype).to(settings.device)
        for rank in _numbers(settings.ranks):
            models = {n: adapt(base, c()).to(settings.device) for n, c in _kept(settings, configurations(rank)).items()}
            for tokens in _numbers(settings.tokens):
                x, dy = (torch.randn(tokens, n, device=settings.device).to(dtype) for n in (in_, out))
                cases = {name: layer_step(m, x, dy) for name, m in models.items()}
                weight = base.linear.weight
                cases["roofline"] = lambda x=x, dy=dy, weight=weight: (x @ weight.T, dy @ weight)
                rows = interleaved(cases, settings.rounds, settings.device, BASELINE)
                title = f"linear {out} x {in_}, {settings.dtype}, {tokens} tokens, r = {rank}"
                show(title, rows, COLUMNS)
                bytes_ = weight.element_size() * (2 * weight.numel() + 2 * tokens * (in_ + out))
                results[title] = {"flops": 4 * out * in_ * tokens, "bytes": bytes_, "rows": rows}
    return results


def growth(settings: Any) -> dict[str, Any]:
    """Time of DuDe's step against rank, tokens, width and depth, with the exponent of a fitted power law."""
    dtype = getattr(torch, settings.dtype)
    axes: dict[str, list[dict[str, int]]] = {
        "rank": [{"rank": r} for r in (8, 16, 32, 64, 128)],
        "tokens": [{"tokens": t} for t in (128, 256, 512, 1024)],
        "width": [{"hidden": h} for h in (256, 512, 768, 1024)],
        "depth": [{"layers": n} for n in (2, 4, 8, 12)],
    }
    results: dict[str, Any] = {}
    for axis, points in axes.items():
        rows = {}
        for point in points:
            setup = {"rank": 16, "tokens": 256, "hidden": 512, "layers": 4, **point}
            base = llama(dtype, setup["hidden"], setup["layers"], 8 * setup["hidden"] // 3 // 64 * 64, 2048)
            ids = torch.randint(2048, (1, setup["tokens"]), device=settings.device)
            kept = {n: c for n, c in configurations(setup["rank"]).items() if n in (BASELINE, "DuDe")}
            steps = {n: model_step(adapt(base, c()).to(settings.device), ids) for n, c in kept.items()}
            timed = interleaved(steps, settings.rounds, settings.device, BASELINE)
            rows[str(next(iter(point.values())))] = {**timed["DuDe"], "lora_seconds": timed[BASELINE]["median_seconds"]}
        exponents = {
            "DuDe": _exponent({float(n): row["median_seconds"] for n, row in rows.items()}),
            BASELINE: _exponent({float(n): row["lora_seconds"] for n, row in rows.items()}),
        }
        show(f"growth with {axis}: seconds ~ {axis}^{exponents['DuDe']:.2f}", rows, COLUMNS)
        results[axis] = {"exponents": exponents, "rows": rows}
    return results


def _exponent(points: dict[float, float]) -> float:
    """Slope of a straight line through the logarithms."""
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _kept(settings: Any, cases: dict[str, Any]) -> dict[str, Any]:
    wanted = None if settings.cases is None else {BASELINE, *settings.cases.split(",")}
    return {name: case for name, case in cases.items() if wanted is None or name in wanted}


if __name__ == "__main__":
    main()
