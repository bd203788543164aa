"""Runs of `dude compare` for tests: forked from a process that has imported everything, as `served` does.

The comparison's own process is not forked: it has threads by then. A nursery is, before it does anything; it ends with
the comparison, and the runs end with it, as the real ones do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dude_peft.machine.launch import die_with_parent

_Become = Callable[[dict[str, Any]], None]


def found(become: _Become) -> None:
    """Starts the nursery of this process, and lets `dude compare` in it start its runs there.

    Args:
        become: makes a fresh process the command of a request.
    """
    from dude_peft.comparison import by_hand, local

    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        die_with_parent()
        _keep(theirs, become)
        os._exit(0)
    theirs.close()
    asking = ours.makefile("rw")

    def spawn(arguments: list[str], log: Path, environment: dict[str, str]) -> _Process:
        status = tempfile.mktemp(prefix="dude-status-")
        request = {
            "argv": ["dude", *arguments], "script": None, "cwd": os.getcwd(), "out": str(log), "err": str(log),
            "env": environment, "status": status,
        }  # fmt: skip
        asking.write(json.dumps(request) + "\n")
        asking.flush()
        return _Process(int(asking.readline()), Path(status))

    local.spawn = by_hand.spawn = spawn


class _Process:
    """What `subprocess.Popen` is to the engine."""

    returncode: int | None = None

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self._status = pid, status

    def poll(self) -> int | None:
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
            self._status.unlink()
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            signal.sigtimedwait([], 0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _keep(requests: socket.socket, become: _Become) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stream = requests.makefile("rw")
    for line in stream:
        if os.fork() == 0:
            die_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(json.loads(line), stream, become)
            os._exit(0)


def _watch(request: dict[str, Any], answers: Any, become: _Become) -> None:
    """Forks the run, tells its process, and leaves its exit code in a file."""
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        Path(request["out"]).write_bytes(b"")
        become(request)
        sys.exit(0)
    answers.write(f"{pid}\n")
    answers.flush()
    _, status = os.waitpid(pid, 0)
    whole = Path(request["status"] + ".whole")
    whole.write_text(str(os.waitstatus_to_exitcode(status)))
    whole.rename(request["status"])
