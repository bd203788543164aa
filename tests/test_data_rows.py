"""Readers: what becomes a row, and that each bad input is one line with its place and an action."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dude_peft.data import (
    Message,
    Row,
    data_sha256,
    duplicates,
    file_lines,
    jsonl,
    load_rows,
    overlap,
    parse_row,
    read_json,
    read_jsonl,
)
from dude_peft.errors import ConfigError, DataError, ResourceError

GOOD = b'{"prompt": "2 + 2?", "completion": "4"}'


def write(folder: Path, content: bytes, name: str = "t.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def fault(path: Path | str, read=read_jsonl) -> str:
    """The message of the DataError, which is one printable line."""
    with pytest.raises(DataError) as info:
        read(path)
    message = str(info.value)
    assert message.isprintable()
    return message


# --- what becomes a row -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "q", "completion": " a\n"}, [("user", "q"), ("assistant", " a\n")]),
        ({"question": "q", "answer": "a", "id": 3, "text": None}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "output": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "x", "output": "a"}, [("user", "q\n\nx"), ("assistant", "a")]),
        ({"instruction": "q", "input": " ", "output": "a", "answer": "b"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": None, "output": "a"}, [("user", "q"), ("assistant", "a")]),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": "q", "name": None, "id": 3},
                    {"role": "assistant", "content": "a", "tool_calls": None},
                    {"role": "user", "content": "r"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            [("system", ""), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ],
                "system": "s",
            },
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            [("user", "q"), ("assistant", "a")],
        ),
        ({"text": "all of it", "url": "u"}, [("text", "all of it")]),
        # tables often hold the whole prompt beside its parts
        ({"instruction": "q", "input": "", "output": "a", "text": "q a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": None, "output": None, "text": "t"}, [("text", "t")]),
        # a table joined from two files: the columns of the other shape are all null
        (
            {"prompt": None, "completion": None, "question": "q", "answer": "a"},
            [("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_every_shape_becomes_the_same_row(row, messages):
    parsed = parse_row(row, "x:1")
    assert parsed == Row(tuple(Message(role, content) for role, content in messages), "x:1")
    assert parsed.answer == messages[-1][1]
    assert [m.role for m in parsed.prompt] == [role for role, _ in messages[:-1]]


def test_rows_keep_order_source_and_mixed_shapes(tmp_path):
    path = write(tmp_path, GOOD + b'\n\n  \n{"question": "q", "answer": "a"}\n')
    assert [row.source for row in read_jsonl(path)] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_bom_crlf_and_a_missing_last_line_end_change_nothing(tmp_path, bom, end):
    line = '{"prompt": "café\u2028?", "completion": "oui"}'.encode()
    rows = read_jsonl(write(tmp_path, bom + line + (end or b"\n") + GOOD + end))
    assert [row.messages[0].content for row in rows] == ["café\u2028?", "2 + 2?"]


# --- bad rows ---------------------------------------------------------------------------------------------------------

BAD_ROWS = [
    ({"prompt": "q"}, "'prompt' without 'completion'; use prompt + completion"),
    ({"answer": "a"}, "'answer' without 'question'"),
    ({"body": "q", "label": 1}, "no known format in the keys ('body', 'label'); use prompt + completion"),
    ({"text": " "}, "'text' is empty"),
    ({"conversations": "hi"}, "'conversations' is str; write a list of objects with from and value"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "'conversations' has no answer"),
    ({"conversations": [{"from": "judge", "value": "q"}]}, "conversations[0].from is 'judge'; use system, human, gpt"),
    ({"conversations": [{"value": "q"}]}, "conversations[0].from is missing"),
    ({"conversations": [{"from": "human", "value": 3}]}, "'conversations[0].value' is int, not a string"),
    ({}, "no known format in the keys (none)"),
    ({"prompt": "q", "completion": None}, "'completion' is null; fill it in or remove the row"),
    ({"prompt": "q", "completion": ""}, "'completion' is empty; fill it in or remove the row"),
    ({"prompt": "q", "completion": " \n\t"}, "'completion' is empty"),
    ({"prompt": "q", "completion": 4}, "'completion' is int, not a string; write it as text"),
    ({"prompt": "", "completion": "a"}, "'prompt' is empty"),
    ({"question": "q", "answer": ["a"]}, "'answer' is list, not a string"),
    ({"question": None, "answer": None}, "'question' is null"),
    ({"instruction": "q", "output": True}, "'output' is bool, not a string"),
    ({"instruction": "q", "input": 3, "output": "a"}, "'input' is int, not a string"),
    ({"prompt": "q", "completion": "a\0b"}, "'completion' holds a NUL character; remove it"),
    ({"prompt": "q\ud800", "completion": "a"}, "'prompt' holds half a surrogate pair at character 1; repair"),
    (
        {"prompt": "q", "completion": "a", "question": "r", "answer": "b"},
        "can be read as prompt + completion and as question + answer; keep the columns of one",
    ),
    ({"messages": None}, "'messages' is null; write a list of objects"),
    ({"messages": "hi"}, "'messages' is str; write a list of objects"),
    ({"messages": []}, "'messages' has no answer"),
    ({"messages": ["hi"]}, "messages[0] is str; write an object with role and content"),
    ({"messages": [{"content": "a"}]}, "messages[0].role is missing; use system, user, assistant or tool"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role is list; use system"),
    ({"messages": [{"role": "tool\n\x1b[2J", "content": "a"}]}, "messages[0].role is 'tool\\n\\x1b[2J'; use system"),
    ({"messages": [{"role": "user", "content": "q"}]}, "'messages' has no answer: the last message must be the"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "no user message before the answer; add it"),
    (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]},
        "'messages[1].content' is null",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "a"}]},
        "'messages[0].content[0].text' is null",
    ),
    (
        {"messages": [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}]},
        "messages[1] is a system message; only the first message may be",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row_names_file_and_line(tmp_path, row, message):
    path = write(tmp_path, GOOD + b"\n" + json.dumps(row).encode() + b"\n" + GOOD)
    assert fault(path).startswith(f"{path}:2: ")
    assert message in fault(path)


BAD_LINES = [
    (b'{"prompt": "q", "completion" "a"}', ":2:30: malformed JSON (Expecting ':' delimiter); repair the line"),
    (b"{'prompt': 1}", ":2:2: malformed JSON (Expecting property name"),
    (b'{"a": 1} {"b": 2}', ":2:10: malformed JSON (Extra data); repair the line"),
    (b'{"prompt": "q",', ":2:16: the line ends inside a value"),
    (b"{", "write each row on one line"),
    (b'["q", "a"]', ":2: the row is list, not an object; write {...}"),
    (b"null", ":2: the row is null, not an object"),
    (b'"text"', ":2: the row is str, not an object"),
    (
        b'{"prompt": "q", "completion": "a", "prompt": "r"}',
        ":2: the key 'prompt' appears twice in one object; keep one",
    ),
    (b'{"x": {"y\\n": 1, "y\\n": 2}}', ":2: the key 'y\\n' appears twice"),
    (b'{"prompt": "q", "completion": "a", "score": NaN}', ":2: NaN is not JSON; write null or a number"),
    (b'{"prompt": "q", "completion": "\\ud83d"}', ":2: 'completion' holds half a surrogate pair"),
    (b'{"prompt": "\xed\xa0\x80"}', ":2: byte 0xED at byte offset 52 is not UTF-8"),
    (b'{"prompt": "caf\xe9"}', ":2: byte 0xE9 at byte offset 55 is not UTF-8 (Latin-1?); save the file as UTF-8"),
    (b'{"prompt": "\0"}', ":2: NUL byte at byte offset 52"),
    (b'{"n": ' + b"9" * 5000 + b"}", ":2: a number is too long to read; write it as text"),
    (b'{"n": ' + b"[" * 100_000, ":2: nested too deep; write a flat object"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line_names_file_line_and_column(tmp_path, line, message):
    path = write(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    assert f"{path}:2" in fault(path)
    assert message in fault(path)


def test_byte_offset_counts_the_bom(tmp_path):
    assert "byte offset 4 " in fault(write(tmp_path, b"\xef\xbb\xbf{\xff}"))


def test_all_bad_lines_are_counted_and_twenty_are_named(tmp_path):
    path = write(tmp_path, GOOD + b"\n" + b"{]\n" * 3 + GOOD)
    assert fault(path).startswith(f"{path}:2:2: malformed JSON")
    assert fault(path).endswith("(3 bad lines: 2, 3, 4)")
    message = fault(write(tmp_path, GOOD + b"\n" + b"{]\n" * 45))
    assert message.endswith("(45 bad lines: " + ", ".join(str(i) for i in range(2, 22)) + ", ...)")


def test_a_fault_of_all_rows_is_told_once_with_what_to_write(tmp_path):
    message = fault(write(tmp_path, b'{"ask_for": "q", "reply_is": "a"}\n' * 45))
    assert "--column prompt=ask_for --column completion=reply_is" in message
    assert message.endswith("(all 45 lines have this fault)")
    message = fault(write(tmp_path, b'{"a": "q", "b": "a"}\n' * 45))
    assert "if 'a' asks and 'b' answers, data.columns: {prompt: a, completion: b}" in message
    assert "--column prompt=a --column completion=b" in message
    assert "21" not in message.replace(str(tmp_path), "")


def test_a_file_cut_off_in_its_last_line_is_named_so(tmp_path):
    path = write(tmp_path, GOOD + b'\n{"prompt": "q", "compl')
    assert fault(path).startswith(f"{path}:2:17: the last line of the file is cut off")
    assert "write it again or remove it" in fault(path)


# --- files that are something else ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows (the file is empty or has only blank lines); write one object per line"),
        (b"\n \r\n\t\n", "no rows"),
        (b"\xef\xbb\xbf", "no rows"),
        (
            b'[{"prompt": "q", "completion": "a"}]',
            ":1: a JSON array begins here, not JSON lines; write one object per line, or name",
        ),
        (b'\n[\n {"prompt": "q"}\n]', ":2: a JSON array begins here"),
        (gzip.compress(GOOD), "gzip-compressed; decompress it first"),
        (b"PK\x03\x04....", "a zip archive; unpack it first, or save the sheet of an Excel file as .csv"),
        (b"PAR1....", "a Parquet file; name it .parquet"),
        (b"question,answer\n1+1,2\n", ":1: looks like CSV, not JSON lines; convert it"),
        (b'"question";"answer"\n', ":1: looks like CSV"),
        ("\ufeff{}".encode("utf-16-le"), "UTF-16 (byte offset 0); save it as UTF-8"),
        ("\ufeff{}".encode("utf-16-be"), "UTF-16 (byte offset 0)"),
        ('{"prompt": "q, a"}'.encode("utf-16-le"), ":1: NUL byte at byte offset 1 (UTF-16, or not text?)"),
        ('["a", "b"]'.encode("utf-16-le"), ":1: NUL byte at byte offset 1 (UTF-16, or not text?)"),
    ],
    ids=range(14),
)
def test_other_formats_are_refused_with_a_hint(tmp_path, content, message):
    path = write(tmp_path, content)
    assert fault(path).startswith(str(path))
    assert message in fault(path)


def test_missing_file_names_the_closest_one(tmp_path):
    write(tmp_path, GOOD, "train.jsonl")
    missing = tmp_path / "trian.jsonl"
    assert fault(missing) == f"{missing}: no such file; did you mean '{tmp_path / 'train.jsonl'}'?"
    assert fault(tmp_path / "zzz").endswith("zzz: no such file; check the path")
    assert "its folder" in fault(tmp_path / "nowhere" / "train.jsonl")


def test_unusable_paths(tmp_path):
    assert "is a folder; give the data file in it" in fault(tmp_path)
    assert "not a usable path" in fault("a\0b.jsonl")
    assert "not a usable path" in fault("a\ud800b.jsonl", load_rows)
    with pytest.raises(ResourceError, match="cannot be read"):
        read_jsonl(write(tmp_path, GOOD) / "inside.jsonl")
    with pytest.raises(ResourceError, match="cannot be read"):
        read_jsonl(tmp_path / ("x" * 5000))


def test_home_and_odd_names_work(tmp_path, monkeypatch):
    write(tmp_path, GOOD, "my däta\n.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    (row,) = load_rows("~/my däta\n.jsonl")
    assert row.source == "~/my däta\\n.jsonl:1"


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and sparse files")
def test_a_line_of_ten_gigabytes_is_refused_in_bounded_memory(tmp_path):
    path = write(tmp_path, GOOD + b"\n")
    os.truncate(path, 10 * 2**30)  # sparse: the line of NULs takes no disk
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (400 * 2**20,) * 2)\n"
        "from dude_peft.data import read_jsonl\n"
        "try: read_jsonl(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert out.stdout == f"DataError {path}:2: the line is longer than 16 MiB; write each row on its own line\n", (
        out.stderr
    )


def test_a_line_just_within_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(file_lines, "MAX_LINE_BYTES", len(GOOD) + 1)
    assert len(read_jsonl(write(tmp_path, GOOD + b"\n" + GOOD))) == 2
    monkeypatch.setattr(file_lines, "MAX_LINE_BYTES", len(GOOD))
    assert ":1: the line is longer" in fault(write(tmp_path, GOOD + b"\n" + GOOD))


# --- .json ------------------------------------------------------------------------------------------------------------


def test_json_array_rows_have_their_lines(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf[\n " + GOOD + b",\n\n {\n" + GOOD[1:] + b"\n]\n", "t.json")
    assert [row.source for row in load_rows(path)] == [f"{path}:2", f"{path}:4"]
    assert len(load_rows(path, limit=1)) == 1
    assert len(load_rows(write(tmp_path, GOOD + b"\n" + GOOD, "lines.json"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "no rows (the array is empty)"),
        (b"[\n{]", ":2:2: malformed JSON (Expecting property name"),
        (b"[\n" + GOOD + b"\n" + GOOD + b"]", ":3:1: malformed JSON (Expecting ',' or ']') in element 1; repair"),
        (b"[" + GOOD + b",\n]", ":2:1: malformed JSON (Expecting value)"),
        (b"[" + GOOD, ":1:41: malformed JSON (Expecting ',' or ']') in element 1; repair"),
        (b"[" + GOOD + b", " + GOOD + b', {"prompt": "q"}]', "t.json: element 3: 'prompt' without 'completion'"),
        (b"[" + GOOD + b', {"prompt"}]', ":1:52: malformed JSON (Expecting ':' delimiter) in element 2; repair"),
        (b"[" + GOOD + b', {"a": 1, "a": 2}]', "t.json: element 2: the key 'a' appears twice"),
        (b"[1, 2,\n3]", "t.json: element 1: the row is int, not an object"),
        (b"[" + GOOD + b"]\n x", ":2:2: malformed JSON (text after the array)"),
        (b"[\n\n1]", ":3: the row is int, not an object"),
        (b'[\n{"prompt": "q"},\n{"prompt": "q"}]', ":2: 'prompt' without 'completion'"),
        (b'[\n{"prompt": "q"},\n{"prompt": "q"}]', "(2 bad rows at lines: 2, 3)"),
        (b'[\n{"a": 1, "a": 1}]', ":2: the key 'a' appears twice"),
        (b'[\n{"a": "\xe9"}]', ":2: byte 0xE9 at byte offset 9 is not UTF-8"),
        (b"[\n\n\0]", ":3: NUL byte at byte offset 3"),
        (b"[" * 100_000, "nested too deep"),
        (gzip.compress(b"[]"), "gzip-compressed"),
        (b'{\n "prompt": "q"\n}', ":1:2: the line ends inside a value"),
    ],
    ids=range(19),
)
def test_bad_json_arrays(tmp_path, content, message):
    path = write(tmp_path, content, "t.json")
    assert message in fault(path, load_rows)


def test_json_array_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_ARRAY_BYTES", 10)
    assert "write it as .jsonl" in fault(write(tmp_path, b"[" + GOOD + b"]"), read_json)


# --- fuzz -------------------------------------------------------------------------------------------------------------

_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "completion", "messages", "question", "answer", "role", "content", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
_lines = st.lists(
    st.just(GOOD) | st.binary(max_size=30) | _json_values.map(lambda v: json.dumps(v).encode()), max_size=4
)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200) | _lines.map(b"\n".join), name=st.sampled_from(["f.jsonl", "f.json"]))
@example(content=b"\xef\xbb\xbf[", name="f.json")
@example(content=b"[1,", name="f.json")
@example(content=b'{"":"', name="f.jsonl")
def test_any_bytes_give_rows_or_a_one_line_data_error(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    rows, message = None, f"{path}: no fault"
    try:
        rows = load_rows(path)
    except DataError as error:
        message = str(error)
    assert message.isprintable()
    assert message.startswith(f"{path}:")
    assert rows is None or (rows and all(row.answer.strip() for row in rows))


# --- load_rows --------------------------------------------------------------------------------------------------------


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    path = write(tmp_path, GOOD + b"\n" + GOOD + b"\nbroken\n")
    assert [row.source for row in load_rows(path, limit=2)] == [f"{path}:1", f"{path}:2"]
    assert ":3:1: malformed" in fault(path, load_rows)


@pytest.mark.parametrize("limit", [0, -1, True, 2.0, "3"])
def test_wrong_limit(limit):
    with pytest.raises(ConfigError, match=r"limit is .*; give a whole number"):
        load_rows("builtin:word-problems", limit=limit)


def test_builtin_sets():
    rows = load_rows("builtin:word-problems", split="test", limit=3, seed=5)
    assert [row.source for row in rows] == [f"builtin:word-problems[test]:{i}" for i in range(3)]
    with pytest.raises(
        ConfigError,
        match=r"no built-in data set 'builtin:word-problem'; choose builtin:word-problems, builtin:preferences, "
        r"builtin:unpaired-preferences$",
    ):
        load_rows("builtin:word-problem")
    with pytest.raises(ConfigError, match="no split 'dev'; use train or test"):
        load_rows("builtin:word-problems", split="dev")


@pytest.mark.parametrize("name", ["train.jsonl", "./train", "../x/y", "/abs/train", "a/b/c", "dir\\train", "~/train"])
def test_what_looks_like_a_file_is_never_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "no such file" in fault(name, load_rows)
    assert "datasets package" not in fault(name, load_rows)


class FakeHub:
    """Stands for the datasets module: the network is the only part replaced."""

    def __init__(self, rows=(), error=None):
        self.rows, self.error, self.calls = rows, error, []

    def load_dataset(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        if self.error:
            raise self.error
        import datasets as real

        return real.Dataset.from_list(list(self.rows))


def hub(monkeypatch, **kwargs) -> FakeHub:
    import datasets

    fake = FakeHub(**kwargs)
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    return fake


def test_hub_rows_are_converted_by_the_same_rules(monkeypatch):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    fake = hub(monkeypatch, rows=[{"messages": turns}, {"messages": turns}])
    rows = load_rows("user/set:main", split="test", limit=5)
    assert fake.calls == [(("user/set", "main"), {"split": "test"})]
    assert [row.source for row in rows] == ["user/set:main[test]:0", "user/set:main[test]:1"]
    assert rows[0].messages == (Message("user", "q"), Message("assistant", "a"))
    assert len(load_rows("user/set", limit=1)) == 1
    assert fake.calls[1] == (("user/set",), {"split": "train"})


def test_hub_faults_are_one_line(monkeypatch):
    hub(monkeypatch, error=ConnectionError("no\nroute " + "x" * 500))
    message = fault("user/set", load_rows)
    assert message.startswith("user/set[train]: cannot be loaded from the hub (ConnectionError: no\\nroute ")
    assert "or use a local .jsonl file or builtin:word-problems" in message
    assert len(message) < 400
    hub(monkeypatch, rows=[{"question": "q", "answer": "a"}, {"question": "q", "answer": None}])
    assert fault("set", load_rows) == "set[train]:1: 'answer' is null; fill it in or remove the row"
    hub(monkeypatch, rows=[])
    assert "no rows; choose another split" in fault("set", load_rows)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'dude-peft[train]'" in fault("set", load_rows)


# --- what a run records -----------------------------------------------------------------------------------------------


def row(*contents: str, source: str = "s:1") -> Row:
    roles = ["user", "assistant"] * len(contents)
    return Row(tuple(map(Message, roles, contents)), source)


def test_hash_follows_content_and_order_but_not_source():
    a, b = row("q", "a"), row("r", "b")
    assert data_sha256([a, b]) == data_sha256([row("q", "a", source="other:9"), b])
    hashes = [[a, b], [b, a], [a], [a, b, b], [row("q", "a", "r", "b")], [row("qa", "")], []]
    assert len({data_sha256(rows) for rows in hashes}) == len(hashes)
    assert data_sha256([a]) == hashlib.sha256(b'[["user","q"],["assistant","a"]]\n').hexdigest()


def test_duplicates_and_overlap_are_counted():
    a, b, c = row("q", "a"), row("q", "b"), row("r", "a", source="s:9")
    assert duplicates([a, b, c]) == 0
    assert duplicates([a, c, row("q", "a", source="s:7"), a]) == 2
    assert overlap([a, b], [c]) == 0
    assert overlap([a], [b, c, a]) == 2  # b asks the same with another answer: leaked too


def test_the_data_room_imports_nothing_heavy():
    code = "import sys, dude_peft.data; print({'torch','transformers','datasets','jinja2','numpy'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout == "set()\n", out.stderr


@pytest.mark.assets
def test_real_gsm8k_loads():
    folder = os.environ.get("DUDE_ASSETS")
    path = Path(folder or "", "gsm8k", "train.jsonl")
    if not folder or not path.exists():
        pytest.skip("DUDE_ASSETS does not name a folder with gsm8k/train.jsonl")
    rows = load_rows(path)
    assert len(rows) == 7473
    assert duplicates(rows) == 0
    assert overlap(rows, load_rows(path.with_name("test.jsonl"))) == 0
    json_rows = load_rows(Path(folder, "commonsense", "ARC-Easy", "train.json"), limit=10)
    assert len(json_rows) == 10
