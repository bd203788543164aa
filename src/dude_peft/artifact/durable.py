"""Files that are whole or absent: written beside, flushed to the disk, renamed, and the rename flushed as well."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


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
