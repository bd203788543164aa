"""`dude compare` from start to end: check, tune on validation rows, test the chosen settings, write the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_peft.artifact.durable import disk_errors
from dude_peft.comparison.cells import Cell, Grid
from dude_peft.comparison.cluster import Cluster
from dude_peft.comparison.engine import Engine, Place, check_engine
from dude_peft.comparison.folder import GRID, CompareFolder
from dude_peft.comparison.local import Local
from dude_peft.comparison.outcome import Comparison, Trial
from dude_peft.comparison.result import final_cells, first_warnings, gather
from dude_peft.comparison.rows import Rows, check_primary, read_rows
from dude_peft.comparison.screen import Progress, show_result
from dude_peft.comparison.standing import best_method, summary_of
from dude_peft.comparison.tuning import Stage, stage_one
from dude_peft.config.grid import GridConfig
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.folder.record import ADAPTER
from dude_peft.machine.stop import Stop
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.next_steps import tell_next
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports


def compare(
    config: GridConfig,
    run: RunConfig,
    *,
    jobs: int | None = None,
    engine: str = "local",
    address: str | None = None,
    controls: bool = False,
    max_runs: int | None = None,
    collect: bool = False,
    quiet: bool = False,
    write_page: Callable[[Path], Path] | None = None,
) -> Comparison:
    """Runs what is missing of both stages, and writes comparison.json and its page.

    Args:
        config: the comparison.
        run: its ordinary run (`reading.load_grid`).
        jobs: runs at a time; None is one on this machine, and as many as a cluster holds.
        engine: where they run, one of `engine.ENGINES`.
        address: of the Ray cluster.
        controls: the controls of the table compete too.
        max_runs: replaces the grid's.
        collect: run nothing; take what has ended.
        quiet: print nothing.
        write_page: writes a page about the folder, and tells where (`reporting`, which is built on this room).

    Raises:
        ConfigError, DataError, ArtifactError, ResourceError, BusyError: what is no result of a single run.
        StoppedError: Ctrl-C or SIGTERM; the same call again goes on.
    """
    display = Display(quiet=quiet)
    check_engine(engine, address, jobs)
    if collect and engine != "local":
        raise ConfigError(f"--engine {engine}: --collect runs nothing; leave one of them out")
    place: Place = Cluster(address, jobs, display.warn) if engine == "ray" else Local(jobs or 1)
    stop = Stop(display.warn)
    stop.after("outside of any run; run the same command again, it goes on")
    with (
        stop.listening(),
        closing(place),
        opened(config, run, display, place, controls=controls, max_runs=max_runs) as this,
    ):
        if not collect:
            this.run_all()
        found = this.result()
        with disk_errors(this.folder.path):
            found.write(this.folder.path)
        page = None if write_page is None else write_page(this.folder.path)
    if quiet:
        return found
    summary = summary_of(found)
    show_result(display, found, summary, this.folder.path)
    if page is not None:
        display.say(f"page: {shown(page, None)}")
    after: list[list[str]] = []
    if (adapter := this.first_adapter(best_method(summary))) is not None:
        gguf_file = this.grid.run.model.gguf_file
        base = [] if gguf_file is None else ["--gguf-file", gguf_file]
        after.append(["chat", str(adapter), *base, "--compare"])
    tell_next(display, *after)
    return found


@dataclass
class Work:
    """A comparison whose folder is open and whose rows are read."""

    grid: Grid
    folder: CompareFolder
    rows: Rows
    display: Display
    place: Place
    threads: int
    most_runs: int

    def stage(self) -> Stage:
        """Where stage 1 stands."""
        return stage_one(self.grid, lambda cell: self.folder.trial(cell, self.rows), self.most_runs)

    def ended(self, cell: Cell) -> bool:
        """Whether a run has a result."""
        return self._result(cell) is not None

    def startable(self) -> list[Cell]:
        """The runs that nothing has to be waited for."""
        stage = self.stage()
        return list(stage.waiting) or [cell for cell in final_cells(self.grid, stage) if not self.ended(cell)]

    def cells(self) -> list[Cell]:
        """All runs that belong to the comparison so far."""
        stage = self.stage()
        return [*stage.short, *stage.cells, *final_cells(self.grid, stage)]

    def run_all(self) -> None:
        """Runs what is missing, rate by added rate of stage 1, then stage 2."""
        with Progress(self.display, self.grid.runs) as progress:
            progress.begin(sum(map(self.ended, self.cells())))

            def told(cell: Cell, running: int) -> None:
                failed = self._result(cell).failed is not None
                progress.ended(self.words(cell), running, self.best(), failed=failed)

            while cells := self.startable():
                to_test = 0 if self.stage().over else len(self.grid.contestants) * len(self.grid.config.final_seeds)
                progress.expect(len(self.cells()) + to_test)
                Engine(self.folder, self.place, self.threads, told, self.display.warn).run(cells)

    def run_one(self, name: str) -> None:
        """Does one run by its name.

        Raises:
            ConfigError: there is no such run, or its turn has not come.
        """
        cells = {cell.name: cell for cell in self.cells()}
        if name not in cells:
            raise ConfigError(f"--run {shown(name)}: there is no such run now; --print-commands lists them")
        if not self.ended(cells[name]):
            Engine(self.folder, self.place, self.threads, lambda cell, running: None).run([cells[name]])
        self.display.say(self.words(cells[name]))

    def result(self) -> Comparison:
        """The comparison as far as its runs have ended."""
        stage = self.stage()
        return gather(self.grid, self.folder, self.rows, stage, final_cells(self.grid, stage))

    def words(self, cell: Cell) -> str:
        """One line on a run that has ended."""
        result = self._result(cell)
        if result.failed is not None:
            return f"{cell}: failed: {result.failed}"
        if isinstance(result, Trial):
            return f"{cell}: validation loss {result.validation_loss:.4f}"
        return f"{cell}: tested"

    def best(self) -> str:
        """The best trial so far, as the end of a line."""
        trials = [trial for trial in self.folder.trials() if trial.validation_loss is not None]
        best = min(trials, key=lambda trial: (trial.validation_loss, trial.method), default=None)
        if best is None:
            return ""
        return f"; best so far {shown(best.method)} at {best.learning_rate:g}: {best.validation_loss:.4f}"

    def first_adapter(self, method: str | None) -> Path | None:
        """The adapter of the first test run of a method."""
        cells = (cell for cell in final_cells(self.grid, self.stage()) if cell.method == method)
        return next((self.folder.run_folder(cell) / ADAPTER for cell in cells), None)

    def _result(self, cell: Cell) -> Any:
        return (self.folder.trial if cell.stage == "tune" else self.folder.final)(cell, self.rows)


@contextmanager
def opened(
    config: GridConfig,
    run: RunConfig,
    display: Display,
    place: Place,
    *,
    controls: bool = False,
    max_runs: int | None = None,
    alone: bool = True,
) -> Iterator[Work]:
    """Within: everything is checked that can be before a run, and the folder is this comparison's.

    Args:
        config: the comparison.
        run: its ordinary run.
        display: what is shown.
        place: where the runs compute.
        controls: the controls of the table compete too.
        max_runs: replaces the grid's.
        alone: hold the folder; without it, several processes may each run one of its runs.
    """
    grid = Grid(config, run, controls=controls)
    most = config.max_runs if max_runs is None else max_runs
    grid.check(most)
    folder = CompareFolder(config.output_dir)
    for warning in first_warnings(grid):
        display.warn(warning)
    with folder.held() if alone else nullcontext():
        if not alone and not (folder.path / GRID).is_file():
            raise ConfigError(f"output_dir: {shown(folder.path, 300)} holds no comparison yet; use --print-commands")
        known = folder.begun(grid.record())
        threads = place.open(folder.path, known)
        with gathered_warnings(display.warn):
            with display.waiting("imports"), quiet_imports():
                import transformers  # noqa: F401  # what takes seconds, in one place
            with display.waiting("reading the rows"):
                first = grid.contestants[0]
                some = next(grid.tuning(first, grid.points(first.rates)))
                rows = read_rows(some, grid.final(first, some.rate, some.settings, config.final_seeds[0]))
            if known is None:
                from dude_peft.comparison.adapters import check_adapters

                with display.waiting("trying the adapters"):
                    check_adapters(grid)
        check_primary(config.primary, rows)
        if known is None:
            folder.begin(grid.record(), threads)
        yield Work(grid, folder, rows, display, place, threads, most)
