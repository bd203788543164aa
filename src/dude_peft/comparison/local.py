"""Runs on this machine: several at a time, each the command `dude train` in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_peft.comparison.engine import Ended, Start
from dude_peft.doors import open_file
from dude_peft.machine.launch import die_with_parent
from dude_peft.show import shown

_ERROR = "dude: error["
_LAST_BYTES = 8192


@dataclass
class _Running:
    run: Start
    process: Any
    slot: int


class Local:
    """Processes that share the cores, or take one GPU each in turn."""

    def __init__(self, jobs: int) -> None:
        """So many at a time."""
        self.jobs = jobs
        self._running: list[_Running] = []

    def open(self, folder: Path, threads: int | None) -> int:
        """Nothing has to be made ready."""
        return default_threads(self.jobs) if threads is None else threads

    def room(self) -> int:
        """How many more could start now."""
        return self.jobs - len(self._running)

    def start(self, run: Start) -> None:
        """Starts a run on a share of the cores that is free."""
        slot = min(set(range(self.jobs)) - {each.slot for each in self._running})
        environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads)}
        if devices := self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        process = spawn(["train", str(run.config), "--no-page"], run.log, environment)
        self._running.append(_Running(run, process, slot))
        if cores := _shares(self.jobs):
            with contextlib.suppress(OSError):  # it has ended already
                os.sched_setaffinity(process.pid, cores[slot])

    def ended(self) -> list[Ended]:
        """Those that have ended since the last call."""
        over = [each for each in self._running if each.process.poll() is not None]
        self._running = [each for each in self._running if each not in over]
        return [Ended(each.run.name, each.process.returncode, last_words(each.run.log)) for each in over]

    def signal(self, number: int) -> None:
        """Passes a signal on to the runs."""
        for each in self._running:
            if each.process.poll() is None:
                each.process.send_signal(number)

    def kill(self) -> None:
        """Ends what still runs, at once."""
        for each in self._running:
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()
        self._running = []

    def close(self) -> None:
        """Nothing is kept."""

    @functools.cached_property
    def _devices(self) -> list[str]:
        """The GPUs that runs are given, one each in turn."""
        if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            return [name.strip() for name in named.split(",") if name.strip()]
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]


def spawn(arguments: list[str], log: Path, environment: dict[str, str], folder: str | None = None) -> Any:
    """`dude ARGUMENTS` as a process that ends with this one, its words in a file."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dude_peft", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
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
    return asked_threads() or max(1, len(_cores()) // jobs)


def asked_threads() -> int | None:
    """The threads that OMP_NUM_THREADS asks for."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else None


def _cores() -> list[int]:
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def _shares(jobs: int) -> list[list[int]]:
    """The cores of each job, as even as they go; none where there are fewer cores than jobs, or one job."""
    cores = _cores()
    if jobs == 1 or len(cores) < jobs or not hasattr(os, "sched_setaffinity"):
        return []
    return [cores[len(cores) * job // jobs : len(cores) * (job + 1) // jobs] for job in range(jobs)]
