"""Parquet files, a few hundred rows at a time; a row's source is its number, from 1."""

import os
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from typing import Any

from dude_peft.data.bad_rows import good_rows
from dude_peft.data.file_lines import opened
from dude_peft.data.formats import Reading, Row
from dude_peft.errors import DataError
from dude_peft.show import shown

_BATCH_ROWS = 256
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
            f"{name}: Parquet files need the pyarrow package: pip install 'dude-peft[train]', or write it as .jsonl"
        ) from error
    try:
        file = parquet.ParquetFile(stream)
        names, known = file.schema_arrow.names, reading.columns.known()
        reading.check_columns(names, f"{name}:")
        columns = [column for column in names if column in known]
        unread = tuple(shown(column, 60) for column in names if column not in known)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
            yield from ((record, unread) for record in batch.to_pylist())
    except (ArrowException, UnicodeDecodeError) as error:
        reason = shown(str(error).strip().partition("\n")[0], 120)
        raise DataError(f"{name}: is no readable Parquet file ({reason}); write it again") from error
