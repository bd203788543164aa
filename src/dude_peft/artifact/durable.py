"""Files that are whole or absent: written beside, flushed to the disk, renamed, and the rename flushed as well."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dude_peft.errors import BusyError, ConfigError, DudeError, ResourceError
from dude_peft.show import shown

try:
    import fcntl
except ImportError:  # Windows has none; nothing is locked there
    fcntl = None  # type: ignore[assignment]

_SPARE_BYTES = 16 << 20


def replace_file(path: Path, data: bytes | Iterable[bytes | memoryview], *, new: bool = False) -> None:
    """Writes `path` whole: a reader sees the old file or the new one, never a part, also after a power cut.

    A symbolic link at `path` is replaced, never written through. Data may come in pieces, for files larger than memory.
    With `new`, nothing is replaced: what another process made there meanwhile stays.

    Raises:
        OSError: the disk or a permission does not allow it; the old file stays, nothing is left beside it.
        FileExistsError: there is one, and `new` wants none.
    """
    temporary = hidden_name(path.parent)
    try:
        # "x" makes a new file, with the permissions that files usually get here; it follows no link.
        with open(temporary, "xb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        if new:
            _link(temporary, path)
            temporary.unlink(missing_ok=True)
        else:
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Gives a file its name, which nobody else has yet."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, as those of memory cards
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def hidden_name(folder: Path) -> Path:
    """A name in a folder that no other process takes, for what is renamed when it is whole.

    Python's tempfile makes private files. Giving them the usual permissions needs the process's umask, which can only
    be read by changing it, under the feet of other threads.
    """
    return folder / f".dude-{secrets.token_hex(8)}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within: no other process that asks for the same folder gets it. A killed process holds nothing.

    Raises:
        BusyError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not take(descriptor):
            raise BusyError(f"'{folder}' is being written by another process; wait for it to end")
        yield
    finally:
        os.close(descriptor)


def take(descriptor: int) -> bool:
    """Locks an open file or folder for this process alone, until it is closed; False if another process has it."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Yields an empty hidden folder beside an output that is to come; whatever is left of it at the end is removed.

    A process that was killed leaves it there, and the next one that makes the same output empties it.

    Raises:
        ConfigError: `output` is there already.
        BusyError: another process is making it.
        OSError: the disk or a permission does not allow it.
    """
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".dude-{output.name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink():
        raise ConfigError(f"{shown(folder, 300)} is a link; remove it")
    with locked(folder):
        refuse_existing(output)  # who waited for the folder may find it renamed
        _empty(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yields a folder to fill; at the end it becomes `output`, flushed to the disk, and on any error it is gone.

    Whoever looks at `output` sees nothing or everything. Raises what `staging` does.
    """
    with staging(output) as folder:
        yield folder
        for path in sorted(folder.rglob("*"), reverse=True):
            sync(path)
        sync(folder)
        refuse_existing(output)
        folder.chmod(_usual_permissions(folder))
        folder.rename(output)
    sync(output.parent)


def refuse_existing(output: Path) -> None:
    """Refuse an output that is there: nothing is ever overwritten.

    Raises:
        ConfigError: it is there.
    """
    if output.is_symlink() or output.exists():
        raise ConfigError(f"output {shown(output, 300)} already exists; choose another folder, or remove it first")


def check_space(folder: Path, size: int, named: Path) -> None:
    """Refuse work whose result the disk cannot hold.

    Args:
        folder: on the disk in question.
        size: bytes that will lie there at most.
        named: the output as the user knows it.

    Raises:
        ResourceError: there is less free space.
    """
    wanted, free = size + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < wanted:
        raise ResourceError(
            f"{shown(named, 300)}: {wanted / 2**20:,.0f} MiB are needed, but only {free / 2**20:,.0f} are free; free "
            "some space or choose another folder"
        )


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Within: what the disk or a permission does not allow is a ResourceError that names the output."""
    try:
        yield
    except DudeError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors' writer has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or shown(error)
        raise ResourceError(
            f"output {shown(output, 300)} cannot be written ({reason}); free some space or choose another folder"
        ) from error


@contextmanager
def output_dir_errors(folder: Path) -> Iterator[None]:
    """Within: what keeps a run or a comparison from taking its folder is one line that names it."""
    name = shown(folder, 300)
    try:
        yield
    except DudeError:
        raise
    except NotADirectoryError as error:
        raise ConfigError(f"output_dir: {name} is inside a file; choose another folder") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or shown(error)
        raise ResourceError(f"output_dir: {name} cannot be written ({reason}); choose another folder") from error


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


def _usual_permissions(folder: Path) -> int:
    """Those that a new folder gets in this one, found by making one."""
    made = hidden_name(folder)
    made.mkdir()
    try:
        return stat.S_IMODE(made.stat().st_mode)
    finally:
        made.rmdir()
