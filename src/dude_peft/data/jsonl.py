"""Our own strict reader of local JSON files: each fault has its line, memory stays bounded, nothing is guessed.

datasets' reader names a position inside a block, turns missing columns into null and mixes types silently. This one
reads byte lines, decodes them strictly as UTF-8 (a BOM and CRLF are fine), and goes on after a bad line to report all.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from io import BufferedReader
from typing import Any

from dude_peft.data.bad_rows import good_rows
from dude_peft.data.file_lines import BOM, decode, lines, opened, refuse_magic
from dude_peft.data.formats import Reading, Row
from dude_peft.data.strict_json import DECODER
from dude_peft.doors import JsonError
from dude_peft.errors import DataError

MAX_ARRAY_BYTES = 256 * 2**20

_READING = Reading()


def _json_fault(error: ValueError | RecursionError, text: str, where: str, *, cut_off: bool) -> DataError:
    """The DataError for what json raised on one line; `cut_off`: the file ends without a line end here."""
    if isinstance(error, json.JSONDecodeError):
        place = f"{where}:{error.colno}"
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            if cut_off:
                return DataError(
                    f"{place}: the last line of the file is cut off ({error.msg}); write it again or remove it"
                )
            return DataError(f"{place}: the line ends inside a value ({error.msg}); write each row on one line")
        return DataError(f"{place}: malformed JSON ({error.msg}); repair the line")
    if isinstance(error, JsonError):
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
            f"{name}:{line}: a JSON array begins here, not JSON lines; write one object per line, or name the file "
            ".json"
        )
    if first != "{" and any(mark in text for mark in ",;\t"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(
                f"{name}:{line}: looks like CSV, not JSON lines; convert it to one object per line"
            ) from None


def _parse_line(raw: bytes, line: int, offset: int, name: str, reading: Reading) -> Row:
    where = f"{name}:{line}"
    text = decode(raw, line, offset, name).rstrip("\r\n")  # else a fault at the end is on json's "line 2"
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _json_fault(error, text, where, cut_off=not raw.endswith(b"\n")) from error
    return _parse_value(value, where, reading)


def jsonl_rows(path: str | os.PathLike[str], limit: int | None = None, reading: Reading = _READING) -> Iterator[Row]:
    """The rows of a JSON-lines file in order, at most `limit`, one at a time; blank lines are skipped.

    Raises DataError naming file:line of the first bad line and the numbers of up to 20 more, or saying that the file is
    missing, empty or in another format; ResourceError where it cannot be read.
    """
    with opened(path) as (stream, name):
        refuse_magic(stream.peek(8), name)
        empty = f"{name}: no rows (the file is empty or has only blank lines); write one object per line"
        yield from good_rows(_line_attempts(stream, name, reading), unit="lines", limit=limit, empty=empty)


def _line_attempts(stream: BufferedReader, name: str, reading: Reading) -> Iterator[tuple[int, Callable[[], Row]]]:
    begun = False
    for line, offset, raw in lines(stream, name):
        if not raw.strip():
            continue
        if not begun:
            begun = True
            if b"\0" not in raw:  # UTF-16 and binary files are named as such below
                _refuse_other_formats(raw.decode("utf-8", "replace"), name, line)
        yield line, partial(_parse_line, raw, line, offset, name, reading)


_SPACE = re.compile(r"[ \t\r\n]*")


def json_rows(path: str | os.PathLike[str], limit: int | None = None, reading: Reading = _READING) -> Iterator[Row]:
    """The rows of a .json file: one array of objects, or JSON lines under that name.

    A row's source is the line on which it begins; its number in the array, from 1, where others share that line.

    Raises as jsonl_rows; an array that cannot be parsed is reported at its first fault.
    """
    with opened(path) as (stream, name):
        head = stream.peek(8)
        refuse_magic(head, name)
        is_array = head.removeprefix(BOM).lstrip().startswith(b"[")
        raw = stream.read(MAX_ARRAY_BYTES + 1) if is_array else b""
    if not is_array:
        yield from jsonl_rows(path, limit, reading)
        return
    if len(raw) > MAX_ARRAY_BYTES:
        raise DataError(f"{name}: an array of more than {MAX_ARRAY_BYTES // 2**20} MiB; write it as .jsonl")
    skipped = len(BOM) if raw.startswith(BOM) else 0
    text = decode(raw[skipped:], 1, skipped, name)
    elements = _array(text, name)
    attempts = ((place, partial(_parse_value, value, where, reading)) for place, where, value in elements)
    empty = f"{name}: no rows (the array is empty); write one object per row"
    yield from good_rows(attempts, unit="rows at lines", limit=limit, empty=empty)


def _parse_value(value: Any, where: str, reading: Reading) -> Row:
    return reading.row(_check_object(value, where), where)


def _array(text: str, name: str) -> Iterator[tuple[int, str, Any]]:
    """(line or number, place in words, value) of each element, decoded one at a time so that each has its place."""
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    counted = at
    number, alone = 0, True

    def skip(position: int) -> int:
        match = _SPACE.match(text, position)
        return match.end() if match else position

    at = skip(at)
    if text[at : at + 1] == "]":
        at += 1
    else:
        while True:
            number += 1
            line += text.count("\n", counted, at)
            counted = at
            try:
                value, end = DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise _array_fault(text, error.pos, error.msg, name, number) from error
            except (ValueError, RecursionError) as error:
                raise _json_fault(error, text, _place(name, line, number, alone), cut_off=False) from error
            at = skip(end)
            mark = text[at : at + 1]
            following = skip(at + 1)
            # Alone on its line: a line end parts it from the elements before and behind it.
            ends_line = mark == "]" or "\n" in text[end:following]
            place = line if alone and ends_line else number
            yield place, _place(name, line, number, alone and ends_line), value
            if mark not in ("]", ","):
                raise _array_fault(text, at, "Expecting ',' or ']'", name, number)
            alone = "\n" in text[end:following]
            at = following if mark == "," else at + 1
            if mark == "]":
                break
    at = skip(at)
    if at < len(text):
        raise _array_fault(text, at, "text after the array", name)


def _place(name: str, line: int, number: int, alone: bool) -> str:
    return f"{name}:{line}" if alone else f"{name}: element {number}"


def _array_fault(text: str, at: int, what: str, name: str, number: int | None = None) -> DataError:
    line = 1 + text.count("\n", 0, at)
    column = at - text.rfind("\n", 0, at)
    element = "" if number is None else f" in element {number}"
    return DataError(f"{name}:{line}:{column}: malformed JSON ({what}){element}; repair the array")
