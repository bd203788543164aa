"""Data sets on the hub, by the datasets package: copied to this disk first, or streamed row by row."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from dude_peft.data.bad_rows import good_rows
from dude_peft.data.formats import Reading, Row
from dude_peft.errors import DataError
from dude_peft.installing import install
from dude_peft.show import shown


def hub_rows(name: str, split: str, limit: int | None, reading: Reading) -> Iterator[Row]:
    """The first `limit` rows of `id` or `id:config`; with `reading.streaming` none of them is copied to this disk.

    Raises DataError for bad rows, an empty set, and a set that cannot be loaded or read on.
    """
    shown_id = shown(name)
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{shown_id}: no such file, and hub data sets need the datasets package: {install('datasets')}, "
            "or use a local .jsonl file or builtin:word-problems"
        ) from error
    repository, _, config = name.partition(":")
    where = f"{shown_id}[{shown(split)}]"
    how: dict[str, Any] = {"streaming": True} if reading.streaming else {}
    try:
        loaded: Any = datasets.load_dataset(repository, *([config] if config else []), split=split, **how)
        if limit is None:
            table = loaded
        elif reading.streaming:
            table = loaded.take(limit)
        else:
            table = loaded.select(range(min(limit, len(loaded))))
    except Exception as error:  # the hub, the network, the disk cache and the builder each raise their own
        raise DataError(
            f"{where}: cannot be loaded from the hub ({_reason(error)}); check the id, the split and the network, or "
            "use a local .jsonl file or builtin:word-problems"
        ) from error
    attempts = (
        (index, partial(reading.row, record, f"{where}:{index}")) for index, record in enumerate(_read(table, where))
    )
    yield from good_rows(attempts, unit="rows", limit=limit, empty=f"{where}: no rows; choose another split")


def _read(table: Iterable[Any], where: str) -> Iterator[Any]:
    number = 0
    try:
        for record in table:
            yield record
            number += 1
    except Exception as error:  # a stream's network, and files that only now turn out to be damaged
        raise DataError(
            f"{where}:{number}: cannot be read from here on ({_reason(error)}); check the network, and start again"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error).strip(), 160)}"
