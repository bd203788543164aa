"""A quantised base from one YAML, end to end: trained, killed, resumed, scored, asked, merged and exported.

    python benchmarks/qlora.py --json benchmarks/results/DATE-qlora.json

SmolLM2-135M learns builtin:word-problems with the same steps, rows and rate on each base: as it is, nf4 and int8. The
losses are of the same held-out rows, nats a token. On each quantised base the first seed's run is made once more: it is
killed (SIGKILL) behind a checkpoint, and the same command goes on. Its adapter has to be the same bits. All that a user
does with an adapter is then done with it by the commands; a command that fails ends the benchmark.
DUDE_ASSETS/gsm8k, where it is there, gives `dude eval` its questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import add_model, arguments, console, finish, means, set_threads, show

from dude_peft.config.schema import ModelSection
from dude_peft.model.load import load_model, load_tokenizer, locate

AS_IT_IS = "as it is"
COLUMNS = ["before", "before_half_width", "loss", "loss_half_width", "over", "over_half_width"]
QUESTIONS = ["What is 12 plus 30?", "Name a colour."]


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=1)
    add_model(parser, seeds=True)
    parser.add_argument("--quantizations", default="nf4,int8", help="comma-separated, as model.quantization")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    settings = parser.parse_args()
    set_threads(settings)
    runs: dict[str, list[dict[str, float]]] = {}
    commands: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dude-qlora-") as scratch:
        folder = Path(scratch)
        save_plain(settings, folder / "base")
        for seed in settings.seeds:
            for quantization in (AS_IT_IS, *settings.quantizations.split(",")):
                out = folder / f"{quantization}-{seed}"
                path = write_yaml(settings, folder, quantization, seed)
                dude("train", str(path), "--output-dir", str(out))
                runs.setdefault(quantization, []).append(losses(out))
                console.print(f"seed {seed}, {quantization}: {runs[quantization][-1]}")
                if quantization != AS_IT_IS and seed == settings.seeds[0]:
                    again = killed_and_resumed(path, folder / f"{quantization}-again", settings.steps)
                    same = weights_sha256(again) == weights_sha256(out)
                    commands[quantization] = {"same_bits_after_kill": same, **used(out / "adapter", folder)}
                    console.print(f"{quantization}: {commands[quantization]}")
            rows = table(runs)
            show(f"Held-out loss, {len(runs[AS_IT_IS])} seeds", rows, COLUMNS)
            finish("qlora", settings, {"table": rows, "runs": runs, "commands": commands}, notes(settings))


def save_plain(settings: argparse.Namespace, folder: Path) -> None:
    """The model as a checkpoint of its own: a GGUF file cannot be quantised again."""
    model = ModelSection(name_or_path=settings.model, gguf_file=settings.gguf_file or None, dtype="float32")
    where = locate(model)
    load_model(model, where).save_pretrained(folder)
    load_tokenizer(model, where).save_pretrained(folder)


def write_yaml(settings: argparse.Namespace, folder: Path, quantization: str, seed: int) -> Path:
    """The one file of a run; JSON is YAML."""
    key = {} if quantization == AS_IT_IS else {"quantization": quantization}
    config = {
        "model": {"name_or_path": str(folder / "base"), "dtype": "float32", **key},
        "data": {
            "train": "builtin:word-problems",
            "test": "builtin:word-problems",
            "train_rows": settings.steps * settings.rows,
            "test_rows": settings.test_rows,
            "max_length": 128,
            "seed": seed,
        },
        "train": {
            "learning_rate": settings.learning_rate,
            "max_steps": settings.steps,
            "per_device_train_batch_size": settings.rows,
            "save_steps": settings.steps // 2,
            "seed": seed,
        },
        "evaluation": {"rows": 1, "max_new_tokens": 1},
        "output_dir": "given by the command",
    }
    path = folder / f"{quantization}-{seed}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def killed_and_resumed(config: Path, out: Path, steps: int) -> Path:
    """The same run, killed as soon as it has a checkpoint, and gone on with."""
    command = [*_DUDE, "train", str(config), "--output-dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any((out / "checkpoints").glob("step-*")):
        if process.poll() is not None:
            raise RuntimeError(f"{out.name} ended with {process.returncode} before its first checkpoint")
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (out / "adapter").exists():
        raise RuntimeError(f"{out.name} had finished its {steps} steps when it was to be killed")
    dude("train", str(config), "--output-dir", str(out))
    return out


def used(adapter: Path, folder: Path) -> dict[str, str]:
    """What each command says last of the adapter; all have to succeed."""
    name = adapter.parent.name
    asked = folder / "questions.txt"
    asked.write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    where = str(adapter)
    found = {
        "verify": dude("verify", where, keep="files:"),
        "chat": dude("chat", where, stdin=QUESTIONS[0] + "\n"),
        "generate": dude("generate", where, "--file", str(asked), "--max-new-tokens", "12"),
        "merge": dude("merge", where, "-o", str(folder / f"{name}-merged"), keep="KL("),
        "export, lora:16": dude("export", where, "--to", "lora:16", "-o", str(folder / f"{name}-lora"), keep="KL("),
        "export, peft": dude("export", where, "--to", "peft", "-o", str(folder / f"{name}-peft"), keep="KL("),
    }
    questions = Path(os.environ.get("DUDE_ASSETS", "")) / "gsm8k"
    if questions.is_dir():
        options = ["--tasks", "gsm8k", "--data-dir", str(questions.parent), "--limit", "2"]
        found["eval"] = dude("eval", where, *options, "-o", str(folder / f"{name}-scores"))
    return {key: said.replace(str(folder), "FOLDER") for key, said in found.items()}


_DUDE = [sys.executable, "-m", "dude_peft"]


def dude(*words: str, stdin: str = "", keep: str = "") -> str:
    """Runs a command, and answers with its last line, or the last one that has `keep`."""
    done = subprocess.run([*_DUDE, *words], input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"dude {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip() and keep in line]
    return lines[-1]


def losses(out: Path) -> dict[str, float]:
    """Of the held-out rows, by the run's report."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {"before": report["before"]["loss"], "loss": report["after"]["loss"], "tokens": report["tokens"]}


def weights_sha256(out: Path) -> str:
    """Hash of the adapter's tensors."""
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def table(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each base means over seeds, and `over`: its loss less that of the base as it is, by pairs of one seed."""
    plain = runs[AS_IT_IS]
    return {
        name: means(
            {
                "before": [one["before"] for one in found],
                "loss": [one["loss"] for one in found],
                "over": [one["loss"] - other["loss"] for one, other in zip(found, plain, strict=True)],
            }
        )
        for name, found in runs.items()
    }


def notes(settings: argparse.Namespace) -> list[str]:
    """What the record does not say by itself."""
    halves = "half widths are of 95 % intervals of the mean over seeds (Student's t); over is of pairs of one seed"
    if not settings.gguf_file:
        return [halves]
    return [f"the weights come from the GGUF file {settings.gguf_file}, dequantised to float32", halves]


if __name__ == "__main__":
    main()
