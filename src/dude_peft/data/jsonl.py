"""Our own strict reader of local JSON files: each fault has its line, memory stays bounded, nothing is guessed.

datasets' reader names a position inside a block, turns missing columns into null and mixes types silently. This one
reads byte lines, decodes them strictly as UTF-8 (a BOM and CRLF are fine), and goes on after a bad line to report all.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import BufferedReader
from pathlib import Path
from typing import Any

from dude_peft.data.bad_rows import BadRows
from dude_peft.data.formats import Row, parse_row
from dude_peft.errors import DataError, DudeError, ResourceError
from dude_peft.show import quoted, shown

MAX_LINE_BYTES = 16 * 2**20
MAX_ARRAY_BYTES = 256 * 2**20

_BOM = b"\xef\xbb\xbf"
_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed; decompress it first (gunzip)"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; decompress it first"),
    (b"\xfd7zXZ", "xz-compressed; decompress it first"),
    (b"BZh", "bzip2-compressed; decompress it first"),
    (b"PAR1", "a Parquet file; export it as JSON lines"),
    (b"\xff\xfe", "UTF-16 (byte offset 0); save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 (byte offset 0); save it as UTF-8"),
)


class _JsonError(ValueError):
    """Valid for Python's json module, not for us: duplicate keys, NaN."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _JsonError(f"the key {quoted(key)} appears twice in one object; keep one")
            seen.add(key)
    return result


def _constant(name: str) -> None:
    raise _JsonError(f"{name} is not JSON; write null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[BufferedReader, str]]:
    """The open file and its printable name; errors of the system, then or later, become ours."""
    name = shown(os.fspath(path), limit=None)
    target = Path(os.path.expanduser(path))
    try:
        try:
            opened = open(target, "rb")  # noqa: SIM115 - the next line closes it
        except ValueError as error:  # a NUL character or half a surrogate pair in the path
            raise DataError(f"{name}: not a usable path ({shown(error)}); check its spelling") from error
        with opened as stream:
            yield stream, name
    except DudeError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file{_closest(target)}") from error
    except IsADirectoryError as error:
        raise DataError(f"{name}: is a folder; name the .jsonl file in it") from error
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


def _refuse_magic(head: bytes, name: str) -> None:
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"{name}: is {what}")


def _decode(raw: bytes, line: int, offset: int, name: str) -> str:
    """UTF-8 text of bytes that begin at byte `offset` of the file, on line `line`."""
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


