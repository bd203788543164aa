"""One run in a folder: a lock that a killed process does not keep, with the name of who has it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dude_peft.artifact.durable import take
from dude_peft.doors import open_file
from dude_peft.errors import BusyError, ConfigError, ResourceError
from dude_peft.show import shown

NAME = ".dude-lock"
_OWNER_BYTES = 300
_PATIENCE_SECONDS = 1.0


def lock_text(folder: Path) -> str | None:
    """What the lock file of a folder says, whoever has it; None where there is none."""
    try:
        with open_file(folder / NAME) as file:
            return file.read(_OWNER_BYTES).decode("utf-8", "replace")
    except OSError:
        return None


def is_locked(folder: Path) -> bool:
    """Whether a process, on this machine or another one, has the lock of a folder.

    Raises:
        OSError: the lock file cannot be opened.
    """
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return False
    try:
        return not take(descriptor)
    finally:
        os.close(descriptor)


class RunLock:
    """The lock file of a run's folder; held from the constructor to `release`.

    Not the library filelock's, which does not tell who has the lock.
    """

    def __init__(self, folder: Path, key: str = "output_dir") -> None:
        """Takes the lock.

        Args:
            folder: that is there.
            key: what names it in a configuration, for the message.

        Raises:
            BusyError: another process has it; the message names process and host.
            OSError: the file cannot be made.
        """
        self._path = folder / NAME
        while True:
            # O_NOFOLLOW: a planted link is an error, never written through.
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            self._descriptor = os.open(self._path, flags, 0o666)
            if not take(self._descriptor):
                owner = self._owner()
                os.close(self._descriptor)
                raise BusyError(
                    f"{key}: {shown(folder, 300)} is in use by {owner}; wait for it to end, or choose another folder"
                )
            if self._is_at_path():
                break
            os.close(self._descriptor)  # its owner removed it in between: the lock is that of a name nobody sees
        try:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Gives the lock back and removes its file."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)

    def _is_at_path(self) -> bool:
        try:
            there, ours = os.stat(self._path, follow_symlinks=False), os.fstat(self._descriptor)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _owner(self) -> str:
        """Who has it; whoever has just taken it needs a moment to write its name."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            name = os.pread(self._descriptor, _OWNER_BYTES, 0).decode("utf-8", "replace")
            if name or time.monotonic() > end:
                return shown(name) or "another process"
            time.sleep(0.02)


@contextlib.contextmanager
def locked_folder(path: str, key: str) -> Iterator[None]:
    """Within: no other run has the folder of a configuration's key, which is made where it is not there.

    Raises:
        BusyError: another process has it.
        ConfigError: it is a file.
        ResourceError: it cannot be made or written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{key}: {shown(folder, 300)} is a file; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder, key)
    except OSError as error:
        raise ResourceError(
            f"{key}: {shown(folder, 300)} cannot be written ({error.strerror}); choose another"
        ) from error
    try:
        yield
    finally:
        lock.release()
