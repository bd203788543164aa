"""The runs of a comparison: each an ordinary run's configuration, with a name in the comparison's folder."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dude_peft.artifact.sealed import content_sha256
from dude_peft.config.grid import GridConfig
from dude_peft.config.reading import check_key, with_values
from dude_peft.config.schema import RunConfig, ShareSection
from dude_peft.errors import ConfigError
from dude_peft.model.load import with_only_gguf
from dude_peft.show import shown

RUNS = "runs"
"""Methods that tell DuDe's claims apart; those that the table has."""
_TUNED = ("adapter.", "train.")
_OURS = {"train.seed", "train.learning_rate", "adapter.svd_seed"}
_HALF_DECADES = (-2, -1, 0, 1, 2)
_UNSAFE = re.compile(r"[^A-Za-z0-9.]+")

Settings = dict[str, Any]
Point = tuple[float, Settings]
"""A rate, and the values of the axes."""


@dataclass(frozen=True)
class Contestant:
    """One that competes: a method, with what else its name stands for."""

    name: str
    config: RunConfig
    """The run of its own, rate and seed aside."""
    rates: tuple[float, ...]
    """Those that are tried first, from the lowest."""


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    stage: Literal["tune", "test"]
    method: str
    settings: Settings
    rate: float
    seed: int
    config: RunConfig
    """What `dude train` runs."""
    share: float = 1.0
    """Of the training length: below 1 in a run that only prunes."""

    @cached_property
    def name(self) -> str:
        """Of its folder: readable, and its own."""
        content = self.config.model_dump(mode="json", exclude={"output_dir"})
        stage = self.stage if self.share == 1 else f"{self.stage}{self.share:g}"
        label = _UNSAFE.sub("-", f"{stage}-{self.method}-{self.rate:g}-seed{self.seed}")[:80]
        return f"{label}-{content_sha256(content)[:8]}"

    def __str__(self) -> str:
        axes = "".join(f", {key.rpartition('.')[2]} {value}" for key, value in self.settings.items())
        length = "" if self.share == 1 else f", {100 * self.share:g} % of the length"
        return shown(f"{self.method}, rate {self.rate:g}{axes}{length}, seed {self.seed}", 200)

    def placed(self, folder: Path) -> RunConfig:
        """Its configuration in a comparison's folder."""
        return self.config.model_copy(update={"output_dir": str(folder / RUNS / self.name)})


