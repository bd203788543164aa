"""From the runs of both stages to one `Comparison`: what was found, what was done, what was not tested."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dude_peft.comparison.cells import Cell, Grid
from dude_peft.comparison.folder import CompareFolder, right_of
from dude_peft.comparison.outcome import Base, Comparison, Final, Trial
from dude_peft.comparison.rows import Rows
from dude_peft.comparison.tuning import Choice, Pruned, Stage
from dude_peft.doors import named_folder
from dude_peft.show import shown

NO_RATE = "no setting of this method had trials that all ended well, so none was tested"


def gather(grid: Grid, folder: CompareFolder, rows: Rows, stage: Stage, finals: Sequence[Cell]) -> Comparison:
    """The comparison as far as its runs have ended."""
    trials = [trial for cell in stage.cells if (trial := folder.trial(cell, rows)) is not None]
    tested = [final for cell in finals if (final := folder.final(cell, rows)) is not None]
    lost = [name for name, choice in stage.choices.items() if choice is None]
    tested += [_without_rate(name, seed) for name in lost for seed in grid.config.final_seeds]
    first, first_test = (
        next((report for cell in cells if (report := folder.report(cell, rows)) is not None), None)
        for cells in ((*stage.cells, *finals), finals)
    )
    base = None if first_test is None else first_test.before
    wanted = len(stage.cells) + len(stage.short) + len(grid.contestants) * len(grid.config.final_seeds)
    short = [cell for cell in stage.short if folder.trial(cell, rows) is not None]
    missing = wanted - len(trials) - len(short) - len(tested)
    hashes = rows.hashes["test"] | {"validation": rows.hashes["tune"]["test"], "tuning": rows.hashes["tune"]["train"]}
    return Comparison(
        name=Path(named_folder(folder.path)).name,
        methods=tuple(each.name for each in grid.contestants),
        primary=grid.config.primary,
        items=rows.items,
        questions=rows.questions,
        trials=tuple(trials),
        finals=tuple(tested),
        base=None if base is None else Base(base.losses, right_of(base)),
        protocol=_protocol(grid, rows, stage, missing),
        not_tested=tuple(not_tested(grid)),
        environment={} if first is None else {"versions": first.versions, "hardware": first.hardware},
        data_hashes=hashes,
        warnings=(*_warnings(grid, stage, trials, tested, missing), *rows.warnings),
    )


def final_cells(grid: Grid, stage: Stage) -> list[Cell]:
    """The cells of stage 2, seed by seed and method by method, so that their costs are measured side by side."""
    chosen = [(each, stage.choices.get(each.name)) for each in grid.contestants]
    return [
        grid.final(each, choice.rate, choice.settings, seed)
        for seed in grid.config.final_seeds
        for each, choice in chosen
        if choice is not None
    ]


def _without_rate(name: str, seed: int) -> Final:
    return Final(name, {}, None, seed, (), (), None, NO_RATE)


def _protocol(grid: Grid, rows: Rows, stage: Stage, missing: int) -> dict[str, Any]:
    config, train = grid.config, grid.run.train
    return {
        "stage_1": "every setting is trained without the validation and test rows, and judged by its validation loss",
        "stage_2": "the best setting of each method is trained with fresh seeds, on all training rows, the validation "
        "rows among them if they were taken from these; the test rows judge it once, at its end, and the base model "
        "beside it",
        "rows": rows.counts,
        "trials_per_method": len(stage.cells) // len(grid.contestants),
        "tuning_seeds": list(config.tuning_seeds),
        "final_seeds": list(config.final_seeds),
        "learning_rates": {name: list(rates) for name, rates in stage.rates.items()},
        "added_rates": {name: list(rates) for name, rates in stage.added.items() if rates},
        "axes": config.axes,
        "pruned": [_stopped(each) for each in stage.pruned],
        "chosen": {name: _chosen(choice) for name, choice in stage.choices.items()},
        "steps": train.max_steps,
        "epochs": train.num_train_epochs if train.max_steps is None else None,
        "complete": missing == 0,
        "missing_runs": missing,
    }


def _chosen(choice: Choice | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    return {"learning_rate": choice.rate, "settings": choice.settings, "validation_loss": choice.loss}


def _stopped(pruned: Pruned) -> dict[str, Any]:
    loss = pruned.loss if math.isfinite(pruned.loss) else None
    return {**asdict(pruned), "loss": loss}


def _warnings(grid: Grid, stage: Stage, trials: Sequence[Trial], finals: Sequence[Final], missing: int) -> list[str]:
    found = first_warnings(grid)
    if missing:
        found.append(f"{missing} runs have not ended yet, so this is a part of the comparison")
    for name, choice in stage.choices.items():
        if choice is not None and choice.edge:
            found.append(
                f"{name}: the best rate, {choice.rate:g}, is the {choice.edge} that was tried; a better one may lie "
                "beyond"
            )
    for name in (each.name for each in grid.contestants):
        tuned = [trial for trial in trials if trial.method == name]
        tested = [final for final in finals if final.method == name and final.started]
        untested = ", so it was not tested" if name in stage.choices and stage.choices[name] is None else ""
        for runs, what in ((tuned, f"trials failed{untested}"), (tested, "test runs failed")):
            if failed := [run.failed for run in runs if run.failed is not None]:
                found.append(f"{name}: {len(failed)} of {len(runs)} {what}; the first: {failed[0]}")
    return found


def first_warnings(grid: Grid) -> list[str]:
    """What is known before any run."""
    if len(grid.config.final_seeds) > 1:
        return []
    return ["there is one final seed: no interval over seeds is possible, and a difference may be luck"]


def not_tested(grid: Grid) -> list[str]:
    """What nobody should conclude from the comparison."""
    run, config = grid.run, grid.config
    length = f"{run.train.max_steps} steps" if run.train.max_steps else f"{run.train.num_train_epochs or 1:g} epochs"
    batch = run.train.per_device_train_batch_size * run.train.gradient_accumulation_steps
    ranks = config.ranks or sorted({each.config.adapter.r for each in grid.contestants})
    found = [
        f"Other models: only {shown(run.model.name_or_path, 200)} was trained.",
        "Other data: the rows are those of the run, and nothing else.",
        f"Longer or shorter training: every run had {length}, {batch} rows a step for each device.",
        f"Other ranks than {', '.join(map(str, ranks))}.",
    ]
    tuned = ", ".join(["train.learning_rate", *config.axes])
    found.append(f"Other settings: only {tuned} was tuned; the rest is the run's own or that of the method's entry.")
    return found
