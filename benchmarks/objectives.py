"""What an objective does to SmolLM2-135M on word problems: its own measure before and after, and what is forgotten.

    DUDE_ASSETS=FOLDER python benchmarks/objectives.py dpo --json benchmarks/results/DATE-dpo.json
    DUDE_ASSETS=FOLDER python benchmarks/objectives.py grpo --model MERGED --gguf-file "" --json ...

dpo: pairs of builtin:preferences; the measure is the share of held-out pairs whose better answer has the larger reward
(none before: all rewards are zero there).
grpo: builtin:word-problems, a right answer is the reward; the measure is the share of right held-out answers. Beside it
stands the same with easy problems first, by the model's pass rates. A model that solves none learns nothing: merge the
quickstart's adapter, and name that folder.
Forgetting is the loss on tiny Shakespeare (DUDE_ASSETS/text/input.txt) and KL(base || tuned) there, nats a token.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from measure import add_model, arguments, console, finish, means, set_threads, show
from mol import write_general

import dude_peft

COLUMNS = [f"{name}{part}" for name in ("measure", "general", "kl") for part in ("", "_half_width")]


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("what", choices=["dpo", "grpo"])
    add_model(parser, seeds=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="of a step: pairs or answers")
    parser.add_argument("--generations", type=int, default=8, help="answers to one prompt; a step has rows of them")
    parser.add_argument("--test-rows", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    settings = parser.parse_args()
    set_threads(settings)
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="dude-objectives-") as scratch:
        write_general(Path(os.environ["DUDE_ASSETS"]) / "text" / "input.txt", Path(scratch))
        for seed in settings.seeds:
            for name, train in cases(settings).items():
                source = "builtin:preferences" if settings.what == "dpo" else "builtin:word-problems"
                count = settings.steps * settings.rows if settings.what == "dpo" else 64
                data = {"train": source, "test": source, "train_rows": count}
                train["learning_rate"] = settings.learning_rate
                score = "pairs" if settings.what == "dpo" else "answers"
                found = measured(settings, name, train, data, seed, Path(scratch), measure=score)
                runs.setdefault(name, []).append(found)
                console.print(f"seed {seed}, {name}: {found}")
            rows = table(runs)
            show(f"{settings.what}, {len(next(iter(runs.values())))} seeds", rows, COLUMNS)
            finish(settings.what, settings, {"table": rows, "runs": runs})  # after every seed: each takes minutes


def cases(settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each run sets of its train section."""
    if settings.what == "dpo":
        return {"dpo": {"objective": "dpo"}}
    grpo = {"objective": "grpo", "grpo": {"num_generations": settings.generations, "max_completion_length": 48}}
    easy_first = {"by": "pass_rate", "samples": 4, "max_new_tokens": 48, "stages": 2}
    return {"grpo": grpo, "grpo, easy first": {**grpo, "curriculum": easy_first}}


def measured(
    settings: argparse.Namespace,
    name: str,
    train: dict[str, Any],
    data: dict[str, Any],
    seed: int,
    folder: Path,
    *,
    measure: Literal["pairs", "answers"],
) -> dict[str, float]:
    """One run's held-out figures, before and after; `measure` is the share of right pairs, or of right answers."""
    answers = measure == "answers"
    report = dude_peft.train(
        {
            "model": {"name_or_path": settings.model, "gguf_file": settings.gguf_file or None, "dtype": "float32"},
            "data": {
                "test_rows": settings.test_rows,
                "general_test": str(folder / "general_test.jsonl"),
                "max_length": 512,
                "seed": seed,
                **data,
            },
            "train": {
                "max_steps": settings.steps,
                "per_device_train_batch_size": settings.rows,
                "seed": seed,
                **train,
            },
            "evaluation": {"rows": settings.test_rows if answers else 1, "max_new_tokens": 48 if answers else 1},
            "output_dir": str(folder / f"{name}-{seed}"),
        }
    )
    before, after = report.before, report.after
    assert before is not None
    assert after is not None
    general: list[dict[str, float]] = report.data["general_test"]["measured"]
    found: dict[str, float] = {}
    for end, score, text in (("_before", before, general[0]), ("", after, general[-1])):
        right = {"right": score.right, "pairs": score.rows} if answers else score.preference
        found |= {f"loss{end}": score.loss, f"right{end}": right["right"], f"asked{end}": right["pairs"]}
        found[f"measure{end}"] = right["right"] / right["pairs"]
        found |= {f"general{end}": text["loss"], f"kl{end}": text["kl_base_tuned"]}
    return {**found, "training_seconds": report.seconds["training"], "tokens": report.tokens}


def table(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean and half width of the 95 % interval (Student's t) of each figure, over seeds."""
    first = next(iter(runs.values()))
    ends = {"before": (first, "_before"), **{key: (found, "") for key, found in runs.items()}}
    return {
        key: means({name: [one[name + end] for one in found] for name in ("measure", "general", "kl")})
        for key, (found, end) in ends.items()
    }


if __name__ == "__main__":
    main()
