"""Runs on a Ray cluster, as seen from `dude compare`: every call goes to a process that alone knows Ray (`ray_client`).

Ray writes to the terminal, takes over signals, and ends the process that uses it where the cluster is gone. None of it
reaches the comparison.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dude_peft.comparison.engine import Ended, Start
from dude_peft.comparison.local import asked_threads
from dude_peft.errors import ConfigError, ResourceError
from dude_peft.folder.lock import lock_text
from dude_peft.folder.record import REPORT
from dude_peft.installing import install
from dude_peft.machine.environment import versions
from dude_peft.machine.launch import die_with_parent
from dude_peft.show import shown

# What a run's numbers or its files may depend on; tokens are none of it, each machine has its own.
_HANDED_ON = ("DUDE_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "PYTORCH_", "MKL_", "CUBLAS_")
_CONNECT_SECONDS = 60.0
_ANSWER_SECONDS = 180.0
_POLL_SECONDS = 0.5
# A report may be seen here later than where it was written: NFS remembers for a minute that a name was not there.
_SEEN_SECONDS = 120.0
_CLOSE_SECONDS = 10.0


class Cluster:
    """A Ray cluster whose nodes share the folder of the comparison."""

    def __init__(self, address: str | None, jobs: int | None, warn: Callable[[str], None]) -> None:
        """Nothing is connected yet.

        Args:
            address: as `ray.init` takes it; None is the cluster of this machine, or the one that RAY_ADDRESS names.
            jobs: runs at a time; None for as many as the cluster holds.
            warn: hears of nodes that cannot be used, and of waiting for one.

        Raises:
            ConfigError: Ray is not installed.
        """
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(f"--engine ray needs Ray: {install('ray')}")
        self._address = address or "auto"
        self._jobs, self._warn = jobs, warn
        self._slots = 0
        self._running: dict[str, Start] = {}
        self._unseen: dict[str, tuple[Ended, float]] = {}
        self._asked = 0.0
        self._signals = 0
        self._child: Any = None

    def open(self, folder: Path, threads: int | None) -> int:
        """Connects, and looks from every node at the folder, whose lock this process has.

        Raises:
            ConfigError: no cluster answers, no node holds a run, or a node does not see the folder.
        """
        if self._address.startswith("ray://") and importlib.util.find_spec("grpc") is None:
            raise ConfigError(f"--address {shown(self._address)} needs Ray's client: {install('ray[client]')}")
        self._begin()
        try:
            self._call("connect", self._address, seconds=_CONNECT_SECONDS)
        except ResourceError as error:
            raise ConfigError(
                f"--address {shown(self._address)}: no Ray cluster answers there; start one with ray start --head, or "
                "give its address"
            ) from error
        facts = {
            "folder": str(folder.absolute()),
            "lock": lock_text(folder),
            "cwd": os.getcwd(),
            "versions": versions(),
        }
        environment = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_HANDED_ON) and "TOKEN" not in name.replace("TOKENIZERS_", "")
        }
        threads, self._slots = self._call("prepare", facts, environment, self._jobs, threads or asked_threads())
        return int(threads)

    def room(self) -> int:
        """How many more could start now; one waits at Ray where no node is there, for clusters that grow by demand."""
        return (self._jobs or max(1, self._slots)) - len(self._running)

    def start(self, run: Start) -> None:
        """Hands a run to Ray."""
        self._running[run.name] = run
        self._call("start", run.name, str(run.config.absolute()), str(run.log.absolute()), run.threads)

    def ended(self) -> list[Ended]:
        """Those that have ended since the last call, and whose reports are seen here."""
        if time.monotonic() < self._asked + _POLL_SECONDS:
            return []
        over, self._slots, warnings = self._call("poll")
        self._asked = time.monotonic()
        for line in warnings:
            self._warn(line)
        for each in over:
            self._unseen[each.name] = each, self._asked + _SEEN_SECONDS
        return [self._forget(each) for each, end in list(self._unseen.values()) if self._seen(each, end)]

    def signal(self, number: int) -> None:
        """At the first the runs save their checkpoints, the second ends them at once."""
        self._signals += 1
        self._call("cancel", self._signals > 1)

    def kill(self) -> None:
        """Ends what still runs, at once."""
        if self._running:
            with contextlib.suppress(ResourceError, ConfigError):
                self._call("cancel", True)
        self._running.clear()
        self._unseen.clear()

    def close(self) -> None:
        """Leaves the cluster; what this process had started there ends."""
        if self._child is None:
            return
        with contextlib.suppress(OSError):
            self._ours.close()
        try:
            self._child.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None
        self._said.close()

    def _forget(self, each: Ended) -> Ended:
        del self._running[each.name], self._unseen[each.name]
        return each

    def _seen(self, each: Ended, end: float) -> bool:
        """Whether what a run left is seen here, as far as it has to be.

        Raises:
            ResourceError: it ended well, but its report does not come.
        """
        if each.code != 0 or (self._running[each.name].config.parent / each.name / REPORT).is_file():
            return True
        if time.monotonic() > end:
            raise ResourceError(
                f"run {each.name} has ended on its node, but its report is not seen here; is output_dir the same "
                "folder on every machine?"
            )
        return False

    def _begin(self) -> None:
        """Starts the process that knows Ray; it ends when its socket closes, and with this process."""
        ours, theirs = socket.socketpair()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "dude_peft.comparison.ray_client", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                pass_fds=[theirs.fileno()],
                # Where Ray starts a cluster of its own (`local`), it sends nothing to its makers.
                env={"RAY_USAGE_STATS_ENABLED": "0", **os.environ},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._ours = Connection(ours.detach())

    def _call(self, name: str, *arguments: Any, seconds: float = _ANSWER_SECONDS) -> Any:
        """Calls a method of `ray_client.Client`.

        Raises:
            ConfigError, ResourceError: what it raised.
            ResourceError: it has ended, or does not answer.
        """
        try:
            self._ours.send((name, arguments))
            if not self._ours.poll(seconds):
                raise self._gone(f"no answer within {seconds:g} seconds")
            kind, answer = self._ours.recv()
        except (OSError, EOFError) as error:
            if isinstance(error, ResourceError):
                raise
            raise self._gone("its client ended") from error
        if kind == "config":
            raise ConfigError(answer)
        if kind == "resource":
            raise ResourceError(answer)
        return answer

    def _gone(self, what: str) -> ResourceError:
        self._child.kill()  # it may hang
        self._said.seek(0)
        lines = [line for line in self._said.read().decode("utf-8", "replace").splitlines() if line.strip()]
        last = f": {shown(lines[-1].strip(), 200)}" if lines else ""
        return ResourceError(
            f"--address {shown(self._address)}: the Ray cluster is lost ({what}{last}); start it, then run the same "
            "command again, it goes on"
        )
