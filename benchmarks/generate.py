"""Greedy generation under an adapter: time of a continuation against PEFT LoRA, and merged against the base model.

With --head also rows that begin alike, as held-out rows and prompts do: their losses and answers, with what they begin
with computed once against whole rows, and the tokens that each way computes.

python benchmarks/generate.py --dtype float32
python benchmarks/generate.py --head 256 --rest 64 --cases "our lora"
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from measure import arguments, finish, interleaved, set_threads, show
from subjects import BASELINE, adapt, configurations, llama

from dude_peft.data.labels import IGNORE
from dude_peft.measure.score import complete, item_losses


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12, help="of the model, which is 768 wide")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--head", type=int, default=0, help="tokens that rows begin with; 0 leaves such rows out")
    parser.add_argument("--rest", type=int, default=64, help="tokens of a row behind its head, half to twice of it")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--cases", default=None, help="names to keep beside the base, LoRA and DuDe, comma-separated")
    settings = parser.parse_args()
    set_threads(settings)
    base = llama(getattr(torch, settings.dtype), layers=settings.layers).to(settings.device)
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

    known = configurations(settings.r)
    kept = known if settings.cases is None else {BASELINE, "DuDe", "frozen base", *settings.cases.split(",")}
    models = {name: adapt(base, make()).to(settings.device) for name, make in known.items() if name in kept}
    models["DuDe, merged"] = adapt(base, known["DuDe"]()).merge_and_unload()
    cases = {name: continuation(model) for name, model in models.items()}
    results = {}
    for baseline in (BASELINE, "frozen base"):
        rows = interleaved(cases, settings.rounds, settings.device, baseline)
        title = f"{settings.new} tokens after {settings.prompt}, {settings.dtype}, r = {settings.r}: against {baseline}"
        show(title, rows, ["ratio", "ratio_low", "ratio_high", "median_seconds"])
        results[title] = rows
        cases = {name: case for name, case in cases.items() if name in ("frozen base", "DuDe, merged")}
    if settings.head:
        results |= behind_heads(models["DuDe"], settings)
    finish("generate", settings, results)


def behind_heads(model: Any, settings: Any) -> dict[str, Any]:
    """Losses and answers of rows that begin alike, both ways."""
    draw = random.Random(0)
    head = [draw.randrange(2, 8192) for _ in range(settings.head)]
    rests = [
        [draw.randrange(2, 8192) for _ in range(draw.randrange(settings.rest // 2, 2 * settings.rest))]
        for _ in range(settings.rows)
    ]
    prompts = [[*head, *rest[: len(rest) // 2]] for rest in rests]
    examples = [
        {"input_ids": [*head, *rest], "labels": [IGNORE] * len(prompt) + rest[len(rest) // 2 :]}
        for rest, prompt in zip(rests, prompts, strict=True)
    ]
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None, decode=lambda ids, **_: str(ids))
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, found: read.append(given[0].numel()))

    def losses(share: bool) -> Any:
        return item_losses(model, examples, pad_id=0, batch_size=16, share=share).losses

    def answers(share: bool) -> Any:
        how: dict[str, Any] = {"max_new_tokens": settings.new, "batch_size": 16, "share": share}
        return complete(model, tokenizer, prompts, **how)

    results: dict[str, Any] = {}
    for what, compute in (("losses", losses), ("answers", answers)):
        found, tokens = {}, {}
        for share in (False, True):
            read.clear()
            found[share], tokens[share] = compute(share), sum(read)
        cases = {"whole rows": lambda: compute(False), "head once": lambda: compute(True)}  # noqa: B023
        rows = interleaved(cases, settings.rounds, settings.device)
        for name, share in (("whole rows", False), ("head once", True)):
            rows[name]["tokens"] = tokens[share]
        if what == "answers":
            rows["head once"]["others"] = sum(a != b for a, b in zip(*found.values(), strict=True))
        else:
            pairs = zip(*found.values(), strict=True)
            rows["head once"]["relative_error"] = max(abs(a - b) / abs(a) for a, b in pairs)
        title = f"{what} of {settings.rows} rows, head {settings.head}, rest about {settings.rest}, {settings.dtype}"
        show(title, rows, ["ratio", "ratio_low", "ratio_high", "median_seconds", "tokens", "relative_error", "others"])
        results[title] = rows
    return results


if __name__ == "__main__":
    main()
