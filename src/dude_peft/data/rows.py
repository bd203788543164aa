"""From the name of a data set to its rows, and what a run records and checks about them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from dude_peft.data.columns import Columns
from dude_peft.data.formats import Message, Reading, Row, parse_row
from dude_peft.data.hub import hub_rows
from dude_peft.data.jsonl import json_rows, jsonl_rows
from dude_peft.data.mixture import Entry, Part, entries_of, mix
from dude_peft.data.objectives import PAIRED, Kind, objectives_for
from dude_peft.data.parquet import parquet_rows
from dude_peft.data.preferences import NAME as PREFERENCES
from dude_peft.data.preferences import UNPAIRED, preferences, unpaired
from dude_peft.data.table import table_rows
from dude_peft.data.text_file import text_rows
from dude_peft.data.word_problems import SIZES, word_problems
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted

__all__ = [
    "Message",
    "Row",
    "data_sha256",
    "duplicates",
    "load_rows",
    "local_file",
    "overlap",
    "parse_row",
    "read_json",
    "read_jsonl",
    "row_bytes",
    "stream_any",
    "stream_rows",
]

_READING = Reading()
_BUILTIN = "builtin:"
_BUILTINS: dict[str, tuple[Kind, Callable[..., list[Row]]]] = {
    "word-problems": ("answers", word_problems),
    PREFERENCES: ("pairs", preferences),
    UNPAIRED: ("labels", unpaired),
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_READERS: dict[str, Callable[[str, int | None, Reading], Iterator[Row]]] = {
    ".json": json_rows,
    ".csv": partial(table_rows, separator=","),
    ".tsv": partial(table_rows, separator="\t"),
    ".txt": text_rows,
    ".parquet": parquet_rows,
}
"""By the file's suffix; any other local file is read as JSON lines."""
_FILE_SUFFIXES = {*_READERS, ".jsonl", ".ndjson", ".gz", ".zip", ".zst", ".bz2", ".xz"}


def load_rows(
    source: str | os.PathLike[str] | Sequence[Entry],
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    reading: Reading = _READING,
) -> list[Row]:
    """The first `limit` rows of one source, or a mixture of `limit` rows of several (`mixture.mix`), in memory.

    Args:
        source: a name (`stream_rows`), or entries of a mixture.
        split: of a hub or built-in set that names none itself.
        limit: number of rows; None takes all.
        seed: of a built-in set, and of what a mixture takes of each source.
        reading: under which names rows are read, and whether they need an answer.

    Raises:
        DataError: a bad row, an empty set, a missing file, a hub set that cannot be loaded.
        ConfigError: a wrong limit, or a built-in set or split that does not exist.
    """
    return list(stream_any(source, split=split, limit=limit, seed=seed, reading=reading))


def stream_any(
    source: str | os.PathLike[str] | Sequence[Entry],
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    reading: Reading = _READING,
) -> Iterator[Row]:
    """The rows of `load_rows`, one at a time.

    The sources of a mixture with weights or a limit are read once before, to count their rows.

    Raises what `load_rows` raises.
    """
    if isinstance(source, (str, os.PathLike)):
        yield from stream_rows(source, split=split, limit=limit, seed=seed, reading=reading)
        return
    _check_limit(limit)
    parts = entries_of(source, split)

    def rows(part: Part) -> Iterator[Row]:
        own = reading_of(part, reading)
        return stream_rows(part.source, split=part.split, limit=part.rows, seed=seed, reading=own)

    weights = [part.weight for part in parts]
    if limit is None and all(weight is None for weight in weights):  # all of each
        for part in parts:
            yield from rows(part)
        return
    counts = [sum(1 for _ in rows(part)) for part in parts]
    chosen = mix(counts, weights, limit, seed, [part.source for part in parts])
    for part, count, picked in zip(parts, counts, chosen, strict=True):
        whole, rest = divmod(len(picked), max(1, count))
        for _ in range(whole):
            yield from rows(part)
        if rest:
            wanted = set(picked[-rest:].tolist())
            yield from (row for index, row in enumerate(rows(part)) if index in wanted)


def reading_of(entry: Entry, reading: Reading) -> Reading:
    """`reading` with the names of an entry that has its own."""
    return reading if entry.columns is None else replace(reading, columns=Columns(entry.columns))


