"""Parquet files, a few hundred rows at a time; a row's source is its number, from 1."""

import os
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from typing import Any

from dude_peft.data.bad_rows import good_rows
from dude_peft.data.columns import told
from dude_peft.data.file_lines import MAX_LINE_BYTES, opened
from dude_peft.data.formats import Reading, Row
from dude_peft.errors import DataError
from dude_peft.installing import install
from dude_peft.show import quoted, shown

_BATCH_ROWS = 256
# Of columns in memory at a time: a cell may be as large as its whole column, where the file says it once for all rows.
_BATCH_BYTES = 2**30
_READING = Reading()


def parquet_rows(path: str | os.PathLike[str], limit: int | None = None, reading: Reading = _READING) -> Iterator[Row]:
    """The rows of a Parquet file; of columns that no row can be made of only the names are read.

    Raises DataError for a damaged file, columns of no known shape and bad rows (the first in full, the numbers of up to
    20 more); ResourceError where the file cannot be read.
    """
    with opened(path) as (stream, name):
        records = enumerate(_records(stream, name, reading), start=1)
        attempts = (
            (number, partial(reading.row, record, f"{name}:{number}", unread)) for number, (record, unread) in records
        )
        yield from good_rows(attempts, unit="rows", limit=limit, empty=f"{name}: no rows; choose another file")


def _records(stream: BufferedReader, name: str, reading: Reading) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Each record, and the names of the columns that are not read."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"{name}: Parquet files need the pyarrow package: {install('pyarrow')}, or write it as .jsonl"
        ) from error
    try:
        file = parquet.ParquetFile(stream)
        names, known = file.schema_arrow.names, reading.columns.known()
        if (twice := next((key for i, key in enumerate(names) if key in names[:i]), None)) is not None:
            raise DataError(f"{name}: the column {quoted(twice)} is there twice; keep one")
        reading.check_columns(names, f"{name}:")
        columns = [column for column in names if column in known]
        unread = tuple(told(column) for column in names if column not in known)
        first = 1
        for group in range(file.num_row_groups):
            rows = _rows_at_once(file.metadata.row_group(group), columns, f"{name}:{first}")
            for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                if batch.nbytes > MAX_LINE_BYTES:
                    large = (number for number in range(len(batch)) if batch.slice(number, 1).nbytes > MAX_LINE_BYTES)
                    if (number := next(large, None)) is not None:
                        raise _too_large(f"{name}:{first + number}")
                first += len(batch)
                yield from ((record, unread) for record in batch.to_pylist())
    except DataError:
        raise
    except (ArrowException, ValueError) as error:  # pyarrow's own, and those of what becomes no Python value
        reason = shown(str(error).strip().partition("\n")[0], 120)
        raise DataError(f"{name}: is not a readable Parquet file ({reason}); write it again") from error


def _rows_at_once(group: Any, columns: list[str], where: str) -> int:
    """How many rows of a group can be in memory; refuses one whose rows cannot all be as short as rows may be."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
    sizes: list[int] = [chunk.total_uncompressed_size for chunk in wanted]
    if sum(sizes) > MAX_LINE_BYTES * max(1, group.num_rows):
        raise _too_large(where)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, *sizes)))


def _too_large(where: str) -> DataError:
    return DataError(f"{where}: the row is larger than {MAX_LINE_BYTES // 2**20} MiB; cut it into several")
