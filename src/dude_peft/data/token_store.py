"""The examples of one source as files that are mapped into memory, never read as a whole.

    ids        int32      the tokens of all examples, one behind the other
    trained    bool       of each token, whether it has a label
    starts     int64      where each example begins, and the end
    places     int64      line or number of the row that each example comes from
    prompts    uint64     hash of what is asked (of plain text: of the block)
    contents   uint64     hash of the example's tokens
    learned    int32      number of trained tokens
    ended      bool       whether a learned end token closes it

Where rows show images there are four more, of which the third and the fourth are counts:

    pictures         bytes    of each example a line of JSON, [[path, sha256], ...] in the order of its text
    picture_starts   int64    where each line begins, and the end
    shown            int32    images of the example
    image_tokens     int32    tokens in whose places the model puts them

Where rewards read conversations there are two more:

    asked            bytes    of each example a line of JSON, {"messages": [[role, content, more], ...], "tools"}: all
                              before the last answer, as the row has it
    asked_starts     int64    where each line begins, and the end

Of pairs (`Row.rejected`) both conversations are kept, the better one first: `starts` has two entries a pair, every
other column one. Of labelled answers (`Row.label`) there is also `label`, bool; of pairs to be scored `margin`,
float32, 0 where the row has none.

All little-endian. `manifest.json`, written last, has their sizes and hashes, what was counted, and its own hash: files
that do not agree with it are never used. 64-bit hashes find repetitions; among 10^8 examples one false one is to be
expected every few thousand sets.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.sealed import content_sha256
from dude_peft.data.encode import Counts, Example
from dude_peft.data.formats import Message, Row
from dude_peft.data.pictures import Picture
from dude_peft.data.rows import asked_bytes, row_bytes
from dude_peft.doors import open_file, read_json

MANIFEST = "manifest.json"

_COLUMNS = {
    "ids": "<i4",
    "trained": "?",
    "starts": "<i8",
    "places": "<i8",
    "prompts": "<u8",
    "contents": "<u8",
    "learned": "<i4",
    "ended": "?",
}
_LABELLED = {**_COLUMNS, "label": "?"}
_SCORED = {**_COLUMNS, "margin": "<f4"}
_SEEN = {**_COLUMNS, "pictures": "|u1", "picture_starts": "<i8", "shown": "<i4", "image_tokens": "<i4"}
_ASKED = {"asked": "|u1", "asked_starts": "<i8"}
_PLACE = re.compile(r"[0-9]+$")
_LONG = struct.Struct("<q")
_INT = struct.Struct("<i")
_FLOAT = struct.Struct("<f")
_READ_BYTES = 2**20


class DamagedStoreError(Exception):
    """The files do not agree with the manifest, or it is none."""


@dataclass(frozen=True)
class TokenStore:
    """One source's examples."""

    columns: dict[str, NDArray[Any]]
    """By the names above."""
    counts: Counts
    sha256: str
    """`rows.data_sha256` of all rows read, dropped ones included."""
    tokens_sha256: str
    """Of the token ids of all examples, their masks and their bounds, and their labels."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.columns["places"])

    @property
    def sides(self) -> int:
        """Conversations of each example: 2 where they are pairs."""
        return max(1, (len(self.columns["starts"]) - 1) // max(len(self), 1))

    def example(self, index: int, side: int = 0) -> Example:
        """One example; of a pair the better one, or with `side` 1 the worse one."""
        first = index * self.sides + side
        start, stop = (int(place) for place in self.columns["starts"][first : first + 2])
        return Example(self.columns["ids"][start:stop].tolist(), self.columns["trained"][start:stop].tolist())

    def pictures(self, index: int, folder: Path) -> tuple[Picture, ...]:
        """The images of one example, in `folder` and below it."""
        if "shown" not in self.columns or not self.columns["shown"][index]:
            return ()
        start, stop = (int(place) for place in self.columns["picture_starts"][index : index + 2])
        found = json.loads(self.columns["pictures"][start:stop].tobytes())
        return tuple(Picture(0, name, digest, str(folder / name)) for name, digest in found)

    def conversation(self, index: int, source: str) -> Row:
        """What one example asks, with an empty answer, where that is kept; `source` is the row's."""
        start, stop = (int(place) for place in self.columns["asked_starts"][index : index + 2])
        found = json.loads(self.columns["asked"][start:stop].tobytes())
        asked = (Message(role, content, more) for role, content, more in found["messages"])
        return Row((*asked, Message("assistant", "")), source, tools=found["tools"])