def _lines(stream: BufferedReader, name: str) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, bytes of the line with its end); never more than one line in memory."""
    number = offset = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            limit = MAX_LINE_BYTES // 2**20
            raise DataError(f"{name}:{number}: the line is longer than {limit} MiB; one row belongs on one line")
        start = offset
        offset += len(raw)
        if number == 1 and raw.startswith(_BOM):
            start, raw = len(_BOM), raw[len(_BOM) :]
        yield number, start, raw


def _json_fault(error: ValueError | RecursionError, text: str, where: str, *, cut_off: bool) -> DataError:
    """The DataError for what json raised on one line; `cut_off`: the file ends without a line end here."""
    if isinstance(error, json.JSONDecodeError):
        place = f"{where}:{error.colno}"
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            if cut_off:
                return DataError(f"{place}: the file's last line is cut off ({error.msg}); write it again or remove it")
            return DataError(f"{place}: the line ends inside a value ({error.msg}); write each row on one line")
        return DataError(f"{place}: malformed JSON ({error.msg}); repair the line")
    if isinstance(error, _JsonError):
        return DataError(f"{where}: {error}")
    if isinstance(error, RecursionError):
        return DataError(f"{where}: nested too deep; write a flat object")
    return DataError(f"{where}: a number is too long to read; write it as text")


def _check_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: the row is {kind}, not an object; write {{...}} with the columns as keys")
    return value


def _refuse_other_formats(text: str, name: str, line: int) -> None:
    """A first line that shows that the whole file is something else."""
    first = text.lstrip()[:1]
    if first == "[":
        raise DataError(
            f"{name}:{line}: begins a JSON array, not JSON lines; one object a line, or name the file .json"
        )
    if first != "{" and any(mark in text for mark in ",;\t"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f"{name}:{line}: looks like CSV, not JSON lines; convert it to one object a line") from None


def _parse_line(raw: bytes, line: int, offset: int, name: str) -> Row:
    where = f"{name}:{line}"
    text = _decode(raw, line, offset, name).rstrip("\r\n")  # else a fault at the end is on json's "line 2"
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _json_fault(error, text, where, cut_off=not raw.endswith(b"\n")) from error
    return parse_row(_check_object(value, where), where)


def read_jsonl(path: str | os.PathLike[str], *, limit: int | None = None) -> list[Row]:
    """The rows of a JSON-lines file in order, at most `limit`; blank lines are skipped.

    Raises DataError naming file:line of the first bad line and the numbers of up to 20 more, or saying that the file is
    missing, empty or in another format; ResourceError where it cannot be read.
    """
    rows: list[Row] = []
    bad = BadRows("lines")
    begun = False
    with _opened(path) as (stream, name):
        _refuse_magic(stream.peek(8), name)
        for line, offset, raw in _lines(stream, name):
            if not raw.strip():
                continue
            if not begun:
                begun = True
                if b"\0" not in raw:  # UTF-16 and binary files are named as such below
                    _refuse_other_formats(raw.decode("utf-8", "replace"), name, line)
            try:
                rows.append(_parse_line(raw, line, offset, name))
            except DataError as error:
                bad.add(line, error)
            if limit is not None and len(rows) >= limit:
                break
    bad.raise_if_any()
    if not rows:
        raise DataError(f"{name}: no rows (the file is empty or has only blank lines); write one object a line")
    return rows


_SPACE = re.compile(r"[ \t\r\n]*")


def read_json(path: str | os.PathLike[str], *, limit: int | None = None) -> list[Row]:
    """The rows of a .json file: one array of objects, or JSON lines under that name; a row's source is its first line.

    Raises as read_jsonl; an array that cannot be parsed is reported at its first fault.
    """
    with _opened(path) as (stream, name):
        head = stream.peek(8)
        _refuse_magic(head, name)
        if not head.removeprefix(_BOM).lstrip().startswith(b"["):
            return read_jsonl(path, limit=limit)
        raw = stream.read(MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        raise DataError(f"{name}: an array of more than {MAX_ARRAY_BYTES // 2**20} MiB; write it as .jsonl")
    skipped = len(_BOM) if raw.startswith(_BOM) else 0
    text = _decode(raw[skipped:], 1, skipped, name)
    rows: list[Row] = []
    bad = BadRows("rows at lines")
    for line, value in _array(text, name):
        where = f"{name}:{line}"
        try:
            rows.append(parse_row(_check_object(value, where), where))
        except DataError as error:
            bad.add(line, error)
        if limit is not None and len(rows) >= limit:
            break
    bad.raise_if_any()
    if not rows:
        raise DataError(f"{name}: no rows (the array is empty); write one object a row")
    return rows


def _array(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """(line on which it begins, value) of each element, decoded one at a time so that each has its line."""
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    counted = at

    def skip(position: int) -> int:
        match = _SPACE.match(text, position)
        return match.end() if match else position

    at = skip(at)
    if text[at : at + 1] == "]":
        at += 1
    else:
        while True:
            line += text.count("\n", counted, at)
            counted = at
            try:
                value, at = _DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{name}:{error.lineno}:{error.colno}: malformed JSON ({error.msg}); repair the array"
                ) from error
            except (ValueError, RecursionError) as error:
                raise _json_fault(error, text, f"{name}:{line}", cut_off=False) from error
            yield line, value
            at = skip(at)
            mark = text[at : at + 1]
            at += 1
            if mark == "]":
                break
            if mark != ",":
                raise _array_fault(text, at - 1, "Expecting ',' or ']'", name)
            at = skip(at)
    at = skip(at)
    if at < len(text):
        raise _array_fault(text, at, "text after the array", name)


def _array_fault(text: str, at: int, what: str, name: str) -> DataError:
    line = 1 + text.count("\n", 0, at)
    column = at - text.rfind("\n", 0, at)
    return DataError(f"{name}:{line}:{column}: malformed JSON ({what}); repair the array")
