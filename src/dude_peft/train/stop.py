"""Ctrl-C and SIGTERM: the first ends a run after the step in work and a checkpoint, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dude_peft.errors import StoppedError

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stop:
    """Listens for both signals; only inside `training` is there a step to finish, elsewhere the run ends at once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """`tell` hears that the step in work is being finished."""
        self._tell = tell
        self._signal: int | None = None
        self._training = False
        self._place = "before training began; nothing is lost"

    @property
    def wanted(self) -> bool:
        """Whether the run shall end after this step."""
        return self._signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within: the signals are ours. Outside the main thread, where no handler can be set, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._heard) for number in _NAMES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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
        """Raises StoppedError if a signal came and the step has been finished."""
        if self._signal is not None:
            raise self._error(self._signal)

    def _heard(self, number: int, frame: FrameType | None) -> Any:
        if not self._training or self._signal is not None:
            raise self._error(number)
        self._signal = number
        self._tell(f"{_NAMES[signal.Signals(number)]}: finishing the step and saving; once more ends it at once")

    def _error(self, number: int) -> StoppedError:
        return StoppedError(number, f"stopped by {_NAMES[signal.Signals(number)]} {self._place}")
