"""Parquet files, a few hundred rows at a time; a row's source is its number, from 1."""

import os
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from typing import Any

from dude_peft.data.bad_rows import good_rows
from dude_peft.data.file_lines import opened
from dude_peft.data.formats import Row, check_columns, known_columns, parse_row
from dude_peft.errors import DataError
from dude_peft.show import shown

_BATCH_ROWS = 256


def parquet_rows(path: str | os.PathLike[str], limit: int | None = None) -> Iterator[Row]:
    """The rows of a Parquet file; only the columns that a row can be made of are read.

    Raises DataError for a damaged file, columns of no known shape and bad rows (the first in full, the numbers of up to
    20 more); ResourceError where the file cannot be read.
    """
    with opened(path) as (stream, name):
        records = enumerate(_records(stream, name), start=1)
        attempts = ((number, partial(parse_row, record, f"{name}:{number}")) for number, record in records)
        yield from good_rows(attempts, unit="rows", limit=limit, empty=f"{name}: no rows; choose another file")


def _records(stream: BufferedReader, name: str) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"{name}: Parquet files need the pyarrow package: pip install 'dude-peft[train]', or write it as .jsonl"
        ) from error
    try:
        file = parquet.ParquetFile(stream)
        columns = [column for column in file.schema_arrow.names if column in known_columns()]
        check_columns(file.schema_arrow.names, f"{name}:")
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
            yield from batch.to_pylist()
    except (ArrowException, UnicodeDecodeError) as error:
        reason = shown(str(error).strip().partition("\n")[0], 120)
        raise DataError(f"{name}: is no readable Parquet file ({reason}); write it again") from error
