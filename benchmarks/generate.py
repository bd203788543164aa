"""Greedy generation under an adapter: time of a continuation against PEFT LoRA, and merged against the base model.

python benchmarks/generate.py --dtype float32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import arguments, finish, interleaved, set_threads, show
from subjects import BASELINE, adapt, configurations, llama


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    settings = parser.parse_args()
    set_threads(settings)
    base = llama(getattr(torch, settings.dtype)).to(settings.device)
    ids = torch.randint(8192, (1, settings.prompt), device=settings.device)

    def continuation(model: Any) -> Callable[[], None]:
        model.eval()
        model.config.use_cache = True

        def run() -> None:
            with torch.no_grad():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=settings.new,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )

        return run

    models = {name: adapt(base, make()).to(settings.device) for name, make in configurations(settings.r).items()}
    models["DuDe, merged"] = adapt(base, configurations(settings.r)["DuDe"]()).merge_and_unload()
    cases = {name: continuation(model) for name, model in models.items()}
    results = {}
    for baseline in (BASELINE, "frozen base"):
        rows = interleaved(cases, settings.rounds, settings.device, baseline)
        title = f"{settings.new} tokens after {settings.prompt}, {settings.dtype}, r = {settings.r}: against {baseline}"
        show(title, rows, ["ratio", "ratio_low", "ratio_high", "median_seconds"])
        results[title] = rows
        cases = {name: case for name, case in cases.items() if name in ("frozen base", "DuDe, merged")}
    finish("generate", settings, results)


if __name__ == "__main__":
    main()
