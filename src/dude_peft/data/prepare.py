"""From sources to training examples on disk: each source is read and tokenised once, and found again by its content.

What decides the examples is the key: the bytes of the source, the tokenizer, the template, the limits, the versions. A
run that starts with the same key maps the files of the first one; a mixture is a choice among its sources' examples, so
that other weights or another seed tokenise nothing again. Images belong to the bytes of their source: all of them are
hashed at every start, and another image is another key.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from dude_peft.artifact.durable import disk_errors, whole_folder
from dude_peft.artifact.sealed import content_sha256
from dude_peft.data.cache_folder import cache_folder
from dude_peft.data.clock import seen_by
from dude_peft.data.columns import Columns
from dude_peft.data.encode import BLIND, Encoder
from dude_peft.data.encode_pairs import PairEncoder, check_whole
from dude_peft.data.formats import Reading, Row
from dude_peft.data.mixture import Entry, Part, entries_of, mix
from dude_peft.data.objectives import PAIRED, Kind
from dude_peft.data.rows import data_sha256, local_file, stream_rows
from dude_peft.data.sight import Sight
from dude_peft.data.stamp import stamp_of
from dude_peft.data.template import Template
from dude_peft.data.token_set import Stored, TokenSet
from dude_peft.data.token_store import DamagedStoreError, TokenStore, TokenWriter, open_store
from dude_peft.data.tokenizer_parts import tokenizer_parts
from dude_peft.errors import BusyError, ConfigError, DataError, ResourceError
from dude_peft.show import shown

_FORMAT = 5
"""Raised whenever the same rows would become other examples, or the files other files."""

_BUSY_SECONDS = 0.2


def prepare(
    source: str | os.PathLike[str] | Sequence[Entry],
    template: Template,
    tokenizer: Any,
    *,
    max_length: int,
    train_on: str = "answers",
    upft: int | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    kind: Kind = "answers",
    sight: Sight | None = None,
    blind: str = BLIND,
    asked: bool = False,
    streaming: bool = False,
    cache: Path | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> TokenSet:
    """The examples of one source, or of a mixture of several, tokenised now or found in the cache.

    Args:
        source: a name (`rows.stream_rows`), or entries of a mixture (`mixture.mix`).
        template: how rows become text.
        tokenizer: how text becomes ids.
        max_length: tokens that an example may have.
        train_on: what is learned of a conversation: answers, last_answer or all.
        upft: only this many first tokens of each answer are learned; None takes all, and the end.
        split: of sources that name none themselves.
        limit: of one source, its first rows; of a mixture, the number of its examples. None takes all.
        seed: of a built-in set, and of what a mixture takes of each source.
        columns: what the source calls its columns (`columns.Columns`); an entry's own stand in their place.
        kind: what rows hold to learn.
        sight: how the model sees images; None refuses rows that have some.
        blind: why it is None, for the message.
        asked: keep what each row asks as it is, for `TokenSet.conversation`.
        streaming: keep no copy of data sets of the hub on this disk, but read them again (`formats.Reading`).
        cache: the folder of the cache; None is `cache_folder()`.
        advance: called with the number of rows that were just tokenised.

    Raises:
        DataError: a bad row, an empty set, a file that is missing or changes, no row that fits.
        ConfigError: a wrong option, tokenizer or chat template.
        ResourceError: the cache cannot be written.
    """
    if isinstance(source, (str, os.PathLike)):
        parts, total = [Part(os.fspath(source), split, limit, columns=columns)], None
    else:
        parts = [
            each if each.columns is not None else replace(each, columns=columns) for each in entries_of(source, split)
        ]
        total = limit
    root = cache or cache_folder()
    template = template.of_kind(kind)
    settings = {
        "format": _FORMAT,
        "tokenizer": _tokenizer_sha256(tokenizer),
        "template": [template.kind, template.source, template.special_tokens],
        "moment": seen_by(template.source),
        "max_length": max_length,
        "train_on": train_on,
        "upft": upft,
        **({} if kind == "answers" else {"kind": kind}),
        **({"asked": True} if asked else {}),
    }

    def encoder() -> Encoder | PairEncoder:
        if kind in PAIRED:
            return PairEncoder(template, tokenizer, max_length=max_length, train_on=train_on, upft=upft)
        if kind == "labels":
            check_whole("labelled answers", train_on, upft)
        whole = kind == "labels"  # what is judged is not cut
        how: dict[str, Any] = {
            "train_on": train_on,
            "upft": upft,
            "shortens": not whole,
            "sight": sight,
            "blind": blind,
        }
        return Encoder(template, tokenizer, max_length=max_length, **how)

    def reading(part: Part) -> Reading:
        return Reading(Columns(part.columns), kind=kind, streaming=streaming)

    encoder()  # a wrong option is told before anything is read
    stored = [_stored(part, reading(part), seed, settings, encoder, root, advance, sight) for part in parts]
    sizes = [len(each.store) for each in stored]
    return TokenSet(stored, mix(sizes, [part.weight for part in parts], total, seed, [part.source for part in parts]))


def _stored(
    part: Part,
    reading: Reading,
    seed: int,
    settings: dict[str, Any],
    encoder: Callable[[], Encoder | PairEncoder],
    root: Path,
    advance: Callable[[int], None],
    sight: Sight | None,
) -> Stored:
    path = local_file(part.source)
    name = shown(part.source, None) if path is not None else f"{shown(part.source)}[{shown(part.split)}]"

    def rows() -> Iterator[Row]:
        return stream_rows(part.source, split=part.split, limit=part.rows, seed=seed, reading=reading)

    stamp = None if path is None else stamp_of(path)
    if stamp is not None:
        # Suffixes tell the reader which format the bytes are.
        content = [stamp.sha256, PurePath(part.source).suffix.lower(), part.rows]
    else:
        content = [data_sha256(rows())]
    key = {**settings, "content": content, "columns": reading.columns.mapping}
    if sight is not None and path is not None and (seen := _pictures_sha256(rows())):
        key["pictures"] = [seen, sight.parts]

    def fill(folder: Path) -> None:
        made, this = 0, encoder()
        with TokenWriter(folder, reading.kind, seen="pictures" in key, asked="asked" in key) as writer:
            for row, examples in this.examples(rows()):
                writer.add(row, examples, this.ends)
                made += len(examples)
                advance(1)
            this.check_any(made, f"{name}: ")
            if stamp is not None:
                stamp.verify(name)
            elif writer.sha256 != content[0]:
                raise DataError(f"{name}: the rows changed while they were read; start again")
            writer.finish(key, this.counts)

    store = _cached(root / "tokens", key, fill)
    return Stored(name, store, stamp, reading.columns, Path() if path is None else path.parent, sight)


def _pictures_sha256(rows: Iterator[Row]) -> str:
    """The hash of the images of all rows, in order; empty where no row has any."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        for picture in row.pictures:
            digest.update(f"{picture.name}\0{picture.sha256}\0".encode())
            count += 1
    return digest.hexdigest() if count else ""


def _cached(root: Path, key: dict[str, Any], fill: Callable[[Path], None]) -> TokenStore:
    """The store of `key`, made by `fill` where there is none or a damaged one; one process makes it, others wait."""
    folder = root / content_sha256(key)[:32]
    damaged = False
    while True:
        try:
            return open_store(folder, key)
        except FileNotFoundError:
            pass
        except DamagedStoreError as error:
            if damaged:
                raise ResourceError(
                    f"cache {shown(error, 300)}, although it was just written; check the disk"
                ) from error
            damaged = True
            with disk_errors(folder):
                shutil.rmtree(folder)
        try:
            with disk_errors(folder), whole_folder(folder) as staging:
                fill(staging)
        except BusyError:
            time.sleep(_BUSY_SECONDS)
        except ConfigError:
            if not folder.exists():  # else another process has just made it
                raise


def _tokenizer_sha256(tokenizer: Any) -> str:
    """The hash of all that decides how text becomes ids, the libraries' versions among it."""
    import tokenizers
    import transformers

    return content_sha256([tokenizer_parts(tokenizer), tokenizers.__version__, transformers.__version__])