class TokenWriter:
    """Writes a store into an empty folder, example by example; `finish` makes it one."""

    def __init__(self, folder: Path, kind: str = "answers", *, seen: bool = False, asked: bool = False) -> None:
        self._folder = folder
        self._columns = _columns_of(kind, seen=seen, asked=asked)
        self._files: dict[str, BufferedWriter] = {}
        self._hashes = {name: xxhash.xxh3_128() for name in self._columns}
        self._sizes = dict.fromkeys(self._columns, 0)
        self._at = self._pictures_at = self._asked_at = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> TokenWriter:
        """Opens the files."""
        self._files = {name: (self._folder / name).open("wb") for name in self._columns}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes them."""
        for file in self._files.values():
            file.close()

    def add(self, row: Row, examples: list[Example], ends: set[int]) -> None:
        """The next row and what became of it; `ends` are the ids of the end tokens."""
        self._digest.update(row_bytes(row))
        place = int(_PLACE.findall(row.source)[-1])
        for sides in [examples] if row.rejected and examples else [[example] for example in examples]:
            both = [self._tokens(example) for example in sides]
            ids = b"".join(both) if len(both) == 1 else json_text([part.hex() for part in both]).encode("ascii")
            self._write("places", _LONG.pack(place))
            pictures = b""
            if "shown" in self._columns:
                pictures = self._shown(sides[0])
            self._write("prompts", _hash(ids if row.is_text else asked_bytes(row)))
            self._write("contents", _hash(ids + pictures))
            self._write("learned", _INT.pack(sum(sum(example.trained) for example in sides)))
            self._write("ended", bytes([all(example.ids[-1] in ends for example in sides)]))
            if "label" in self._columns:
                self._write("label", bytes([bool(row.label)]))
            if "margin" in self._columns:
                self._write("margin", _FLOAT.pack(row.margin or 0.0))
            if "asked" in self._columns:
                self._ask(row)

    @property
    def sha256(self) -> str:
        """`rows.data_sha256` of the rows so far."""
        return self._digest.hexdigest()

    def _tokens(self, example: Example) -> bytes:
        ids = np.array(example.ids, "<i4").tobytes()
        self._write("ids", ids)
        self._write("trained", bytes(example.trained))
        self._write("starts", _LONG.pack(self._at))
        self._at += len(example.ids)
        return ids

    def _shown(self, example: Example) -> bytes:
        """Writes the images of an example; their hashes, for that of its contents."""
        line = json_text([[each.name, each.sha256] for each in example.pictures]).encode("ascii") + b"\n"
        self._write("picture_starts", _LONG.pack(self._pictures_at))
        self._write("pictures", line)
        self._write("shown", _INT.pack(len(example.pictures)))
        self._write("image_tokens", _INT.pack(example.image_tokens))
        self._pictures_at += len(line)
        return "".join(each.sha256 for each in example.pictures).encode("ascii")

    def _ask(self, row: Row) -> None:
        messages = [[each.role, each.content, each.more] for each in row.prompt]
        line = json_text({"messages": messages, "tools": row.tools}).encode("ascii") + b"\n"
        self._write("asked_starts", _LONG.pack(self._asked_at))
        self._write("asked", line)
        self._asked_at += len(line)

    def finish(self, key: dict[str, Any], counts: Counts) -> None:
        """Writes the manifest; `key` is what the store was made from."""
        self._write("starts", _LONG.pack(self._at))
        if "shown" in self._columns:
            self._write("picture_starts", _LONG.pack(self._pictures_at))
        if "asked" in self._columns:
            self._write("asked_starts", _LONG.pack(self._asked_at))
        for file in self._files.values():
            file.close()
        files = {name: [self._sizes[name], digest.hexdigest()] for name, digest in self._hashes.items()}
        body = {"key": key, "files": files, "counts": asdict(counts), "sha256": self.sha256}
        replace_file(self._folder / MANIFEST, json_text({"sha256": content_sha256(body), "body": body}).encode("ascii"))

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._hashes[name].update(data)
        self._sizes[name] += len(data)


def _columns_of(kind: str, *, seen: bool, asked: bool) -> dict[str, str]:
    """The files of a store, by the kind of its rows, and whether these show images and are kept as conversations."""
    own = {"labels": _LABELLED, "scores": _SCORED}.get(kind, _SEEN if seen else _COLUMNS)
    return {**own, **_ASKED} if asked else own


def open_store(folder: Path, key: dict[str, Any]) -> TokenStore:
    """The store in a folder.

    Raises:
        FileNotFoundError: there is none.
        DamagedStoreError: a file is missing, has another size or other bytes, or the key is another one.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        body = manifest["body"]
        kinds = _columns_of(key.get("kind", "answers"), seen="pictures" in key, asked="asked" in key)
        if manifest["sha256"] != content_sha256(body) or body["key"] != key or body["files"].keys() != kinds.keys():
            raise DamagedStoreError(f"{folder}: the manifest does not agree with itself")
        for name, (size, digest) in body["files"].items():
            if (folder / name).stat().st_size != size or _file_hash(folder / name) != digest:
                raise DamagedStoreError(f"{folder}: {name} was changed")
        columns: dict[str, NDArray[Any]] = {
            name: np.memmap(folder / name, dtype=kind, mode="r") for name, kind in kinds.items()
        }
        hashed = ("ids", "trained", "starts", *(name for name in ("label", "margin", "pictures") if name in kinds))
        tokens = content_sha256({name: body["files"][name] for name in hashed})
        return TokenStore(columns, Counts(**body["counts"]), body["sha256"], tokens)
    except FileNotFoundError:
        if folder.exists():
            raise DamagedStoreError(f"{folder}: files are missing") from None
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{folder}: {error}") from error


def question_hash(row: Row) -> int:
    """What the column `prompts` has of a conversation."""
    return int.from_bytes(_hash(asked_bytes(row)), "little")


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open_file(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
