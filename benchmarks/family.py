"""Every method of the table on one small task, by `dude compare`: what is each worth at its own best learning rate?

    DUDE_ASSETS=FOLDER python benchmarks/family.py --folder runs/family --json benchmarks/results/DATE-family.json

A Llama of 260,032 parameters that writes tiny stories (DUDE_ASSETS/models/stories260k), or another --model of that
folder, learns tiny Shakespeare (DUDE_ASSETS/text/input.txt), passages of at most --max-length tokens. Interrupted, the
same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from measure import console, environment

import dude_peft
from dude_peft import METHODS
from dude_peft.comparison.statistics import summarise

HELD_OUT = 64


def main() -> None:
    """Compare, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="rows, runs and the comparison")
    parser.add_argument("--model", default="stories260k", help="a folder in DUDE_ASSETS/models")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3,1e-2,3e-2", help="the same for every method")
    parser.add_argument("--tuning-seeds", default="0")
    parser.add_argument("--final-seeds", default="1,2,3")
    parser.add_argument("--extend", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="write the record here (see benchmarks/results)")
    settings = parser.parse_args()
    settings.folder.mkdir(parents=True, exist_ok=True)
    hashes = write_rows(Path(os.environ["DUDE_ASSETS"]) / "text" / "input.txt", settings.folder)
    found = dude_peft.compare(grid(settings), jobs=settings.jobs, quiet=False)
    record = {
        "benchmark": "family",
        "environment": environment("cpu"),
        "settings": {key: value.name if isinstance(value, Path) else value for key, value in vars(settings).items()},
        "sha256": hashes,
        "results": table(found),
    }
    if settings.json is not None:
        settings.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        console.print(f"written: {settings.json}")


def grid(settings: argparse.Namespace) -> dict[str, Any]:
    """As it would stand in a file."""
    folder = settings.folder.resolve()
    return {
        "run": {
            "model": {"name_or_path": str(Path(os.environ["DUDE_ASSETS"]) / "models" / settings.model)},
            "adapter": {"r": settings.r, "lora_alpha": settings.r},
            "data": {
                "train": str(folder / "train.jsonl"),
                "test": str(folder / "test.jsonl"),
                "max_length": settings.max_length,
            },
            "train": {"max_steps": settings.steps, "save_steps": settings.steps, "logging_steps": 10},
        },
        "methods": settings.methods.split(","),
        "learning_rates": [float(rate) for rate in settings.rates.split(",")],
        "tuning_seeds": [int(seed) for seed in settings.tuning_seeds.split(",")],
        "final_seeds": [int(seed) for seed in settings.final_seeds.split(",")],
        "extend": settings.extend,
        "max_runs": 2000,
        "output_dir": str(folder / "comparison"),
    }


def write_rows(text: Path, folder: Path) -> dict[str, str]:
    """Passages of the text, the last ones held out."""
    passages = [part.strip() for part in text.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    passages = list(dict.fromkeys(part for part in passages if 80 <= len(part) <= 240))
    hashes = {}
    for name, part in (("train", passages[: -4 * HELD_OUT]), ("test", passages[-HELD_OUT:])):
        content = "".join(json.dumps({"text": passage}) + "\n" for passage in part).encode("ascii")
        path = folder / f"{name}.jsonl"
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    return hashes


def table(found: Any) -> dict[str, Any]:
    """A row a method, the best first, and every pair's sentence."""
    summary = summarise(found)
    return {
        "base": None if summary.methods[0].gain is None else summary.methods[0].mean + summary.methods[0].gain,
        "methods": {
            each.method: {
                "learning_rate": each.learning_rate,
                "loss": each.mean,
                "interval": each.interval,
                "by_seed": each.by_seed,
                "trials": each.trials,
                "failed_trials": each.failed_trials,
                "rates": {f"{rate.learning_rate:.3g}": rate.mean for rate in each.rates},
                "width_decades": each.width_decades,
                "trained_parameters": each.trained_parameters,
            }
            for each in summary.methods
        },
        "pairs": [pair.words for pair in summary.pairs],
        "answer": summary.answer,
    }


if __name__ == "__main__":
    main()
