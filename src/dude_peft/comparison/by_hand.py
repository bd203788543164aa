"""`dude compare` for those who start the runs themselves: what they would take, a command for each, one run alone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dude_peft.comparison.cells import Cell, Grid
from dude_peft.comparison.local import Local, default_threads, last_words, spawn
from dude_peft.comparison.run import opened
from dude_peft.config.grid import GridConfig
from dude_peft.config.reading import dump_config, with_values
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ResourceError
from dude_peft.folder.record import REPORT, RunReport
from dude_peft.planning.report import Plan, duration, size
from dude_peft.planning.run import plan
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.facts import show_facts
from dude_peft.terminal.next_steps import word

_TIMED_STEPS = 3


def dry_run(
    config: GridConfig, run: RunConfig, *, jobs: int = 1, controls: bool = False, max_runs: int | None = None
) -> None:
    """Shows what the comparison takes; the folder is not made, and one run of three steps is timed elsewhere.

    Raises:
        ConfigError, DataError: what a run would refuse.
        ResourceError: the timed run failed.
    """
    grid = Grid(config, run, controls=controls)
    grid.check(max_runs)
    display = Display()
    plans = {}
    with display.waiting("planning each method"):
        for each in grid.contestants:
            cell = next(grid.tuning(each, grid.points(each.rates)))
            plans[each.name] = plan(cell.placed(Path(config.output_dir)), quiet=True)
    first = next(grid.tuning(grid.contestants[0], grid.points(grid.contestants[0].rates)))
    display.say(f"{_TIMED_STEPS} steps of {shown(first.method)} are trained now, to time one; nothing of them is kept")
    with display.waiting(f"timing {_TIMED_STEPS} steps of {shown(first.method)}"):
        timed = _timed(first, default_threads(jobs))
    show_facts(
        display, "the comparison", _facts(grid, plans, timed, jobs, config.max_runs if max_runs is None else max_runs)
    )
    for each in grid.contestants:
        static, rates = plans[each.name].cost.static, ", ".join(f"{rate:g}" for rate in each.rates)
        display.say(
            f"{shown(each.name)}: {static.trainable_parameters:,} trained parameters; needs "
            f"{size(plans[each.name].cost.bill.total)} of memory; rates {rates}"
        )
    for text in dict.fromkeys(text for each in plans.values() for text in each.warnings if "suits" not in text):
        display.warn(text)


def commands(
    config: GridConfig,
    run: RunConfig,
    source: str,
    *,
    output_dir: str | None = None,
    jobs: int = 1,
    controls: bool = False,
    max_runs: int | None = None,
) -> list[str]:
    """A command for each run that can start now: of stage 1, or of stage 2 once that is over."""
    options = [] if output_dir is None else ["--output-dir", output_dir]
    options += ["--controls"] if controls else []
    options += [] if max_runs is None else ["--max-runs", str(max_runs)]
    display = Display(stderr=True)
    with opened(config, run, display, Local(jobs), controls=controls, max_runs=max_runs) as work:
        cells = work.startable()
        for cell in cells:
            work.folder.place(cell)
    if not cells:
        display.say("nothing is left to run; --collect writes the result")
    return [" ".join(map(word, ["dude", "compare", source, *options, "--run", cell.name])) for cell in cells]


def run_one(
    config: GridConfig, run: RunConfig, name: str, *, controls: bool = False, max_runs: int | None = None
) -> None:
    """Does one run that `commands` names, and notes its failure if it fails.

    Raises:
        ConfigError: there is no such run, or its turn has not come.
    """
    with opened(config, run, Display(), Local(1), controls=controls, max_runs=max_runs, alone=False) as work:
        work.run_one(name)


def _timed(cell: Cell, threads: int) -> RunReport:
    """The report of a run of a few steps, somewhere else, without any evaluation."""
    with tempfile.TemporaryDirectory(prefix="dude-timed-") as folder:
        values = {
            "train.max_steps": _TIMED_STEPS,
            "train.curriculum": None,  # its stages may be more than these steps
            "evaluation.enabled": False,
            "evaluation.eval_steps": None,
            "output_dir": str(Path(folder, "run")),
        }
        path, log = Path(folder, "run.yaml"), Path(folder, "run.log")
        path.write_text(dump_config(with_values(cell.config, values, "--dry-run")), encoding="utf-8")
        process = spawn(["train", str(path), "--no-page"], log, {**os.environ, "OMP_NUM_THREADS": str(threads)})
        if process.wait():
            raise ResourceError(f"--dry-run: the timed run failed: {last_words(log)}; run it with dude train first")
        return RunReport.read(Path(folder, "run", REPORT))


def _facts(grid: Grid, plans: dict[str, Plan], timed: RunReport, jobs: int, most: int) -> list[tuple[str, str]]:
    finals = len(grid.contestants) * len(grid.config.final_seeds)
    longest = min(most, grid.runs + grid.config.extend * grid.round)
    facts = [
        ("runs", f"{grid.runs}: {grid.runs - finals} to tune, {finals} to test"),
        ("with all rates that may be added", f"at most {longest}"),
    ]
    first = plans[grid.contestants[0].name]
    if first.steps is not None:
        step = timed.seconds["training"] / timed.steps
        start = timed.seconds["total"] - timed.seconds["training"]
        each = start + step * first.steps
        facts.append(("a run", f"{duration(each)}: {first.steps:,} steps of {step:.3f} s, {start:.1f} s around them"))
        facts.append(("all runs", f"{duration(each * grid.runs / jobs)}, {jobs} at a time; evaluation is not counted"))
    kept = grid.run.train.save_total_limit
    disk = sum((each.disk.adapter + kept * each.disk.checkpoint) for each in plans.values()) / len(plans) * grid.runs
    facts.append(("disk", f"{size(disk)}, free {size(first.disk.free)}"))
    return facts
