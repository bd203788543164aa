"""Host memory of all processes of `dude train` together, from the first import to the first steps, against one process.

    python benchmarks/host_memory.py --json benchmarks/results/DATE-host-memory.json
    python benchmarks/host_memory.py --before ../before/src      # another source tree beside this one

The measure is PSS (/proc/PID/smaps_rollup, so Linux): a page that k processes share counts 1/k in each. A run of a
model with one block, in as many processes, is what the programs take themselves; `models` is the peak above it over the
bytes of the weights. Of the peak, `file` are pages of files, which the system takes back when memory is short.
`load` is the same until the adapted model is there, cut and handed out: before the first step. With `--quantization`
the weights are those of the checkpoint, which is not quantised.
`planned_models` is what `dude plan` tells of all processes, without what it assumes for the programs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import arguments, console, finish, numbers, show
from subjects import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_EVERY_SECONDS = 0.1
_ROWS = 8
_LOADED = "parameters train"
"""Of the line that a run writes between loading and training."""
_SOURCE = Path(__file__).parents[1] / "src"


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--before", type=Path, help="source tree of another version")
    parser.add_argument("--processes", type=numbers, default=[2, 4], help="comma-separated")
    parser.add_argument("--strategies", default="fsdp2", help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--quantization", default="none", help="of the base: none, nf4, fp4, int8")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--steps", type=int, default=2)
    settings = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dude-host-memory-"))
    try:
        results, notes = measured(settings, folder)
    finally:
        shutil.rmtree(folder)
    columns = [
        "peak_mb",
        "own_mb",
        "models",
        "models_low",
        "models_high",
        "load_mb",
        "load_models",
        "planned_models",
        "file_mb",
        "ratio",
        "seconds",
        "same_losses",
    ]
    show("Host memory of all processes together", results, columns)
    for note in notes:
        console.print(note)
    finish("host-memory", settings, results, notes)


def measured(settings: argparse.Namespace, folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Peaks of every case in every round, in an order that turns."""
    weights = _save_model(folder / "large", settings, settings.layers)
    _save_model(folder / "small", settings, 1)
    _write_rows(folder / "rows.jsonl")
    cases = {"one process": ("ddp", 1, _SOURCE)}
    for strategy in settings.strategies.split(","):
        for count in settings.processes:
            if settings.before is not None:
                cases[f"{strategy}, {count} processes, before"] = (strategy, count, settings.before.resolve())
            cases[f"{strategy}, {count} processes"] = (strategy, count, _SOURCE)
    alike = {case[:2] for case in cases.values()}
    own = {case: _run(folder, "small", *case, _SOURCE, settings) for case in sorted(alike)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(settings.rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            runs[name].append(_run(folder, "large", *cases[name], settings))
            console.print(f"round {turn + 1}, {name}: {runs[name][-1]['peak'] / 1e6:,.0f} MB")
    first = runs["one process"]
    results = {}
    for name, found in runs.items():
        alone, loading = (own[cases[name][:2]][phase] for phase in ("peak", "load"))
        planned = _planned(folder, *cases[name], settings)
        over = sorted((run["peak"] - alone) / weights for run in found)
        results[name] = {
            "peak_mb": statistics.median(run["peak"] for run in found) / 1e6,
            "own_mb": alone / 1e6,
            "models": statistics.median(over),
            "models_low": over[0],
            "models_high": over[-1],
            "load_mb": statistics.median(run["load"] for run in found) / 1e6,
            "load_models": statistics.median((run["load"] - loading) / weights for run in found),
            "planned_mb": planned["memory"] / 1e6,
            "planned_models": (planned["memory"] - planned["runtime"]) / weights,
            "file_mb": statistics.median(run["file"] for run in found) / 1e6,
            "ratio": statistics.median(run["peak"] / one["peak"] for run, one in zip(found, first, strict=True)),
            "seconds": statistics.median(run["seconds"] for run in found),
            "losses": found[0]["losses"],
            "same_losses": all(_close(run["losses"], first[0]["losses"], settings.dtype) for run in found),
        }
    quantised = "" if settings.quantization == "none" else f", quantised to {settings.quantization}"
    note = (
        f"weights: {weights / 1e6:,.0f} MB in {settings.layers} blocks of {settings.dtype}{quantised}; one reading of "
        f"{_ROWS} rows"
    )
    return results, [note]


def _run(
    folder: Path, model: str, strategy: str, count: int, source: Path, settings: argparse.Namespace
) -> dict[str, Any]:
    """One `dude train`, watched until it ends."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [*_command(folder, "train", model, strategy, count, out, settings), "--no-page"]
    environment = _environment(source)
    start = time.perf_counter()
    log = out.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        peak, load, loading = {"Pss": 0, "Pss_File": 0}, 0, True
        while process.poll() is None:
            now = _memory(process.pid)
            peak = max(peak, now, key=lambda found: found["Pss"])
            loading = loading and _LOADED not in log.read_text(encoding="utf-8")
            load = max(load, now["Pss"]) if loading else load
            time.sleep(_EVERY_SECONDS)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {log.read_text(encoding='utf-8')[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return {"peak": peak["Pss"], "load": load, "file": peak["Pss_File"], "losses": losses, "seconds": seconds}


def _planned(folder: Path, strategy: str, count: int, source: Path, settings: argparse.Namespace) -> dict[str, int]:
    """What `dude plan` tells of the same run: bytes of all processes, and of those the assumed ones of the programs."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [*_command(folder, "plan", "large", strategy, count, out, settings), "--json"]
    done = subprocess.run(command, env=_environment(source), capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    return {"memory": found["processes"]["memory"], "runtime": count * found["memory"]["runtime"]}


def _command(
    folder: Path, verb: str, model: str, strategy: str, count: int, out: Path, settings: argparse.Namespace
) -> list[str]:
    """`dude VERB` of a run, whose configuration is written."""
    config = {
        "model": {"name_or_path": str(folder / model), "quantization": settings.quantization},
        "adapter": {"r": 4, "lora_alpha": 4, "svd_tol": 0.5},  # random weights have no directions to find
        "data": {"train": str(folder / "rows.jsonl")},
        "train": {
            "learning_rate": 1e-3, "max_steps": settings.steps, "per_device_train_batch_size": 4 // count,
            "logging_steps": 1,
        },
        "evaluation": {"enabled": False},
        "output_dir": str(out),
    }  # fmt: skip
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(config), encoding="utf-8")
    several = [] if count == 1 else ["--launch", strategy, "--processes", str(count)]
    return [sys.executable, "-m", "dude_peft.cli", verb, str(path), *several]


def _environment(source: Path) -> dict[str, str]:
    """Lines are written at once: they tell what the run is at."""
    return {
        **os.environ, "PYTHONPATH": str(source), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"
    }  # fmt: skip


def _memory(pid: int) -> dict[str, int]:
    """Bytes of a process and all below it, by the names of smaps_rollup; a process that ends meanwhile has none."""
    total = {"Pss": 0, "Pss_File": 0}
    for each in _below(pid):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        found = {line.partition(":")[0]: line.split()[1] for line in lines[1:]}
        for name in total:
            total[name] += 1024 * int(found.get(name, 0))
    return total


def _below(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in _below(int(child)))]


def _close(some: list[float], others: list[float], dtype: str) -> bool:
    tolerance = 1e-5 if dtype == "float32" else 2e-3
    return len(some) == len(others) and all(abs(a - b) <= tolerance * abs(b) for a, b in zip(some, others, strict=True))


def _save_model(folder: Path, settings: argparse.Namespace, layers: int) -> int:
    """A Llama with random weights and its tokenizer; the bytes of its weights."""
    intermediate = 8 * settings.hidden // 3 // 64 * 64
    model = llama(getattr(torch, settings.dtype), settings.hidden, layers, intermediate, vocabulary=512)
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def _write_rows(path: Path) -> None:
    rows = [{"prompt": f"say {number}", "completion": "yes"} for number in range(_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
