"""Files that are whole or absent: written beside, flushed to the disk, renamed, and the rename flushed as well."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dude_peft.errors import BusyError

try:
    import fcntl
except ImportError:  # Windows has none; nothing is locked there
    fcntl = None  # type: ignore[assignment]


def replace_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Writes `path` whole: a reader sees the old file or the new one, never a part, also after a power cut.

    A symbolic link at `path` is replaced, never written through. Data may come in pieces, for files larger than memory.

    Raises:
        OSError: the disk or a permission does not allow it; the old file stays, nothing is left beside it.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".dude-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within: no other process that asks for the same folder gets it. A killed process holds nothing.

    Raises:
        BusyError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(f"'{folder}' is being written by another process; wait for it to end") from error
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    """The process's mask of permissions; temporary files are made private and get the usual ones at the end."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
