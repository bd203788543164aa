"""Files that are whole or absent: written beside, flushed to the disk, renamed, and the rename flushed as well."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dude_peft.errors import BusyError, ConfigError
from dude_peft.show import shown

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


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yields a folder to fill; at the end it becomes `output`, flushed to the disk, and on any error it is gone.

    Whoever looks at `output` sees nothing or everything. A process that was killed leaves a hidden folder beside it,
    which the next one that makes the same output removes.

    Raises:
        ConfigError: `output` is there already.
        BusyError: another process is making it.
        OSError: the disk or a permission does not allow it.
    """
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".dude-{output.name}"
    staging.mkdir(mode=0o700, exist_ok=True)
    if staging.is_symlink():
        raise ConfigError(f"'{staging}' is a link; remove it")
    with locked(staging):
        _empty(staging)
        try:
            yield staging
            for path in sorted(staging.rglob("*"), reverse=True):
                sync(path)
            sync(staging)
            refuse_existing(output)
            staging.chmod(0o777 & ~umask())
            staging.rename(output)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    sync(output.parent)


def refuse_existing(output: Path) -> None:
    """Refuse an output that is there: nothing is ever overwritten.

    Raises:
        ConfigError: it is there.
    """
    if output.is_symlink() or output.exists():
        raise ConfigError(f"output {shown(output, 300)} is there already; choose another folder, or remove it first")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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