class Grid:
    """A comparison as contestants, and the cells of each stage."""

    def __init__(self, grid: GridConfig, run: RunConfig, *, controls: bool = False) -> None:
        """Checks everything that needs no rows and no weights.

        Raises:
            ConfigError: an unknown method or key, or one that would make the comparison unfair.
        """
        self.config = grid
        judges = {} if grid.test is None else {"data.test": _plain(grid.test)}
        if isinstance(grid.test, ShareSection):
            judges["data.test_split"] = "test"
        self.run = with_values(run, judges, "key 'test'")
        self.run = self.run.model_copy(update={"model": with_only_gguf(self.run.model)})
        self._check_run()
        self.combinations = self._combinations()
        entries = list(grid.methods)
        if controls:
            entries += _missing_controls(entries)
        self.contestants = tuple(self._contestants(entries))
        names = [each.name for each in self.contestants]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"key 'methods': {shown(name)} is named twice; give one of them a name of its own")
        if len({len(each.rates) for each in self.contestants}) > 1:
            told = ", ".join(f"{shown(each.name)} {len(each.rates)}" for each in self.contestants)
            raise ConfigError(
                f"key 'learning_rates': the methods do not have the same number of trials ({told}); give each as many"
            )

    def record(self) -> dict[str, Any]:
        """What makes it this comparison and no other, as JSON; limits on its cost are none of it."""
        grid = self.config.model_dump(mode="json", exclude={"run", "methods", "output_dir", "max_runs", "test"})
        own = {each.name: each.config.model_dump(mode="json", exclude={"output_dir"}) for each in self.contestants}
        rates = {each.name: list(each.rates) for each in self.contestants}
        return {**grid, "methods": own, "learning_rates": rates}

    def points(self, rates: Sequence[float]) -> list[Point]:
        """Every rate with every combination of the axes' values."""
        return list(itertools.product(rates, self.combinations))

    def tuning(self, contestant: Contestant, points: Sequence[Point], share: float = 1.0) -> Iterator[Cell]:
        """The cells of stage 1 of one contestant: each point with each tuning seed, over a share of the length."""
        for (rate, settings), seed in itertools.product(points, self.config.tuning_seeds):
            yield self._cell("tune", contestant, settings, rate, seed, share)

    def final(self, contestant: Contestant, rate: float, settings: Settings, seed: int) -> Cell:
        """A cell of stage 2."""
        return self._cell("test", contestant, settings, rate, seed)

    @property
    def trials(self) -> int:
        """Runs of stage 1 of one contestant, before any extension; those that prune among them."""
        points = [len(self.contestants[0].rates) * len(self.combinations)]
        for _ in self.config.prune:
            points.append(half(points[-1]))
        return sum(points) * len(self.config.tuning_seeds)

    @property
    def runs(self) -> int:
        """Runs of both stages, before any extension."""
        return len(self.contestants) * (self.trials + len(self.config.final_seeds))

    @property
    def round(self) -> int:
        """Runs that one more rate for every contestant takes."""
        return len(self.contestants) * len(self.combinations) * len(self.config.tuning_seeds)

    def check(self, max_runs: int | None) -> None:
        """Raises ConfigError where it takes more runs than it may, or holds one that cannot be or is there twice."""
        most = self.config.max_runs if max_runs is None else max_runs
        if self.runs > most:
            extended = self.runs + self.config.extend * self.round
            room = f", or {extended} with all rates that may be added" if self.config.extend else ""
            raise ConfigError(
                f"the grid takes {self.runs} runs, but max_runs is {most}; name fewer methods, rates or seeds, or add "
                f"--max-runs {self.runs}{room}"
            )
        cells: dict[str, Cell] = {}
        for each in self.contestants:
            for cell in self.tuning(each, self.points(each.rates)):
                other = cells.setdefault(cell.name, cell)
                if other is not cell:
                    raise ConfigError(
                        f"two runs are the same, and would share a folder: {other}; and {cell}; leave one out, or name "
                        "their methods with other letters"
                    )

    def _cell(
        self,
        stage: Literal["tune", "test"],
        contestant: Contestant,
        settings: Settings,
        rate: float,
        seed: int,
        share: float = 1.0,
    ) -> Cell:
        values = {**settings, "train.learning_rate": rate, "train.seed": seed, "adapter.svd_seed": seed}
        values |= self._judged_by(stage)
        config = with_values(contestant.config, values, f"{stage} {shown(contestant.name)}").resolved()
        if config.train.section is not None:
            raise ConfigError(
                f"train.objective: {config.train.objective}: dude compare ranks methods by the loss of answers, not of "
                "pairs or rewards; use objective: sft, or compare the reports of single runs"
            )
        return Cell(stage, contestant.name, dict(settings), rate, seed, _shortened(config, share), share)

    def _judged_by(self, stage: str) -> Settings:
        """The rows that judge a stage. The test is not even named in the runs of the first one."""
        if stage == "test":
            return {"evaluation.eval_steps": None}
        data = self.run.data
        values: Settings = {"data.test": _plain(self.config.validation), "data.test_rows": None}
        if isinstance(self.config.validation, ShareSection):
            values["data.test_split"] = "test"
        if isinstance(data.test, ShareSection):
            values["data.set_aside"] = data.test.share
        values |= {"data.general_test": None, "evaluation.tasks": [], "evaluation.tasks_text": None}
        values |= {"evaluation.tasks_data_dir": None, "evaluation.tasks_limit": None, "evaluation.tasks_chat": False}
        return values | {"evaluation.tasks_num_fewshot": None, "evaluation.rows": 1, "evaluation.samples": 0}

    def _check_run(self) -> None:
        evaluation, data = self.run.evaluation, self.run.data
        if not evaluation.enabled or data.test is None:
            raise ConfigError("key 'run': a comparison needs test rows; set data.test, and evaluation.enabled: true")
        if data.set_aside is not None:
            raise ConfigError("key 'run': data.set_aside is the comparison's own; remove it")
        if evaluation.early_stopping_patience is not None or evaluation.metric_for_best_model != "loss":
            raise ConfigError(
                "key 'run': early_stopping_patience and metric_for_best_model choose by the rows that judge; remove "
                "them, and set train.max_steps"
            )
        self.run = with_values(
            self.run, {"evaluation.load_best_model_at_end": False, "evaluation.tasks_steps": None}, "key 'run'"
        )

    def _combinations(self) -> list[Settings]:
        axes = self.config.axes
        for key in axes:
            _check_key(key, "key 'axes'")
            if key == "adapter.method":
                raise ConfigError("key 'axes': adapter.method is no axis; name the methods in 'methods'")
        for key, values in axes.items():
            for value in values:
                with_values(self.run, {key: value}, "key 'axes'")
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def _contestants(self, entries: Sequence[Any]) -> Iterator[Contestant]:
        listed = self.config.learning_rates
        seen = set()
        for entry in entries:
            for name, overrides in ({entry: {}} if isinstance(entry, str) else entry).items():
                where = f"key 'methods': {shown(name)}"
                for key in overrides:
                    _check_key(key, where)
                    if key in self.config.axes or (key == "adapter.r" and self.config.ranks):
                        other = "ranks" if key == "adapter.r" and self.config.ranks else "axes"
                        raise ConfigError(f"{where}: {key} is also set by {other!r}; keep one of them")
                own = with_values(self.run, {"adapter.method": name, "train.learning_rate": None, **overrides}, where)
                rates = listed.get(name) if isinstance(listed, dict) else listed
                if isinstance(listed, dict) and rates is None:
                    raise ConfigError(f"key 'learning_rates': there is none for {shown(name)}; add it")
                seen.add(name)
                if self.config.ranks and own.adapter.budget is not None:
                    raise ConfigError(f"{where}: adapter.budget decides the ranks; leave it or 'ranks' out")
                for rank in self._ranks(own):
                    named = name if rank is None else f"{name} r={rank}"
                    at = own if rank is None else with_values(own, {"adapter.r": rank}, where)
                    middle = at.resolved().train.learning_rate
                    assert middle is not None
                    yield Contestant(named, at, tuple(sorted(rates or around(middle))))
        if isinstance(listed, dict) and (unknown := [name for name in listed if name not in seen]):
            raise ConfigError(f"key 'learning_rates': {shown(unknown[0])} is not among the methods; remove it")

    def _ranks(self, run: RunConfig) -> Sequence[int | None]:
        """Those at which a method competes; none of its own where it has no rank."""
        from dude_peft.methods import METHODS

        method = METHODS.get(run.resolved().adapter.method)
        return self.config.ranks if self.config.ranks and (method is None or method.ranked) else [None]


