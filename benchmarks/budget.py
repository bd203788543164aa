"""Which layers should get the ranks: held-out loss at equal trained parameters by each rule of adapter.budget.

    python benchmarks/budget.py --json benchmarks/results/DATE-budget.json

uniform spends a share of the model's parameters first; every other rule then gets the number that uniform spent. Rows
(builtin:word-problems, or passages of a text), steps, learning rate, scaling and seeds are the same for all. A record
that is there already is gone on with: its seeds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measure import add_model, arguments, console, finish, means, set_threads, show

from dude_peft.config.reading import load_config
from dude_peft.training.run import run

COLUMNS = ["parameters", "layers", "loss", "loss_half_width", "to_uniform", "to_uniform_half_width"]


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=1)
    add_model(parser, seeds=True)
    parser.add_argument("--text", type=Path, default=None, help="learn this text instead; its end is held out")
    parser.add_argument("--parameters", default="0.9%", help="what uniform may spend")
    parser.add_argument("--rules", default="uniform,spectrum,gradient", help="beside uniform: spectrum,gradient,fisher")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-length", type=int, default=128)
    settings = parser.parse_args()
    set_threads(settings)
    runs: dict[str, dict[str, Any]] = {}
    if settings.json is not None and settings.json.is_file():
        runs = json.loads(settings.json.read_text(encoding="utf-8"))["results"]["runs"]
    for seed in settings.seeds:
        if str(seed) in runs:
            continue
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="dude-budget-") as scratch:
            parameters: str | int = settings.parameters
            for rule in settings.rules.split(","):
                found[rule] = measured(settings, rule, parameters, seed, Path(scratch))
                parameters = found["uniform"]["parameters"]
                console.print(f"seed {seed}, {rule}: {found[rule]}")
        runs[str(seed)] = found
        told(settings, runs)


def measured(settings: argparse.Namespace, rule: str, parameters: str | int, seed: int, folder: Path) -> dict[str, Any]:
    """One run's figures."""
    output = folder / rule
    train = test = "builtin:word-problems"
    if settings.text is not None:
        train, test = write_passages(settings.text, folder, settings.steps * settings.rows)
    config = {
        "model": {"name_or_path": settings.model, "gguf_file": settings.gguf_file or None, "dtype": "float32"},
        "adapter": {"method": "dude", "budget": {"parameters": parameters, "by": rule}},
        "data": {
            "train": train,
            "test": test,
            "train_rows": settings.steps * settings.rows,
            "test_rows": 24,
            "max_length": settings.max_length,
            "seed": seed,
        },
        "train": {
            "learning_rate": settings.learning_rate,
            "max_steps": settings.steps,
            "per_device_train_batch_size": settings.rows,
            "seed": seed,
        },
        "evaluation": {"rows": 1, "max_new_tokens": 1, "samples": 0},
        "output_dir": str(output),
    }
    report = run(load_config(config), quiet=True)
    assert report.before is not None
    assert report.after is not None
    adapter = report.config["adapter"]
    ranks = [*adapter["rank_pattern"].values()]
    ranks += [adapter["r"]] * (len(adapter["target_modules"]) - len(ranks))
    return {
        "parameters": report.trainable_parameters,
        "before": report.before.loss,
        "loss": report.after.loss,
        "layers": len(adapter["target_modules"]),
        "ranks": [min(ranks), max(ranks)],
        "budget_seconds": report.seconds["budget"],
        "training_seconds": report.seconds["training"],
    }


def write_passages(text: Path, folder: Path, count: int) -> tuple[str, str]:
    """Rows of three passages each: the first ones of the text to learn from, the last ones held out."""
    passages = [part for part in text.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    joined = ["\n\n".join(passages[start : start + 3]) for start in range(0, len(passages), 3)]
    names = []
    for name, part in (("train", joined[:count]), ("test", joined[-24:])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in part), encoding="utf-8")
        names.append(str(path))
    return names[0], names[1]


def told(settings: argparse.Namespace, runs: dict[str, dict[str, Any]]) -> None:
    """Prints the table so far, and writes the record."""
    rows = {rule: _row([found[rule] for found in runs.values()], runs) for rule in settings.rules.split(",")}
    notes = [
        f"half widths are of 95 % intervals of the mean over {len(runs)} seeds (Student's t); to_uniform is of the "
        "pairs of one seed"
    ]
    if settings.gguf_file:
        notes.append(f"the weights come from the GGUF file {settings.gguf_file}, dequantised to float32")
    show("Held-out loss, nats a token", rows, COLUMNS)
    finish("budget", settings, {"table": rows, "runs": runs}, notes)


def _row(mine: list[dict[str, Any]], runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    losses = [one["loss"] for one in mine]
    pairs = [one["loss"] - found["uniform"]["loss"] for one, found in zip(mine, runs.values(), strict=True)]
    return {
        "before": statistics.mean(one["before"] for one in mine),
        "parameters": round(statistics.mean(one["parameters"] for one in mine)),
        "layers": "-".join(map(str, sorted({one["layers"] for one in mine}))),
        "budget_seconds": statistics.mean(one["budget_seconds"] for one in mine),
        **means({"loss": losses, "to_uniform": pairs}),
    }


if __name__ == "__main__":
    main()
