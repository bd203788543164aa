"""Plain text, .txt: one document, all of it trained.

A file of any size is read in passages of at most 64 KiB, cut at a blank line if there is one in the second half, else
at a line end. `encode` cuts passages into blocks of max_length tokens; nothing is read twice or left out. Only the
file's last passage ends the document: no end token stands between passages. A limit on rows counts passages.
"""

import itertools
import os
from collections.abc import Iterator

from dude_peft.data.file_lines import decode, lines, opened, refuse_magic
from dude_peft.data.formats import PASSAGE, TEXT, Message, Reading, Row
from dude_peft.data.objectives import PAIRED, objectives_for
from dude_peft.errors import DataError
from dude_peft.show import shown

PASSAGE_CHARACTERS = 64 * 2**10


def text_rows(path: str | os.PathLike[str], limit: int | None = None, reading: Reading | None = None) -> Iterator[Row]:
    """The passages of a text file in order; joined, they are the file. A row's source is its first line.

    Of `reading` only the kind counts: plain text has no columns.

    Raises DataError for a file that is empty, is not UTF-8, has a line above 16 MiB or should hold other rows;
    ResourceError where it cannot be read.
    """
    if reading is not None and reading.kind != "answers":
        wanted = "pairs" if reading.kind in PAIRED else reading.kind
        raise DataError(f"{shown(path, 300)}: text has no {wanted}; it fits {objectives_for('answers')}")
    with opened(path) as (stream, name):
        refuse_magic(stream.peek(8), name)
        passages = _passages((n, decode(raw, n, at, name)) for n, at, raw in lines(stream, name))
        passage = next(passages, None)
        if passage is None:
            raise DataError(f"{name}: no text (the file is empty or blank); add some text")
        for _ in itertools.count() if limit is None else range(limit):
            following = next(passages, None)
            yield _row(TEXT if following is None else PASSAGE, passage, name)
            if following is None:
                return
            passage = following


def _row(role: str, passage: tuple[int, str], name: str) -> Row:
    line, text = passage
    return Row((Message(role, text),), f"{name}:{line}", "plain text")


def _passages(numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """(first line, text) of stretches of whole lines; blank ones join the next."""
    begin, held, size, cut = 1, list[str](), 0, 0
    for number, text in numbered:
        if held and size + len(text) > PASSAGE_CHARACTERS:
            keep = cut or len(held)
            passage = "".join(held[:keep])
            if passage.strip():
                yield begin, passage
            begin, held, cut = number - (len(held) - keep), held[keep:], 0
            size = sum(map(len, held))
        held.append(text)
        size += len(text)
        if not text.strip() and size > PASSAGE_CHARACTERS // 2:
            cut = len(held)
    if "".join(held).strip():
        yield begin, "".join(held)
