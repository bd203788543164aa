"""The folder of a comparison: what it compares, and the configuration, the ordinary folder or the failure of every run.

grid.json               what is compared, sealed: another grid is refused here
runs/NAME.yaml          the configuration of a run, as `dude train` takes it
runs/NAME/              its folder, as `dude train` leaves it
runs/NAME.log           what it said
runs/NAME.failed.json   why it failed, where it did; without this file, the run is tried again
comparison.json         the result (outcome.py)
page.html               the page about it
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dude_peft.artifact.durable import disk_errors, output_dir_errors, replace_file
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.sealed import content_sha256, file_sha256, read_sealed, sealed
from dude_peft.comparison.cells import RUNS, Cell
from dude_peft.comparison.outcome import Final, Forgetting, Trial
from dude_peft.comparison.rows import Rows
from dude_peft.config.reading import dump_config, load_config
from dude_peft.config.schema import RunConfig
from dude_peft.doors import open_file
from dude_peft.errors import ArtifactError, ConfigError, DudeError
from dude_peft.folder.identity import changes, recorded_config
from dude_peft.folder.lock import RunLock
from dude_peft.folder.record import ADAPTER, METRICS, REPORT, RunReport, Score
from dude_peft.show import shown

GRID = "grid.json"


class CompareFolder:
    """The folder, and what the runs in it have come to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._trials: dict[str, Trial] = {}
        self._finals: dict[str, Final] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within: it is there, and no other `dude compare` works in it.

        Raises:
            ConfigError: it is a file, or holds something else.
            BusyError: another process compares in it.
            ResourceError: it cannot be made.
        """
        name = shown(self.path, 300)
        with output_dir_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"output_dir: {name} is a file; choose another folder")
            ours = not self.path.is_dir() or (self.path / GRID).is_file()
            if not ours and any(not _left_by_a_start(entry) for entry in self.path.iterdir()):
                raise ConfigError(f"output_dir: {name} is not empty, and holds no comparison; choose another folder")
            self.path.mkdir(parents=True, exist_ok=True)
            lock = RunLock(self.path)
        try:
            yield
        finally:
            lock.release()
            with contextlib.suppress(OSError):  # nothing has begun
                self.path.rmdir()

    def begun(self, record: dict[str, Any]) -> int | None:
        """The threads of a run of the comparison that is here; None where none has begun.

        Raises:
            ConfigError: another comparison is here; the difference is told.
            ArtifactError: its grid.json is damaged.
        """
        path = self.path / GRID
        if path.is_symlink() or not path.is_file():
            return None
        found = read_sealed(path, "choose another output_dir")
        if changed := changes(found["grid"], json.loads(json_text(record))):
            raise ConfigError(
                f"output_dir holds another comparison ({changed}); restore the grid to go on, or choose another "
                "output_dir"
            )
        return int(found["threads"])

    def begin(self, record: dict[str, Any], threads: int) -> None:
        """From here on the folder is this comparison's."""
        with disk_errors(self.path):
            (self.path / RUNS).mkdir(exist_ok=True)
        self._write(GRID, json_text(sealed({"grid": record, "threads": threads}), indent=1) + "\n")

    def place(self, cell: Cell) -> Path:
        """Writes a run's configuration, and gives its path.

        Raises:
            ConfigError: the one that is there is another one: somebody has edited it.
        """
        config = cell.placed(self.path)
        if self._written(cell) != config:
            self._write(f"{RUNS}/{cell.name}.yaml", dump_config(config))
        return self.path / RUNS / f"{cell.name}.yaml"

    def _written(self, cell: Cell) -> RunConfig | None:
        """The configuration that is there; ConfigError where somebody has edited it."""
        path = self.path / RUNS / f"{cell.name}.yaml"
        if not path.is_file():
            return None
        there = load_config(path)
        _refuse_edited(cell, path, _without_place(there.resolved().model_dump(mode="json")))
        return there

    def run_folder(self, cell: Cell) -> Path:
        """Where `dude train` works for a cell."""
        return self.path / RUNS / cell.name

    def log(self, cell: Cell) -> Path:
        """Where a run's words go."""
        return self.path / RUNS / f"{cell.name}.log"

    def fail(self, cell: Cell, reason: str) -> None:
        """Notes that a run failed, and why: a result like any."""
        self._write(f"{RUNS}/{cell.name}.failed.json", json_text(sealed({"run": cell.name, "reason": reason})))

    def failure(self, cell: Cell) -> str | None:
        """Why it failed; None where it has not."""
        path = self.path / RUNS / f"{cell.name}.failed.json"
        return str(read_sealed(path, "remove it to try the run again")["reason"]) if path.is_file() else None

    def trial(self, cell: Cell, rows: Rows) -> Trial | None:
        """What a run of stage 1 came to; None where it has not ended.

        Raises:
            ConfigError, ArtifactError, DataError: the run is not the one that belongs here.
        """
        known = self._trials.get(cell.name)
        if known is None:
            if (reason := self.failure(cell)) is not None:
                known = Trial(**_about(cell), validation_loss=None, failed=reason, seconds=None, steps=None)
            elif (report := self.report(cell, rows)) is not None and report.after is not None:
                known = Trial(
                    **_about(cell),
                    validation_loss=report.after.loss,
                    failed=None,
                    seconds=report.seconds["training"],
                    steps=report.steps,
                    curve=tuple(
                        (int(line["step"]), float(line["eval_loss"])) for line in self._lines(cell, report, "eval_loss")
                    ),
                )
        if known is not None:
            self._trials[cell.name] = known
        return known

    def final(self, cell: Cell, rows: Rows) -> Final | None:
        """The same of stage 2."""
        known = self._finals.get(cell.name)
        if known is None:
            if (reason := self.failure(cell)) is not None:
                known = Final(**_about(cell), losses=(), tokens=(), right=None, failed=reason)
            elif (report := self.report(cell, rows)) is not None and report.after is not None:
                after = report.after
                known = Final(
                    **_about(cell),
                    losses=after.losses,
                    tokens=after.tokens,
                    right=right_of(after),
                    failed=None,
                    **self._costs(cell, report),
                )
        if known is not None:
            self._finals[cell.name] = known
        return known

    def trials(self) -> list[Trial]:
        """Those that were read so far."""
        return list(self._trials.values())

    def _costs(self, cell: Cell, report: RunReport) -> dict[str, Any]:
        """What a run of stage 2 took, and what it forgot."""
        general = report.data.get("general_test", {}).get("measured")
        lines = self._lines(cell, report, "loss")
        weights = (self.run_folder(cell) / ADAPTER).glob("*.safetensors")
        costs: dict[str, Any] = {
            "seconds_per_step": report.seconds["training"] / report.steps,
            "peak_memory": max((int(line["memory_bytes"]) for line in lines), default=0) or None,
            "adapter_bytes": sum(path.stat().st_size for path in weights),
            "trained_parameters": report.trainable_parameters,
            "start_seconds": report.seconds.get("adapter"),
            "curve": tuple((int(line["step"]), float(line["loss"])) for line in lines),
        }
        if general:
            first, last = general[0], general[-1]
            costs["forgetting"] = Forgetting(
                loss=last["loss"],
                base_loss=first["loss"],
                kl_forward=last["kl_base_tuned"],
                kl_reverse=last["kl_tuned_base"],
            )
        return costs

    def report(self, cell: Cell, rows: Rows) -> RunReport | None:
        """That of a run that has ended, checked: it is this run, on these rows. None where it has not ended."""
        self._written(cell)
        folder = self.run_folder(cell)
        if (there := recorded_config(folder)) is not None:
            _refuse_edited(cell, folder, _without_place(there))
        if not (folder / REPORT).is_file():
            return None
        try:
            report = RunReport.read(folder / REPORT)
        except ArtifactError as error:
            raise ArtifactError(
                f"run {cell.name}: {str(error).partition(';')[0]}; remove its folder, it runs again"
            ) from error
        _refuse_edited(cell, folder, _without_place(report.config))
        rows.check(cell, report)
        return report

    def _lines(self, cell: Cell, report: RunReport, key: str) -> list[dict[str, Any]]:
        """The lines of a run's metrics.jsonl that have a key."""
        path = self.run_folder(cell) / METRICS
        try:
            if (report.files or {}).get(METRICS) != file_sha256(path):
                raise ValueError("it was changed")
            with open_file(path) as file:
                lines = [json.loads(line) for line in file]
            return [line for line in lines if key in line]
        except (OSError, ValueError) as error:
            if isinstance(error, DudeError):
                raise
            raise ArtifactError(f"{shown(path, 300)} is damaged; remove the run's folder, it runs again") from error

    def _write(self, name: str, text: str) -> None:
        with disk_errors(self.path / name):
            replace_file(self.path / name, text.encode("utf-8"))


def right_of(score: Score) -> tuple[bool, ...] | None:
    """Of each answered question whether the answer was right; None without questions."""
    return tuple(answer.right for answer in score.answers) or None


def _about(cell: Cell) -> dict[str, Any]:
    return {"method": cell.method, "settings": cell.settings, "learning_rate": cell.rate, "seed": cell.seed}


def _left_by_a_start(entry: Path) -> bool:
    """Whether a start that was killed before it wrote grid.json leaves this."""
    return entry.name.startswith(".dude-") or (entry.name == RUNS and entry.is_dir() and not any(entry.iterdir()))


def _without_place(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "output_dir"}


def _refuse_edited(cell: Cell, path: Path, there: dict[str, Any]) -> None:
    ours = _without_place(cell.config.model_dump(mode="json"))
    if content_sha256(there) == content_sha256(ours):
        return
    raise ConfigError(
        f"{shown(path, 300)}: this run was edited ({changes(ours, there)}); restore it, or remove it to run it anew"
    )
