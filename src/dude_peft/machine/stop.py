"""Ctrl-C and SIGTERM: the first ends a run after the step in work and a checkpoint, the second ends it at once.

Of several processes none may leave alone, since the others would wait for it: there the first signal always waits for a
place where all of them ask each other.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dude_peft.errors import StoppedError
from dude_peft.machine.processes import count, gathered

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within: both signals go to `handler`. Outside the main thread, where none can be set, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _NAMES}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Stop:
    """Listens for both signals; only inside `training` is there a step to finish, elsewhere a process ends at once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """`tell` hears that the step in work is being finished."""
        self._tell = tell
        self._signal: int | None = None
        self._raised: StoppedError | None = None
        self._training = False
        self._place = "before training began; nothing is lost"

    def wanted(self) -> bool:
        """Whether any process has been told to end; every process has to ask."""
        heard = [number for number in gathered(self._signal) if number is not None]
        if heard and self._signal is None:
            self._signal = heard[0]
        return bool(heard)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within: the signals are ours. Outside the main thread, where no handler can be set, nothing changes.

        Raises:
            StoppedError: also where a library has caught it, raised somewhere within, and made an error of its own.
        """
        with handled_by(self._heard):
            try:
                yield
            except Exception as error:
                if self._raised is not None and not isinstance(error, StoppedError):
                    raise self._raised from error
                raise

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within: the first signal waits for the end of the step."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def after(self, place: str) -> None:
        """What a stop means from here on, for its message."""
        self._place = place

    def raise_if_wanted(self) -> None:
        """Raises StoppedError, in all processes, where one of them has been told to end; every process has to ask."""
        if self.wanted() and self._signal is not None:
            raise self._error(self._signal)

    def _heard(self, number: int, frame: FrameType | None) -> Any:
        alone = not self._training and count() == 1
        if alone or self._signal is not None:
            self._signal = number  # kept: a library may swallow what is raised here
            self._raised = self._error(number)
            raise self._raised
        self._signal = number
        what = "finishing the step and saving a checkpoint" if self._training else "ending"
        self._tell(f"{_NAMES[signal.Signals(number)]}: {what}; repeat it to stop at once")

    def _error(self, number: int) -> StoppedError:
        return StoppedError(number, f"stopped by {_NAMES[signal.Signals(number)]} {self._place}")
