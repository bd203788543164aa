"""Stage 1: which rates are tried, and which setting wins. Every method gets the same number of trials.

A best rate that is the lowest or the highest tried says nothing about the rates beyond it. Then the method gets one
rate more on that side, and every other method one more too: half-way between its best rate and the better neighbour.
This is repeated until every best rate lies inside, or as often as the grid allows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dude_peft.comparison.cells import Cell, Grid, Point, Settings, half, rounded
from dude_peft.comparison.outcome import Trial


@dataclass(frozen=True)
class Choice:
    """The setting that won stage 1."""

    rate: float
    settings: Settings
    loss: float
    """Mean validation loss over the tuning seeds."""
    edge: str = ""
    """`lowest`, `highest` or `only one` where no lower or higher rate was tried, else empty."""


@dataclass(frozen=True)
class Pruned:
    """A setting that stopped before its full length."""

    method: str
    rate: float
    settings: Settings
    share: float
    """Of the training length, where it was judged."""
    loss: float
    """Mean validation loss there; infinite where a run failed."""


@dataclass(frozen=True)
class Stage:
    """Where stage 1 stands."""

    cells: tuple[Cell, ...]
    """All runs of full length that belong to it so far."""
    short: tuple[Cell, ...]
    """Those that prune."""
    waiting: tuple[Cell, ...]
    """Those without a result; none where the stage is over."""
    rates: Mapping[str, tuple[float, ...]]
    added: Mapping[str, tuple[float, ...]]
    """Rates beyond the grid's own, in the order in which they were added."""
    pruned: tuple[Pruned, ...] = ()
    choices: Mapping[str, Choice | None] = field(default_factory=dict)
    """None for a method of which every setting failed; empty until the stage is over."""

    @property
    def over(self) -> bool:
        """Whether settings are chosen."""
        return bool(self.choices)


def stage_one(grid: Grid, result: Callable[[Cell], Trial | None], most_runs: int) -> Stage:
    """Where stage 1 stands, from the results that are there: the same whenever it is asked.

    Args:
        grid: the comparison.
        result: of a cell, None where there is none yet.
        most_runs: of both stages; no rate is added beyond.
    """
    rates = {each.name: each.rates for each in grid.contestants}
    added: dict[str, tuple[float, ...]] = {each.name: () for each in grid.contestants}
    points = {each.name: grid.points(each.rates) for each in grid.contestants}
    short: list[Cell] = []
    pruned: list[Pruned] = []
    for share in grid.config.prune:
        cells = _in_turn([list(grid.tuning(each, points[each.name], share)) for each in grid.contestants])
        short += cells
        trials, waiting = _results(cells, result)
        if waiting:
            return Stage((), tuple(short), waiting, rates, added, tuple(pruned))
        for name, of_it in points.items():
            points[name], lost = _halved(of_it, _means(trials, name))
            pruned += [Pruned(name, rate, settings, share, loss) for (rate, settings), loss in lost]
    for extension in range(grid.config.extend + 1):
        full = {name: [*of_it, *grid.points(added[name])] for name, of_it in points.items()}
        cells = _in_turn([list(grid.tuning(each, full[each.name])) for each in grid.contestants])
        trials, waiting = _results(cells, result)
        if waiting:
            return Stage(tuple(cells), tuple(short), waiting, rates, added, tuple(pruned))
        choices = {name: choose(trials, name, rates[name]) for name in rates}
        inside = all(choice is not None and not choice.edge for choice in choices.values())
        room = grid.runs + (extension + 1) * grid.round <= most_runs
        if inside or extension == grid.config.extend or not room:
            break
        for name in rates:
            new = next_rate(rates[name], choices[name], _losses(trials, name, rates[name]))
            added[name] += (new,)
            rates[name] = tuple(sorted((*rates[name], new)))
    return Stage(tuple(cells), tuple(short), (), rates, added, tuple(pruned), choices)


def choose(trials: Sequence[Trial], method: str, rates: Sequence[float]) -> Choice | None:
    """The setting with the lowest mean loss over its seeds; one failure is enough for a setting not to win."""
    best: Choice | None = None
    for (rate, settings), loss in _means(trials, method):
        if math.isfinite(loss) and (best is None or loss < best.loss):
            edge = "lowest" if rate == min(rates) else "highest" if rate == max(rates) else ""
            edge = edge if len(rates) > 1 else "only one"
            best = Choice(rate, settings, loss, edge)
    return best


def next_rate(rates: Sequence[float], choice: Choice | None, losses: Mapping[float, float]) -> float:
    """The rate that is tried next, beyond the edge or beside the best.

    Args:
        rates: those that were tried, from the lowest.
        choice: the best setting; None where all failed, which asks for a lower rate.
        losses: of each rate, the best of its settings.
    """
    if choice is None or choice.edge in ("lowest", "only one"):
        return rounded(rates[0] * (rates[0] / rates[1] if len(rates) > 1 else 10**-0.5))
    if choice.edge == "highest":
        return rounded(rates[-1] * (rates[-1] / rates[-2] if len(rates) > 1 else 10**0.5))
    place = list(rates).index(choice.rate)
    neighbour = min(rates[place - 1], rates[place + 1], key=lambda rate: (losses[rate], rate))
    between = math.sqrt(choice.rate * neighbour)
    return between if rounded(between) in rates else rounded(between)


def _losses(trials: Sequence[Trial], method: str, rates: Sequence[float]) -> dict[float, float]:
    """Of each rate the loss of its best setting."""
    found = dict.fromkeys(rates, math.inf)
    for (rate, _), loss in _means(trials, method):
        found[rate] = min(found[rate], loss)
    return found


def _halved(
    points: Sequence[Point], losses: Sequence[tuple[Point, float]]
) -> tuple[list[Point], list[tuple[Point, float]]]:
    """(the better half, in the order of the points, the others with their losses)."""
    ranked = sorted(losses, key=lambda entry: entry[1])
    kept = [point for point, _ in ranked[: half(len(points))]]
    return [point for point in points if point in kept], ranked[half(len(points)) :]


def _results(cells: Sequence[Cell], result: Callable[[Cell], Trial | None]) -> tuple[list[Trial], tuple[Cell, ...]]:
    """(what has come of the cells, those that have no result yet)."""
    found = [(cell, result(cell)) for cell in cells]
    waiting = tuple(cell for cell, trial in found if trial is None)
    return [trial for _, trial in found if trial is not None], waiting


def _means(trials: Sequence[Trial], method: str) -> list[tuple[Point, float]]:
    """(rate and settings, mean validation loss over the seeds), from the lowest rate; infinite where a seed failed."""
    groups: dict[str, list[Trial]] = {}
    own = sorted((trial for trial in trials if trial.method == method), key=lambda trial: trial.learning_rate)
    for trial in own:
        groups.setdefault(repr((trial.learning_rate, trial.settings)), []).append(trial)
    return [((group[0].learning_rate, group[0].settings), _mean(group)) for group in groups.values()]


def _mean(trials: Sequence[Trial]) -> float:
    losses = [math.inf if trial.validation_loss is None else trial.validation_loss for trial in trials]
    return math.fsum(losses) / len(losses)


def _in_turn(queues: Sequence[Sequence[Cell]]) -> list[Cell]:
    """One of each method in turn, so that what else the machine does falls on all of them."""
    return [cell for together in itertools.zip_longest(*queues) for cell in together if cell is not None]
