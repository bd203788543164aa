"""Data: strict readers, one template for training and evaluation, token ids with the prompt masked, answers compared.

rows.py           a local file, a built-in set or a hub id becomes rows; hashes, duplicates, overlap
formats.py        Row, and the shapes of a JSON object that become one
message.py        Message, and what a data set tells of it
pictures.py       images of rows: found in the folder of the data, looked at, hashed
sight.py          how a model's processor sees them: tokens in a text, tensors in a batch
columns.py        what a data set calls its columns, and which were read
suggest.py        the names that are probably meant
jsonl.py table.py parquet.py text_file.py    our own readers of local files
strict_json.py    no key twice, no NaN
file_lines.py     their bytes: opened, decoded strictly, cut into lines
bad_rows.py       all bad rows of a source in one error
mixture.py        several sources as one: how many rows each gives, and which
template.py       a row as prompts and answers in text: chat or plain
unwritten.py      what a template leaves out of a row
renderer.py render_child.py    templates run in a process with limits
encode.py         text as ids and labels; what does not fit is counted
labels.py         the label of what is not learned
answers.py        the final answer of a text, and whether two are the same
word_problems.py  arithmetic word problems made here

Imported by their own names, since they need numpy or torch:

prepare.py        prepare: sources in, a TokenSet out, through a cache on disk
token_set.py      TokenSet: examples on disk as a sequence; the overlap of two
token_store.py    one source's examples as files that are mapped into memory
held_out.py       a share of the examples, by questions
cache_folder.py   where caches are
batches.py        examples as tensors: padded, or end to end
packing.py        which examples share a row, and whether a model keeps them apart
"""

from dude_peft.data.answers import expected_answer, final_answer, is_match
from dude_peft.data.encode import EncodedSet, encode, prompt_ids
from dude_peft.data.labels import IGNORE
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
