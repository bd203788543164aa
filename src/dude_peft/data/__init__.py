"""Data: strict readers, one template for training and evaluation, token ids with the prompt masked, answers compared.

rows.py           load_rows: a local file, a built-in set or a hub id becomes rows; hashes, duplicates, overlap
formats.py        Message, Row, and the four shapes of a JSON object that become one
jsonl.py          our own reader of local .jsonl and .json files
bad_rows.py       all bad rows of a source in one error
show.py           foreign text on one printable line
template.py       a row as prompt and completion text: chat or plain
encode.py         text as ids and labels; what does not fit is counted
answers.py        the final answer of a text, and whether two are the same
word_problems.py  arithmetic word problems made here
"""

from dude_peft.data.answers import expected_answer, final_answer, is_match
from dude_peft.data.encode import IGNORE, EncodedSet, encode, prompt_ids
from dude_peft.data.rows import (
    Message,
    Row,
    data_sha256,
    duplicates,
    load_rows,
    overlap,
    parse_row,
    read_json,
    read_jsonl,
)
from dude_peft.data.template import Template
from dude_peft.data.word_problems import word_problems

__all__ = [
    "IGNORE",
    "EncodedSet",
    "Message",
    "Row",
    "Template",
    "data_sha256",
    "duplicates",
    "encode",
    "expected_answer",
    "final_answer",
    "is_match",
    "load_rows",
    "overlap",
    "parse_row",
    "prompt_ids",
    "read_json",
    "read_jsonl",
    "word_problems",
]
