"""The runs of a comparison, brought to their ends: one loop, whatever place they compute in.

A run that crashes, diverges or has no memory ends alone, and that is its result. What is nobody's result ends the
comparison: a mistake in a configuration, bad rows, a full disk, a signal, a machine that is lost again and again.
"""

from __future__ import annotations

import re
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from dude_peft.errors import (
    ArtifactError,
    BusyError,
    ConfigError,
    DataError,
    NumericsError,
    ResourceError,
    StoppedError,
)
from dude_peft.machine.stop import handled_by

if TYPE_CHECKING:
    from dude_peft.comparison.cells import Cell
    from dude_peft.comparison.folder import CompareFolder

ENGINES = ("local", "ray")
_POLL_SECONDS = 0.05
_ATTEMPTS = 2  # of a run that a signal killed: the second goes on from its checkpoint
_LOSSES = 5  # of a run with its machine, which says little about the run
_OF_MEMORY = re.compile("fit into memory|out of memory|memory ran out")
_MISTAKES = {kind.exit_code: kind for kind in (ConfigError, DataError, ArtifactError, BusyError)}


@dataclass(frozen=True)
class Start:
    """A run that is to start: `dude train CONFIG`."""

    name: str
    config: Path
    log: Path
    """Where its words go."""
    threads: int


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    name: str
    code: int | None
    """Its exit code, below 0 the signal that killed it; None where it was lost with its machine."""
    words: str
    """The error that it ended with, or else its last line."""


class Place(Protocol):
    """Where runs compute: this machine's processes (`local`), or a Ray cluster (`cluster`)."""

    def open(self, folder: Path, threads: int | None) -> int:
        """Makes ready for the runs of a folder; gives the threads of each run, its own choice where `threads` is None.

        Raises:
            ConfigError: it cannot run them.
        """

    def room(self) -> int:
        """How many more could start now."""

    def start(self, run: Start) -> None:
        """Starts a run."""

    def ended(self) -> list[Ended]:
        """Those that have ended since the last call.

        Raises:
            ResourceError: the place itself is gone.
        """

    def signal(self, number: int) -> None:
        """Passes a signal on: at the first the runs save their checkpoints, the second ends them at once."""

    def kill(self) -> None:
        """Ends what still runs, at once."""

    def close(self) -> None:
        """Gives the place back."""


@dataclass
class Engine:
    """Runs cells in a place."""

    folder: CompareFolder
    place: Place
    threads: int
    """Of each run."""
    told: Callable[[Cell, int], None]
    """Hears of each cell that has ended, and how many are running."""
    warn: Callable[[str], None] = lambda line: None
    _signals: list[int] = field(default_factory=list)

    def run(self, cells: Sequence[Cell]) -> None:
        """Runs all of them to their ends.

        Raises:
            DudeError: what is no result of a run: its own line, with the run's name.
            StoppedError: Ctrl-C or SIGTERM; the runs have saved checkpoints.
        """
        waiting = deque(cells)
        running: dict[str, Cell] = {}
        kills: Counter[str] = Counter()
        losses: Counter[str] = Counter()
        passed = 0
        with handled_by(self._heard):
            try:
                while (waiting and not self._signals) or running:
                    for number in self._signals[passed:]:
                        self.place.signal(number)
                        passed += 1
                    while waiting and not self._signals and self.place.room() > 0:
                        cell = waiting.popleft()
                        running[cell.name] = cell
                        config = self.folder.place(cell)
                        self.place.start(Start(cell.name, config, self.folder.log(cell), self.threads))
                    time.sleep(_POLL_SECONDS)
                    for each in self.place.ended():
                        cell = running.pop(each.name)
                        if self._again(cell, each, kills, losses):
                            waiting.appendleft(cell)
                        elif each.code == 0 or not self._signals:
                            self.told(cell, len(running))
            finally:
                self.place.kill()
        if self._signals:
            name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[signal.Signals(self._signals[-1])]
            raise StoppedError(self._signals[-1], f"stopped by {name}; run the same command again, it goes on")

    def _again(self, cell: Cell, each: Ended, kills: Counter[str], losses: Counter[str]) -> bool:
        """Whether a run is to start once more; notes its failure where it has failed."""
        code, line = each.code, each.words
        if code == 0 or self._signals:
            return False
        if code is None:
            losses[cell.name] += 1
            if losses[cell.name] == _LOSSES:
                raise ResourceError(
                    f"run {cell.name}: lost with its machine {_LOSSES} times ({line}); look at the machines, then run "
                    "the same command again, it goes on"
                )
            self.warn(f"run {cell.name}: {line}; it goes on from its last checkpoint")
            return True
        if code < 0:
            kills[cell.name] += 1
            if kills[cell.name] < _ATTEMPTS:
                return True
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            line = f"killed by {name}, twice" + ("; was memory out?" if name == "SIGKILL" else "")
        elif (kind := _MISTAKES.get(code)) is not None:
            raise kind(f"run {cell.name}: {line}")
        elif code == ResourceError.exit_code and not _OF_MEMORY.search(line):
            raise ResourceError(f"run {cell.name}: {line}")
        elif code > 128:
            raise StoppedError(code - 128, f"run {cell.name} was stopped: {line}")
        elif code == NumericsError.exit_code:
            line = f"diverged: {line}"
        self.folder.fail(cell, line)
        return False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)  # passed on between two calls of the place, never within one


def check_engine(engine: str, address: str | None, jobs: int | None) -> None:
    """Raises ConfigError where an engine, its address and the number of jobs do not go together."""
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: choose {' or '.join(ENGINES)}")
    if address is not None and engine != "ray":
        raise ConfigError(f"--address {address}: only Ray has one; add --engine ray, or leave it out")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: give at least 1")