def stream_rows(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    reading: Reading = _READING,
) -> Iterator[Row]:
    """The first `limit` rows of a local file, of a built-in set, or of a hub data set `id` or `id:config`.

    Rows come one at a time, so that memory stays bounded; what is wrong with any of them is raised at the end, or where
    `limit` ends the reading.

    Args:
        source: a name that exists as a file, or looks like one, is local; then `builtin:`; anything else is a hub id.
        split: of a hub or built-in set; a local file has no splits, all of it is read.
        limit: number of rows, from the first; None takes all.
        seed: of a built-in set; the order of a file or hub set is never changed.
        reading: under which names rows are read, and whether they need an answer.

    Raises:
        DataError: a bad row, an empty set, a missing file, a hub set that cannot be loaded.
        ConfigError: a wrong limit, or a built-in set or split that does not exist.
    """
    _check_limit(limit)
    name = os.fspath(source)
    if name.startswith(_BUILTIN):
        return iter(_builtin(name, split, limit, seed, reading.kind))
    if (path := local_file(name)) is not None:
        reading = replace(reading, folder=path.parent)
        return _READERS.get(PurePath(name).suffix.lower(), jsonl_rows)(name, limit, reading)
    return hub_rows(name, split, limit, reading)


def read_jsonl(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a JSON-lines file (`jsonl.jsonl_rows`)."""
    return list(jsonl_rows(path))


def read_json(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a .json file (`jsonl.json_rows`)."""
    return list(json_rows(path))


def local_file(name: str) -> Path | None:
    """Where a source's file is, there or not; None for a built-in set and a hub id."""
    path = os.path.expanduser(name)
    if name.startswith(_BUILTIN):
        return None
    looks_local = PurePath(path).suffix.lower() in _FILE_SUFFIXES or not _HUB_ID.fullmatch(name) or os.path.isabs(path)
    return Path(path) if looks_local or name.startswith(".") or os.path.exists(path) else None


def _check_limit(limit: int | None) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit is {quoted(limit)}; give a whole number of rows from 1, or none for all")


def _builtin(name: str, split: str, limit: int | None, seed: int, wanted: Kind) -> list[Row]:
    if name.removeprefix(_BUILTIN) not in _BUILTINS:
        known = ", ".join(_BUILTIN + builtin for builtin in _BUILTINS)
        raise ConfigError(f"no built-in data set {quoted(name)}; choose {known}")
    kind, make = _BUILTINS[name.removeprefix(_BUILTIN)]
    if kind != wanted and not (kind in PAIRED and wanted in PAIRED):
        raise DataError(f"{name}: its rows fit {objectives_for(kind)}; set that, or choose other rows")
    return make(SIZES.get(split, 1) if limit is None else limit, seed=seed, split=split)


def duplicates(rows: Sequence[Row]) -> int:
    """The number of rows whose messages all occurred in an earlier row."""
    return len(rows) - len({(row.messages, row.tools) for row in rows})


def overlap(train: Sequence[Row], test: Sequence[Row]) -> int:
    """The number of test rows whose prompt (all before the answer) is also a training prompt: leaked questions."""
    seen = {asked_bytes(row) for row in train}
    return sum(asked_bytes(row) in seen for row in test)


def data_sha256(rows: Iterable[Row]) -> str:
    """The hash (hex) of all messages in order, without their sources: the record of what a run was trained on."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_bytes(row))
    return digest.hexdigest()


def row_bytes(row: Row) -> bytes:
    """All of a row as one line of ASCII JSON, [[role, content], ...]: what is hashed of it.

    A message that has more than a text, or is not learned, has that behind the text, and images, each as its place and
    hash, behind that; tools stand before all messages.
    Of a pair a second line follows, of the conversation that is worse, and its margin; of a labelled answer, its label.
    """
    sides = ([_turn(message, message.trained) for message in messages] for messages in (row.messages, row.rejected))
    chosen, rejected = sides
    label = b"" if row.label is None else _json_bytes("", [["label", row.label]])
    margin = [] if row.margin is None else [["margin", row.margin]]
    other = _json_bytes("", [["rejected"], *margin, *rejected]) if row.rejected else label
    return _json_bytes(row.tools, chosen) + other


def asked_bytes(row: Row) -> bytes:
    """The same of what is asked: the messages before the answer, learned or not, and the tools."""
    return _json_bytes(row.tools, [_turn(message, True) for message in row.prompt])


def _turn(message: Message, trained: bool) -> list[Any]:
    turn: list[Any] = [message.role, message.content]
    if message.pictures:
        return [*turn, message.more, trained, [[picture.at, picture.sha256] for picture in message.pictures]]
    return turn if trained and not message.more else [*turn, message.more, trained]


def _json_bytes(tools: str, turns: list[list[Any]]) -> bytes:
    whole = [["tools", tools], *turns] if tools else turns
    return json.dumps(whole, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n"
