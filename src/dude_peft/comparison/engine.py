"""Runs of a comparison on this machine: several at a time, each the command `dude train` in a process of its own.

A run that crashes, diverges or has no memory ends alone, and that is its result. What is nobody's result ends the
comparison: a mistake in a configuration, bad rows, a full disk, a signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from dude_peft.comparison.cells import Cell
from dude_peft.comparison.folder import CompareFolder
from dude_peft.doors import open_file
from dude_peft.errors import (
    ArtifactError,
    BusyError,
    ConfigError,
    DataError,
    NumericsError,
    ResourceError,
    StoppedError,
)
from dude_peft.machine.launch import die_with_parent
from dude_peft.machine.stop import handled_by
from dude_peft.show import shown

_POLL_SECONDS = 0.05
_ERROR = "dude: error["
_LAST_BYTES = 8192
_ATTEMPTS = 2  # of a run that a signal killed: the second goes on from its checkpoint
_MISTAKES = {kind.exit_code: kind for kind in (ConfigError, DataError, ArtifactError, BusyError)}


@dataclass
class _Running:
    cell: Cell
    process: Any
    slot: int
    attempt: int = 1


@dataclass
class Local:
    """Runs cells on this machine."""

    folder: CompareFolder
    jobs: int
    threads: int
    """Of each run."""
    told: Callable[[Cell, int], None]
    """Hears of each cell that has ended, and how many are running."""
    _running: list[_Running] = field(default_factory=list)
    _signal: int | None = None

    def run(self, cells: Sequence[Cell]) -> None:
        """Runs all of them to their ends.

        Raises:
            DudeError: what is no result of a run: its own line, with the run's name.
            StoppedError: Ctrl-C or SIGTERM; the runs have saved checkpoints.
        """
        waiting = list(reversed(cells))
        devices = _devices()
        cores = _shares(self.jobs)
        # The first signal lets the runs save their checkpoints, the second ends them at once.
        with handled_by(self._pass_on):
            try:
                while (waiting and self._signal is None) or self._running:
                    free = set(range(self.jobs)) - {each.slot for each in self._running}
                    while waiting and free and self._signal is None:
                        self._start(waiting.pop(), free.pop(), devices, cores)
                    time.sleep(_POLL_SECONDS)
                    for each in [each for each in self._running if each.process.poll() is not None]:
                        self._running.remove(each)
                        if self._ended(each) == "again":
                            self._start(each.cell, each.slot, devices, cores, each.attempt + 1)
            finally:
                self._kill()
        if self._signal is not None:
            name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[signal.Signals(self._signal)]
            raise StoppedError(self._signal, f"stopped by {name}; run the same command again, it goes on")

    def _start(
        self, cell: Cell, slot: int, devices: Sequence[str], cores: Sequence[Sequence[int]], attempt: int = 1
    ) -> None:
        config = self.folder.place(cell)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        process = spawn(["train", str(config), "--no-page"], self.folder.log(cell), environment)
        if cores:
            with contextlib.suppress(OSError):  # it has ended already
                os.sched_setaffinity(process.pid, cores[slot])
        self._running.append(_Running(cell, process, slot, attempt))
        if self._signal is not None:  # it came while the process was being made
            process.send_signal(self._signal)

    def _ended(self, each: _Running) -> str:
        """Notes what became of a run; `again` where it is to be started once more."""
        code, cell = each.process.returncode, each.cell
        if code == 0 or self._signal is not None:
            if code == 0:
                self.told(cell, len(self._running))
            return ""
        line = last_words(self.folder.log(cell))
        if code < 0:
            if each.attempt < _ATTEMPTS:
                return "again"
            name = signal.Signals(-code).name
            line = f"killed by {name}, twice" + ("; was memory out?" if name == "SIGKILL" else "")
        elif (kind := _MISTAKES.get(code)) is not None:
            raise kind(f"run {cell.name}: {line}")
        elif code == ResourceError.exit_code and "memory" not in line:
            raise ResourceError(f"run {cell.name}: {line}")
        elif code > 128:
            raise StoppedError(code - 128, f"run {cell.name} was stopped: {line}")
        elif code == NumericsError.exit_code:
            line = f"diverged: {line}"
        self.folder.fail(cell, line)
        self.told(cell, len(self._running))
        return ""

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for each in self._running:
            if each.process.poll() is None:
                each.process.send_signal(number)
        self._signal = number

    def _kill(self) -> None:
        for each in self._running:
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()


def spawn(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> Any:
    """`dude ARGUMENTS` as a process that ends with this one, its words in a file."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dude_peft", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on
            preexec_fn=die_with_parent,
        )


def last_words(log: Path) -> str:
    """The error that a run ended with, or else its last line."""
    try:
        with open_file(log) as file:
            file.seek(max(0, log.stat().st_size - _LAST_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return "it left no word"
    errors = [line.partition("]: ")[2] for line in lines if line.startswith(_ERROR)]
    said = errors or [line.strip() for line in lines if line.strip()]
    return shown(said[-1], 500) if said else "it left no word"


def default_threads(jobs: int) -> int:
    """Threads of each of `jobs` runs: what the user says, or this process's share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, len(_cores()) // jobs)


def check_jobs(jobs: int) -> None:
    """Raises ConfigError where `jobs` is none."""
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: give at least 1")


def _devices() -> list[str]:
    """The GPUs that runs are given, one each in turn."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _cores() -> list[int]:
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def _shares(jobs: int) -> list[list[int]]:
    """The cores of each job, as even as they go; none where there are fewer cores than jobs, or one job."""
    cores = _cores()
    if jobs == 1 or len(cores) < jobs or not hasattr(os, "sched_setaffinity"):
        return []
    return [cores[len(cores) * job // jobs : len(cores) * (job + 1) // jobs] for job in range(jobs)]
