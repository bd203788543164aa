"""What the mixture of losses keeps: domain and general loss after training with and without it, on SmolLM2-135M.

    DUDE_ASSETS=FOLDER python benchmarks/mol.py --json benchmarks/results/DATE-mol.json

Domain: builtin:word-problems. General: tiny Shakespeare (DUDE_ASSETS/text/input.txt), one part to stay near the base
model on, another, from the other end of the file, held out; blocks of at most --max-length tokens. Both objectives take
the same steps, rows a step, learning rate and seeds; of mol's rows half are general, so it sees half as many of the
domain's. Losses and KL(base || tuned) are nats a token on held-out rows.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from measure import add_model, arguments, console, finish, means, set_threads, show

from dude_peft.config.schema import RunConfig
from dude_peft.training.run import run

COLUMNS = ["domain", "domain_half_width", "general", "general_half_width", "kl", "kl_half_width"]


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=1)
    add_model(parser, seeds=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-length", type=int, default=112)
    settings = parser.parse_args()
    set_threads(settings)
    runs: dict[str, list[dict[str, float]]] = {"sft": [], "mol": []}
    with tempfile.TemporaryDirectory(prefix="dude-mol-") as scratch:
        write_general(Path(os.environ["DUDE_ASSETS"]) / "text" / "input.txt", Path(scratch))
        for seed in settings.seeds:
            for objective, found in runs.items():
                found.append(measured(settings, objective, seed, Path(scratch)))
                console.print(f"seed {seed}, {objective}: {found[-1]}")
            told(settings, runs)  # after every seed: six runs take an hour on two shared cores


def told(settings: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    """Prints the table so far, and writes the record."""
    rows = table(runs)
    notes = [
        "the weights are a 4-bit GGUF file's (Q4_1), dequantised to float32; half widths are of 95 % intervals of the "
        f"mean over {len(runs['sft'])} seeds (Student's t); mol - sft is of the pairs of one seed."
    ]
    show("Held-out loss and KL, nats a token", rows, COLUMNS)
    console.print(notes[0])
    finish("mol", settings, {"table": rows, "runs": runs}, notes)


def write_general(text: Path, folder: Path) -> None:
    """Passages of the text, the first ones to train on, the last ones held out."""
    passages = [part for part in text.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    joined = ["\n\n".join(passages[start : start + 3]) for start in range(0, len(passages), 3)]
    for name, part in (("general", joined[:200]), ("general_test", joined[-12:])):
        lines = [json.dumps({"text": passage}) + "\n" for passage in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def measured(settings: argparse.Namespace, objective: str, seed: int, folder: Path) -> dict[str, float]:
    """One run's held-out figures."""
    mol = objective == "mol"
    report = run(
        RunConfig.model_validate(
            {
                "model": {"name_or_path": settings.model, "gguf_file": settings.gguf_file, "dtype": "float32"},
                "data": {
                    "train": "builtin:word-problems",
                    "test": "builtin:word-problems",
                    "train_rows": settings.steps * settings.rows,
                    "test_rows": 16,
                    "general": str(folder / "general.jsonl") if mol else None,
                    "general_test": str(folder / "general_test.jsonl"),
                    "max_length": settings.max_length,
                    "seed": seed,
                },
                "train": {
                    "objective": objective,
                    "learning_rate": settings.learning_rate,
                    "max_steps": settings.steps,
                    "per_device_train_batch_size": settings.rows,
                    "seed": seed,
                },
                "evaluation": {"rows": 1, "max_new_tokens": 1, "samples": 0},
                "output_dir": str(folder / f"{objective}-{seed}"),
            }
        ),
        quiet=True,
    )
    assert report.before is not None
    assert report.after is not None
    general: list[dict[str, float]] = report.data["general_test"]["measured"]
    return {
        "domain_before": report.before.loss,
        "domain": report.after.loss,
        "general_before": general[0]["loss"],
        "general": general[-1]["loss"],
        "kl_before": general[0]["kl_base_tuned"],
        "kl": general[-1]["kl_base_tuned"],
        "training_seconds": report.seconds["training"],
        "tokens": report.tokens,
    }


def table(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Mean and half width of the 95 % interval of each figure, of each objective and of their difference."""
    names = ("domain", "general", "kl")
    sets = {"before": [[one[f"{name}_before"] for one in runs["sft"]] for name in names]}
    sets |= {key: [[one[name] for one in found] for name in names] for key, found in runs.items()}
    pairs = zip(sets["mol"], sets["sft"], strict=True)
    sets["mol - sft"] = [[a - b for a, b in zip(mol, sft, strict=True)] for mol, sft in pairs]
    return {key: means(dict(zip(names, values, strict=True))) for key, values in sets.items()}


if __name__ == "__main__":
    main()
