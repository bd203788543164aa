"""Merging and unmerging an adapter against PEFT LoRA, and a merged model's forward against the base model's.

python benchmarks/merge.py --dtype float32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import arguments, finish, interleaved, set_threads, show
from subjects import BASELINE, adapt, configurations, llama

COLUMNS = ["ratio", "ratio_low", "ratio_high", "median_seconds"]


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    settings = parser.parse_args()
    set_threads(settings)
    base = llama(getattr(torch, settings.dtype)).to(settings.device)
    ids = torch.randint(8192, (1, settings.tokens), device=settings.device)
    models = {n: adapt(base, c()) for n, c in configurations(settings.r).items() if n != "frozen base"}

    def there_and_back(model: Any) -> Callable[[], None]:
        def run() -> None:
            model.merge_adapter()
            model.unmerge_adapter()

        return run

    def forward(model: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model(input_ids=ids)

        return run

    merging = interleaved({n: there_and_back(m) for n, m in models.items()}, settings.rounds, settings.device, BASELINE)
    show(f"merge and unmerge, {settings.dtype}, r = {settings.r}", merging, COLUMNS)
    subjects = {"frozen base": adapt(base, None), "DuDe, merged": models["DuDe"].merge_and_unload()}
    inference = interleaved({n: forward(m.eval()) for n, m in subjects.items()}, settings.rounds, settings.device)
    show(f"forward of {settings.tokens} tokens, {settings.dtype}", inference, COLUMNS)
    finish("merge", settings, {"merge and unmerge": merging, "forward": inference})


if __name__ == "__main__":
    main()
