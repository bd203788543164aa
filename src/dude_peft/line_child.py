"""A process of its own for foreign programs: it gets lines and answers with lines, and can be ended at any time."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import IO

import psutil

_PROGRAM = "import sys; sys.path[:] = {path!r}; from {module} import main; main()"
_ENDING_SECONDS = 5.0


class LineChild:
    """A running child. It sees the parent's end on its standard input."""

    def __init__(self, module: str) -> None:
        """Starts `main` of a module.

        Raises:
            OSError: no process can be started.
        """
        # Its own session: Ctrl-C is for the parent.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(path=sys.path, module=module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=_copy, args=(self.process.stdout, self._lines), daemon=True).start()

    @property
    def lives(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def write(self, line: bytes) -> None:
        """Sends a line. Raises OSError where the process has ended."""
        pipe = self.process.stdin
        assert pipe is not None
        pipe.write(line)
        pipe.flush()

    def line(self, seconds: float) -> bytes:
        """The next line of what it answers.

        Raises:
            queue.Empty: none came within `seconds`.
            BrokenPipeError: the process ended.
        """
        line = self._lines.get(timeout=max(seconds, 0.001))
        if not line:
            raise BrokenPipeError("the process ended")
        return line

    def processor_seconds(self) -> float:
        """What it has computed so far, however long that took on a busy machine; 0 once it has ended."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def ending(self) -> str:
        """How it ended, once it answers no more: `status 3`, `signal SIGSEGV`."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # it lives, and has closed its end
            self.process.wait(_ENDING_SECONDS)
        self.stop()
        code = self.process.returncode
        if code >= 0:
            return f"status {code}"
        known = {each.value: each.name for each in signal.Signals}
        return f"signal {known.get(-code, -code)}"

    def stop(self) -> None:
        """Ends it, whatever it does, and all that it has started."""
        if self.process.poll() is None and hasattr(os, "killpg"):
            with contextlib.suppress(OSError):  # it has just ended
                os.killpg(self.process.pid, signal.SIGKILL)  # of its own session, above
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # what was not sent any more
            self.process.stdin.close()  # type: ignore[union-attr]


def _copy(stream: IO[bytes], lines: queue.Queue[bytes]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(b"")
