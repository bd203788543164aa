"""The bytes of a local text file: opened, decoded strictly and cut into lines, each fault with its place.

Lines are read as bytes and decoded strictly as UTF-8 (a BOM and CRLF are fine); never more than one is in memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import BufferedReader
from pathlib import Path

from dude_peft.doors import NoFileError, open_file
from dude_peft.errors import DataError, DudeError, ResourceError
from dude_peft.show import quoted, shown

MAX_LINE_BYTES = 16 * 2**20

BOM = b"\xef\xbb\xbf"
_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed; decompress it first (gunzip)"),
    (b"PK\x03\x04", "a zip archive; unpack it first, or save the sheet of an Excel file as .csv"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; decompress it first"),
    (b"\xfd7zXZ", "xz-compressed; decompress it first"),
    (b"BZh", "bzip2-compressed; decompress it first"),
    (b"PAR1", "a Parquet file; name it .parquet"),
    (b"\xff\xfe", "UTF-16 (byte offset 0); save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 (byte offset 0); save it as UTF-8"),
)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[BufferedReader, str]]:
    """The open file and its printable name; errors of the system, then or later, become ours.

    Raises DataError for a path that is missing, no regular file or unusable; ResourceError where it cannot be read.
    """
    name = shown(os.fspath(path), limit=None)
    target = Path(os.path.expanduser(path))
    try:
        try:
            opened = open_file(target)
        except ValueError as error:  # a NUL character or half a surrogate pair in the path
            raise DataError(f"{name}: not a usable path ({shown(error)}); check its spelling") from error
        with opened as stream:
            yield stream, name
    except DudeError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file{_closest(target)}") from error
    except NoFileError as error:
        raise DataError(f"{name}: {error.strerror}; write the rows into a regular file") from error
    except IsADirectoryError as error:
        raise DataError(f"{name}: is a folder; give the data file in it") from error
    except OSError as error:
        reason = shown(error.strerror or error)
        raise ResourceError(
            f"{name}: cannot be read ({reason}); check the path, its permissions and the disk"
        ) from error


def _closest(target: Path) -> str:
    try:
        names = [entry.name for entry in os.scandir(target.parent)]
    except OSError:
        return f"; its folder {quoted(target.parent, 200)} is missing too: check the path"
    close = get_close_matches(target.name, names, n=1, cutoff=0.5)
    return f"; did you mean {quoted(target.parent / close[0], 200)}?" if close else "; check the path"


def refuse_magic(head: bytes, name: str) -> None:
    """Raises DataError where the first bytes are those of a compressed, binary or UTF-16 file."""
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"{name}: is {what}")


def decode(raw: bytes, line: int, offset: int, name: str) -> str:
    """UTF-8 text of bytes that begin at byte `offset` of the file, on line `line`; DataError where they are not."""
    nul = raw.find(b"\0")
    if nul >= 0:
        line += raw.count(b"\n", 0, nul)
        raise DataError(
            f"{name}:{line}: NUL byte at byte offset {offset + nul} (UTF-16, or not text?); save the file as UTF-8"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{name}:{line}: byte 0x{raw[error.start]:02X} at byte offset {offset + error.start} is not UTF-8 "
            "(Latin-1?); save the file as UTF-8"
        ) from error


def lines(stream: BufferedReader, name: str) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, bytes of the line with its end); never more than one line in memory."""
    number = offset = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            limit = MAX_LINE_BYTES // 2**20
            raise DataError(f"{name}:{number}: the line is longer than {limit} MiB; write each row on its own line")
        start = offset
        offset += len(raw)
        if number == 1 and raw.startswith(BOM):
            start, raw = len(BOM), raw[len(BOM) :]
        yield number, start, raw