def _shortened(config: RunConfig, share: float) -> RunConfig:
    """The run over a share of its length."""
    train = config.train
    if share == 1:
        return config
    if train.max_steps is not None:
        return with_values(config, {"train.max_steps": math.ceil(share * train.max_steps)}, "key 'prune'")
    return with_values(config, {"train.num_train_epochs": share * (train.num_train_epochs or 1)}, "key 'prune'")


def half(count: int) -> int:
    """How many of so many settings go on where the worse half stops."""
    return (count + 1) // 2


def around(rate: float) -> list[float]:
    """Half-decades over two decades, around a rate."""
    return [rounded(rate * 10 ** (step / 2)) for step in _HALF_DECADES]


def rounded(rate: float) -> float:
    """A rate of three digits, as people write one."""
    return float(f"{rate:.3g}")


def _plain(rows: Any) -> Any:
    if isinstance(rows, list):
        return [each.model_dump(mode="json", exclude_unset=True) for each in rows]
    return rows if isinstance(rows, str) else rows.model_dump(mode="json")


def _check_key(key: str, where: str) -> None:
    """Only what belongs to a method may differ."""
    check_key(key, where)
    if key in _OURS and key != "train.learning_rate":
        raise ConfigError(f"{where}: {shown(key)} is the comparison's own; use tuning_seeds and final_seeds")
    if key == "train.learning_rate" and where == "key 'axes'":
        raise ConfigError(f"{where}: {key} is tuned anyway; use learning_rates")
    if not key.startswith(_TUNED):
        raise ConfigError(
            f"{where}: {shown(key)} would show the methods different data or another model; only keys of adapter and "
            "train may differ"
        )


def _missing_controls(entries: Sequence[Any]) -> list[str]:
    from dude_peft.methods import METHODS

    named = {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}
    return [name for name, row in METHODS.items() if row.certainty == "control" and name not in named]
