"""What every method costs: its start, a training step, memory and file, against PEFT LoRA of the same rank.

    python benchmarks/methods.py --json benchmarks/results/DATE-methods.json

One Llama with random weights, all linears, one process; the steps are interleaved. `start` is `get_peft_model`; `peak`
is that of one forward and backward, counted as in `benchmarks/memory.py`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import arguments, finish, interleaved, set_threads, show
from memory import measured
from peft import LoraConfig, get_peft_model
from subjects import BASELINE, adapt, common_settings, llama, model_step

from dude_peft import METHODS, DudeConfig

COLUMNS = ["ratio", "ratio_low", "ratio_high", "peak_ratio", "start_seconds", "trained_parameters", "file_mib"]


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    settings = parser.parse_args()
    set_threads(settings)
    dtype = getattr(torch, settings.dtype)
    base = llama(dtype, settings.hidden, settings.layers, settings.intermediate, settings.vocabulary)
    base.to(settings.device)
    rows = methods(settings, base)
    title = (
        f"{settings.layers} layers of {settings.hidden}, {settings.dtype}, {settings.tokens} tokens, r = {settings.r}"
    )
    show(title, rows, COLUMNS)
    finish("methods", settings, {title: rows})


def methods(settings: Any, base: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """A row a method, PEFT LoRA's first."""
    ids = torch.randint(settings.vocabulary, (1, settings.tokens), device=settings.device)
    common = common_settings(settings.r)
    cases = {BASELINE: lambda: LoraConfig(**common)}
    cases |= {name: lambda name=name: DudeConfig(**common, method=name) for name in METHODS}
    rows: dict[str, dict[str, Any]] = {}
    steps = {}
    for name, configuration in cases.items():
        rows[name] = start_and_file(base, configuration())
        adapted = adapt(base, configuration()).to(settings.device)
        rows[name] |= measured(adapted, ids, settings.device)
        steps[name] = model_step(adapted, ids)
    for name, timed in interleaved(steps, settings.rounds, settings.device, BASELINE).items():
        rows[name] |= {**timed, "peak_ratio": rows[name]["peak_mib"] / rows[BASELINE]["peak_mib"]}
    return rows


def start_and_file(base: torch.nn.Module, configuration: Any) -> dict[str, Any]:
    """Seconds of the start, what trains, and the size of the saved weights."""
    began = time.perf_counter()
    model = get_peft_model(base, configuration)
    seconds = time.perf_counter() - began
    trained, _ = model.get_nb_trainable_parameters()
    with tempfile.TemporaryDirectory(prefix="dude-methods-") as folder:
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    model.unload()
    return {"start_seconds": seconds, "trained_parameters": trained, "file_mib": size / 2**20}


if __name__ == "__main__":
    main()
