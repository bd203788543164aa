"""Tables of text, .csv and .tsv, read strictly: the first line names the columns, each fault has its line.

Quoting is RFC 4180's: a cell may be "quoted", with "" for a quote, and then hold separators and line breaks. An empty
cell is a missing value. All cells are text.
"""

import csv
import os
from collections.abc import Iterator
from functools import partial

from dude_peft.data.bad_rows import good_rows
from dude_peft.data.file_lines import MAX_LINE_BYTES, decode, lines, opened, refuse_magic
from dude_peft.data.formats import Reading, Row
from dude_peft.errors import DataError
from dude_peft.show import quoted

_READING = Reading()


def table_rows(
    path: str | os.PathLike[str], limit: int | None = None, reading: Reading = _READING, *, separator: str
) -> Iterator[Row]:
    """The rows of a table whose cells stand between `separator`; a row's source is the line on which it begins.

    Raises DataError for a header that names no known columns, or one twice, for ragged rows and broken quotes, with the
    first fault's file:line and the lines of up to 20 more; ResourceError where the file cannot be read.
    """
    with opened(path) as (stream, name):
        refuse_magic(stream.peek(8), name)
        records = _records((decode(raw, line, at, name) for line, at, raw in lines(stream, name)), separator, name)
        header_line, header = next(records, (0, []))
        if not header:
            raise DataError(f"{name}: no rows (the file is empty); the first line names the columns")
        _check_header(header, f"{name}:{header_line}", separator, reading)
        attempts = ((line, partial(_row, header, cells, f"{name}:{line}", reading)) for line, cells in records)
        empty = f"{name}: no rows below the column names; write one row a line"
        yield from good_rows(attempts, unit="lines", limit=limit, empty=empty)


def _row(header: list[str], cells: list[str], where: str, reading: Reading) -> Row:
    if len(cells) != len(header):
        raise DataError(
            f"{where}: {len(cells)} cells, but the first line names {len(header)} columns; quote cells that hold a "
            "separator or a quote"
        )
    return reading.row({key: cell or None for key, cell in zip(header, cells, strict=True)}, where)


def _records(text: Iterator[str], separator: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of each record that is not blank."""
    # The module's limit on a cell, which bounds the memory of a quote that is never closed, belongs to the process.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader(text, delimiter=separator, strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{name}:{begin}: {_fault(str(error))}") from error
        if cells:
            yield begin, cells


def _fault(reason: str) -> str:
    if "unexpected end" in reason or "larger than" in reason:
        return "a quote that begins in this row is never closed; close it, or double each quote inside a cell"
    return f"broken quoting ({reason}); quote the whole cell and double each quote inside it"


def _check_header(header: list[str], where: str, separator: str, reading: Reading) -> None:
    twice = next((key for i, key in enumerate(header) if key in header[:i]), None)
    if twice is not None:
        raise DataError(f"{where}: the column {quoted(twice)} is named twice; keep one")
    other = next((mark for mark in ",;\t" if mark != separator and mark in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(f"{where}: the cells stand between {quoted(other)}, not {quoted(separator)}; convert the file")
    reading.check_columns(header, f"{where}: the first line names the columns, and")
