"""Peak memory of one training step (forward and backward) against PEFT LoRA, and what is saved between the two.

    python benchmarks/memory.py --dtype float32 --dtype bfloat16
    python benchmarks/memory.py growth

On a CPU every storage that the step makes is counted while it lives, by a dispatch mode: exact, and the same on every
machine. On a GPU the allocator's own peak is read. What was there before it (weights, the adapter) is not counted,
gradients of the adapter are.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from measure import arguments, exponents, finish, numbers, show
from subjects import BASELINE, adapt, configurations, llama, model_step
from subjects import growth as grown

from dude_peft.planning.live_bytes import LiveBytes


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("what", nargs="?", default="model", choices=["model", "growth"])
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=1024, help="in sequences of 512")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    settings = parser.parse_args()
    settings.dtype = settings.dtype or ["float32", "bfloat16"]
    results = model(settings) if settings.what == "model" else growth(settings)
    finish(f"memory {settings.what}", settings, results)


def model(settings: Any) -> dict[str, Any]:
    """Peak of a whole language model's step under every adapter."""
    results = {}
    length = min(512, settings.tokens)
    ids = torch.randint(settings.vocabulary, (settings.tokens // length, length), device=settings.device)
    for name in settings.dtype:
        dtype = getattr(torch, name)
        base = llama(dtype, settings.hidden, settings.layers, settings.intermediate, settings.vocabulary)
        base.to(settings.device)
        for rank in numbers(settings.ranks):
            rows = {}
            for case, configuration in configurations(rank).items():
                adapted = adapt(base, configuration()).to(settings.device)
                if settings.checkpointing:
                    adapted.gradient_checkpointing_enable({"use_reentrant": False})
                rows[case] = measured(adapted, ids, settings.device)
            for row in rows.values():
                row["peak_ratio"] = row["peak_mib"] / rows[BASELINE]["peak_mib"]
                row["saved_ratio"] = row["saved_mib"] / rows[BASELINE]["saved_mib"]
            title = f"{name}, {settings.layers} layers of {settings.hidden}, {settings.tokens} tokens, r = {rank}"
            show(title, rows, ["peak_ratio", "peak_mib", "saved_ratio", "saved_mib"])
            results[title] = rows
    return results


def measured(model: Any, ids: Any, device: str) -> dict[str, float]:
    """MiB at the peak of forward and backward, and between the two."""
    step = model_step(model, ids, optimize=False)
    step()  # caches that stay (rotary tables, the norm) are there from now on
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids).loss
        saved = torch.cuda.memory_allocated() - before
        loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes([]) as live:
            loss = model(input_ids=ids, labels=ids).loss
            saved = live.now
            loss.backward()
        peak = live.peak
    model.zero_grad()
    return {"peak_mib": peak / 2**20, "saved_mib": saved / 2**20}


def growth(settings: Any) -> dict[str, Any]:
    """DuDe's peak against rank, tokens, width and depth, with the exponent of a fitted power law."""

    def measure(base: Any, ids: Any, rank: int) -> dict[str, float]:
        cases = configurations(rank)
        ours, lora = (
            measured(adapt(base, cases[name]()), ids, settings.device)["peak_mib"] for name in ("DuDe", BASELINE)
        )
        return {"peak_mib": ours, "lora_peak_mib": lora, "peak_ratio": ours / lora}

    results: dict[str, Any] = {}
    for axis, rows in grown(measure, torch.float32, settings.device):
        fitted = exponents(rows, {"DuDe": "peak_mib", BASELINE: "lora_peak_mib"})
        show(f"growth with {axis}: peak ~ {axis}^{fitted['DuDe']:.2f}", rows, ["peak_ratio", "peak_mib"])
        results[axis] = {"exponents": fitted, "rows": rows}
    return results


if __name__ == "__main__":
    main()
