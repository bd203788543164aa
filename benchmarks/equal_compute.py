"""SFT, RFT, DPO and GRPO after equal compute: the share of right answers to word problems, and what is forgotten.

    DUDE_ASSETS=FOLDER python benchmarks/equal_compute.py --model MERGED --gguf-file "" --json ...

Compute is counted in passes: one token through the model once, forward or backward. Weights of the base are frozen, so
a backward pass costs what a forward does. A token of a conversation takes

    sft 2     forward, backward
    dpo 3     forward, backward, and forward through the base
    grpo 3    drawn, forward, backward
    rft 1, 2  drawn; of answers that are learned from, forward, backward; half of the passes are for drawing

What sft needs for --steps is what all get. All start from one model, which has to solve some of the problems: merge the
quickstart's adapter, and name that folder. SFT and DPO see the set's right answers, RFT and GRPO only their results.
The rate decides more than the objective, so every objective has every rate of --learning-rates.
Forgetting is the loss on tiny Shakespeare (DUDE_ASSETS/text/input.txt) and KL(start || tuned) there, nats a token.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import add_model, arguments, console, finish, means, set_threads, show
from mol import write_general
from objectives import COLUMNS, measured, table

import dude_peft
from dude_peft.data.word_problems import word_problems

PASSES = {"sft": 2, "rft": 2, "dpo": 3, "grpo": 3}
WORDS = "builtin:word-problems"
NEW_TOKENS = 48


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=1)
    add_model(parser, seeds=True)
    parser.add_argument("--steps", type=int, default=40, help="of sft")
    parser.add_argument("--rows", type=int, default=16, help="conversations of a step: answers, or twice the pairs")
    parser.add_argument("--generations", type=int, default=8, help="answers to one prompt, of grpo and rft")
    parser.add_argument("--test-rows", type=int, default=96)
    parser.add_argument("--learning-rates", default="3e-5,1e-4,3e-4", help="comma-separated")
    settings = parser.parse_args()
    set_threads(settings)
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="dude-equal-compute-") as scratch:
        write_general(Path(os.environ["DUDE_ASSETS"]) / "text" / "input.txt", Path(scratch))
        for seed in settings.seeds:
            for name, found in compared(settings, seed, Path(scratch)):
                runs.setdefault(name, []).append(found)
                console.print(f"seed {seed}, {name}: {found}")
            rows = told(runs)
            show(f"{len(next(iter(runs.values())))} seeds", rows, [*COLUMNS, "passes", "seconds"])
            finish("equal compute", settings, {"table": rows, "runs": runs})  # after every seed: each takes long


def compared(settings: argparse.Namespace, seed: int, folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Every objective at every rate, with its figures."""
    rows, generations = settings.rows, settings.generations
    equal = settings.steps * 2 // 3  # steps of 3 passes a token for those of 2
    grpo = {"num_generations": generations, "max_completion_length": NEW_TOKENS}
    drawn = settings.steps * rows  # answers: as many passes as learning from half of them
    kept = _kept(settings, drawn, seed, folder)
    for text in settings.learning_rates.split(","):
        a_token = 0.0  # passes: tokens of a conversation
        for objective, steps, train, data in (
            ("sft", settings.steps, {}, {"train": WORDS, "train_rows": settings.steps * rows}),
            ("rft", settings.steps // 2, {}, {"train": str(kept)}),
            (
                "dpo",
                equal,
                {"per_device_train_batch_size": rows // 2},
                {"train": "builtin:preferences", "train_rows": equal * rows // 2},
            ),
            ("grpo", equal, {"grpo": grpo}, {"train": WORDS, "train_rows": equal * rows // generations}),
        ):
            if objective == "rft" and not kept.stat().st_size:
                continue  # nothing was solved
            run = {"objective": "sft" if objective == "rft" else objective, "max_steps": steps, **train}
            data["test"] = "builtin:preferences" if objective == "dpo" else WORDS  # the same problems
            run["learning_rate"] = float(text)
            name = f"{objective}, {text}"
            found = measured(settings, name, run, data, seed, folder, measure="answers")
            if objective == "sft":
                a_token = found["tokens"] / (settings.steps * rows)
            found["passes"] = PASSES[objective] * found["tokens"] + (drawn * a_token if objective == "rft" else 0)
            yield name, found


def _kept(settings: argparse.Namespace, drawn: int, seed: int, folder: Path) -> Path:
    """The right ones of so many answers of the model, as rows."""
    asked, kept = folder / f"asked-{seed}.jsonl", folder / f"kept-{seed}.jsonl"
    problems = word_problems(drawn // settings.generations, seed=seed)
    lines = [json.dumps({"prompt": row.prompt[-1].content, "completion": row.answer}) + "\n" for row in problems]
    asked.write_text("".join(lines), encoding="utf-8")
    dude_peft.generate(
        settings.model,
        file=asked,
        gguf_file=settings.gguf_file or None,
        as_rows=True,
        keep="correct",
        samples=settings.generations,
        temperature=1.0,
        max_new_tokens=NEW_TOKENS,
        batch_size=settings.rows,
        seed=seed,
        output=kept,
    )
    return kept


def told(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """The table of `objectives`, with passes and seconds."""
    rows: dict[str, dict[str, Any]] = table(runs)
    for name, found in runs.items():
        cost = {"passes": [one["passes"] for one in found], "seconds": [one["training_seconds"] for one in found]}
        each = means(cost)
        rows[name] |= {key: each[key] for key in cost}
    return rows


if __name__ == "__main__":
    main()
