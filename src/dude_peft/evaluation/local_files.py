"""Benchmarks in local files, read strictly and written again as the documents that the harness gets from the hub.

    gsm8k/{train,test}.jsonl            question, answer with #### N
    mmlu/{dev,test}/SUBJECT_*.csv       question,choice0,choice1,choice2,choice3,answer (0 to 3, or A to D)
    commonsense/SET/test.json           LLM-Adapters' instruction, answer; its last line is "Answer format: a/b"
    math/SET/test.json                  LLM-Adapters' instruction, answer

A document of GSM8K or MMLU has the fields of the hub's, in their order, so that its hash is the same.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dude_peft.data.file_lines import decode, lines, opened, refuse_magic
from dude_peft.errors import DataError
from dude_peft.show import quoted, shown

Document = dict[str, Any]

_MMLU_COLUMNS = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
_MMLU_ANSWERS = {**{str(n): n for n in range(4)}, **{letter: n for n, letter in enumerate("ABCD")}}
_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*\Z")
_OPTION = re.compile(r"\(([A-E])\)")


def gsm8k(path: Path) -> list[Document]:
    """Question and worked answer.

    Raises:
        DataError: missing, malformed (file:line), or an answer without `#### N`.
    """
    found = []
    with _file(path, 'JSON lines, {"question": ..., "answer": "... #### 18"}') as text:
        for where, line in text:
            if not line.strip():
                continue
            document = _object(_parsed(line, where), ("question", "answer"), where)
            if not re.search(r"#### *-?[0-9.,]+", document["answer"]):
                raise DataError(f"{where}: the answer has no '#### N' line with its number; add it, as in GSM8K")
            found.append({"question": document["question"], "answer": document["answer"]})
    return _some(found, path)


def mmlu(path: Path, subject: str) -> list[Document]:
    """Question, subject, four choices, number of the right one.

    Raises:
        DataError: missing, or other columns, a ragged row, an answer that is none (file:line).
    """
    layout = ",".join(_MMLU_COLUMNS)
    found = []
    with _file(path, f"CSV whose first line is {layout}") as text:
        reader = csv.reader((line for _, line in text), strict=True)
        try:
            header = next(reader, [])
            if header != _MMLU_COLUMNS:
                raise DataError(
                    f"{shown(path, 300)}:1: the first line is {quoted(','.join(header), 100)}; it must be {layout}"
                )
            for cells in reader:
                where = f"{shown(path, 300)}:{reader.line_num}"
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(f"{where}: {len(cells)} cells, not {len(header)}; quote cells that hold commas")
                question, *choices, answer = cells
                if answer not in _MMLU_ANSWERS:
                    raise DataError(f"{where}: the answer is {quoted(answer)}; write 0 to 3, or A to D")
                found.append(
                    {
                        "question": question,
                        "subject": subject,
                        "choices": choices,
                        "answer": _MMLU_ANSWERS[answer],
                    }
                )
        except csv.Error as error:
            raise DataError(f"{shown(path, 300)}:{reader.line_num}: {shown(error)}; repair the quoting") from error
    return _some(found, path)


def commonsense(path: Path) -> list[Document]:
    """LLM-Adapters' instruction, the choices that it names, number of the right one.

    Raises:
        DataError: missing or malformed, no choices, an answer that is none of them (file, row).
    """
    found = []
    for where, row in _instructions(path):
        match = _FORMAT.search(row["instruction"])
        if match is None:
            raise DataError(
                f"{where}: the instruction does not end with 'Answer format: a/b/...'; add it, as in LLM-Adapters"
            )
        choices = match.group(1).split("/")
        if row["answer"] not in choices:
            raise DataError(f"{where}: the answer {quoted(row['answer'])} is none of {quoted(match.group(1), 80)}")
        document = {"instruction": row["instruction"], "choices": choices, "answer": choices.index(row["answer"])}
        found.append(document)
    return _some(found, path)


def math(path: Path) -> list[Document]:
    """LLM-Adapters' instruction and its answer, a number or one of (A) to (E).

    Raises:
        DataError: missing or malformed (file, row), or letters and numbers in one set.
    """
    found, letters = [], 0
    for _, row in _instructions(path):
        letter = row["answer"] in tuple("ABCDE") and _OPTION.search(row["instruction"]) is not None
        letters += letter
        answer = row["answer"] if letter else row["answer"].removesuffix(".0")
        found.append({"question": row["instruction"].strip(), "answer": answer})
    if 0 < letters < len(found):
        raise DataError(
            f"{shown(path, 300)}: {letters} of {len(found)} answers are letters of options, but the others are not; "
            "use one kind"
        )
    return _some(found, path)


def _instructions(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with _file(path, 'a JSON array, [{"instruction": ..., "answer": ...}]') as text:
        content = "".join(line for _, line in text)
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{shown(path, 300)}:{line}: malformed JSON ({shown(error)}); repair the array") from error
    if not isinstance(rows, list):
        raise DataError(f"{shown(path, 300)}: this is not a JSON array; write [{{...}}, ...]")
    for number, row in enumerate(rows, start=1):
        where = f"{shown(path, 300)}, row {number}"
        yield where, _object(row, ("instruction", "answer"), where)


@contextmanager
def _file(path: Path, layout: str) -> Iterator[Iterator[tuple[str, str]]]:
    """(place, text) of each line; a missing file's error says what it has to hold."""
    if not path.is_file():
        raise DataError(f"{shown(path, 300)}: no such file; it must have {layout}")
    with opened(path) as (stream, name):
        refuse_magic(stream.peek(8), name)
        yield ((f"{name}:{line}", decode(raw, line, at, name)) for line, at, raw in lines(stream, name))


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: malformed JSON ({shown(error)}); repair the line") from error


def _object(row: Any, keys: tuple[str, ...], where: str) -> dict[str, str]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: this is not an object; write {{...}} with {', '.join(keys)}")
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise DataError(f"{where}: {quoted(key)} is missing, empty or not text; the columns are {', '.join(keys)}")
    return row


def _some(documents: list[Document], path: Path) -> list[Document]:
    if not documents:
        raise DataError(f"{shown(path, 300)}: this file has no questions; add some")
    return documents
