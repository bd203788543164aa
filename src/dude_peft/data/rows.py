"""From the name of a data set to its rows, and what a run records and checks about them."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from dude_peft.data.bad_rows import BadRows
from dude_peft.data.formats import Message, Row, parse_row
from dude_peft.data.jsonl import read_json, read_jsonl
from dude_peft.data.word_problems import SIZES, word_problems
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted, shown

__all__ = [
    "Message",
    "Row",
    "data_sha256",
    "duplicates",
    "load_rows",
    "overlap",
    "parse_row",
    "read_json",
    "read_jsonl",
]

_BUILTIN = "builtin:"
_BUILTINS = ("word-problems",)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_FILE_SUFFIXES = {
    ".jsonl",
    ".json",
    ".ndjson",
    ".csv",
    ".tsv",
    ".txt",
    ".gz",
    ".zip",
    ".zst",
    ".bz2",
    ".xz",
    ".parquet",
}


def load_rows(
    source: str | os.PathLike[str], *, split: str = "train", limit: int | None = None, seed: int = 0
) -> list[Row]:
    """The first `limit` rows of a local file, of `builtin:word-problems`, or of a hub data set `id` or `id:config`.

    Args:
        source: a name that exists as a file, or looks like one, is local; then `builtin:`; anything else is a hub id.
        split: of a hub or built-in set; a local file has no splits, all of it is read.
        limit: number of rows, from the first; None takes all.
        seed: of a built-in set; the order of a file or hub set is never changed.

    Raises:
        DataError: a bad row, an empty set, a missing file, a hub set that cannot be loaded.
        ConfigError: a wrong limit, or a built-in set or split that does not exist.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit is {quoted(limit)}; give a whole number of rows from 1, or none for all")
    name = os.fspath(source)
    if name.startswith(_BUILTIN):
        return _builtin(name, split, limit, seed)
    if _is_local(name):
        read = read_json if PurePath(name).suffix.lower() == ".json" else read_jsonl
        return read(name, limit=limit)
    return _from_hub(name, split, limit)


def _builtin(name: str, split: str, limit: int | None, seed: int) -> list[Row]:
    if name.removeprefix(_BUILTIN) not in _BUILTINS:
        known = ", ".join(_BUILTIN + builtin for builtin in _BUILTINS)
        raise ConfigError(f"no built-in data set {quoted(name)}; there is {known}")
    return word_problems(SIZES.get(split, 1) if limit is None else limit, seed=seed, split=split)


def _is_local(name: str) -> bool:
    path = os.path.expanduser(name)
    if PurePath(path).suffix.lower() in _FILE_SUFFIXES or not _HUB_ID.fullmatch(name) or os.path.isabs(path):
        return True
    return name.startswith(".") or os.path.exists(path)


def _from_hub(name: str, split: str, limit: int | None) -> list[Row]:
    shown_id = shown(name)
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{shown_id}: no such file, and hub data sets need the datasets package: pip install 'dude-peft[train]', "
            "or use a local .jsonl file or builtin:word-problems"
        ) from error
    repository, _, config = name.partition(":")
    try:
        loaded: Any = datasets.load_dataset(repository, *([config] if config else []), split=split)
        table = loaded if limit is None else loaded.select(range(min(limit, len(loaded))))
    except Exception as error:  # the hub, the network, the disk cache and the builder each raise their own
        reason = f"{type(error).__name__}: {shown(str(error).strip(), 160)}"
        raise DataError(
            f"{shown_id}[{shown(split)}]: cannot be loaded from the hub ({reason}); check the id, the split and the "
            "network, or use a local .jsonl file or builtin:word-problems"
        ) from error
    rows: list[Row] = []
    bad = BadRows("rows")
    for index, record in enumerate(table):
        try:
            rows.append(parse_row(record, f"{shown_id}[{shown(split)}]:{index}"))
        except DataError as error:
            bad.add(index, error)
    bad.raise_if_any()
    if not rows:
        raise DataError(f"{shown_id}[{shown(split)}]: no rows; choose another split")
    return rows


def duplicates(rows: Sequence[Row]) -> int:
    """The number of rows whose messages all occurred in an earlier row."""
    return len(rows) - len({row.messages for row in rows})


def overlap(train: Sequence[Row], test: Sequence[Row]) -> int:
    """The number of test rows whose prompt (all before the answer) is also a training prompt: leaked questions."""
    seen = {row.prompt for row in train}
    return sum(row.prompt in seen for row in test)


def data_sha256(rows: Sequence[Row]) -> str:
    """The hash (hex) of all messages in order, without their sources: the record of what a run was trained on."""
    digest = hashlib.sha256()
    for row in rows:
        turns = [[message.role, message.content] for message in row.messages]
        digest.update(json.dumps(turns, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()
