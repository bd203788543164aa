"""The readers of tables, Parquet and plain text: what becomes a row, and where a fault is."""

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dude_peft.data import Message, load_rows, text_file
from dude_peft.data.rows import stream_rows
from dude_peft.errors import ConfigError, DataError


def write(folder: Path, content: str | bytes, name: str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(path: Path) -> str:
    with pytest.raises(DataError) as info:
        load_rows(path)
    assert str(info.value).isprintable()
    return str(info.value)


# --- csv and tsv ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "mark"), [("t.csv", ","), ("t.tsv", "\t")])
def test_cells_may_hold_quotes_separators_and_line_breaks(tmp_path, name, mark, end):
    lines = [f"question{mark}id{mark}answer", f'"a{mark} ""b""\nc"{mark}1{mark}"x"', "", f'5" pipe{mark}{mark}"y\n"']
    path = write(tmp_path, "\ufeff" + end.join(lines) + end, name)
    rows = load_rows(path)
    assert [(row.prompt[0].content, row.answer) for row in rows] == [(f'a{mark} "b"\nc', "x"), ('5" pipe', "y\n")]
    assert [row.source for row in rows] == [f"{path}:2", f"{path}:5"]  # the first lines of the records
    assert rows[0].shape == "question + answer"


def test_columns_of_every_shape(tmp_path):
    alpaca = write(tmp_path, "instruction,input,output\nq,,a\nq,x,a\n", "a.csv")
    assert [row.prompt[0].content for row in load_rows(alpaca)] == ["q", "q\n\nx"]
    plain = write(tmp_path, "text\nabc\n", "b.csv")
    assert load_rows(plain)[0].messages == (Message("text", "abc"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows (the file is empty); the first line names the columns"),
        ("question,answer\n", "no rows below the column names"),
        (
            "1+1,2\n2+2,4\n",
            ":1: the first line names the columns, and no known format in the columns ('1+1', ",
        ),
        ("question,answer,question\n", ":1: the column 'question' is named twice; keep one"),
        ("question;answer\nq;a\n", ":1: the cells stand between ';', not ','; convert the file"),
        ("question,answer\nq,a\nq\nq,a,b\n", ":3: 1 cells, but the first line names 2 columns; quote cells that hold"),
        ("question,answer\nq,a\nq\nq,a,b\n", "(2 bad lines: 3, 4)"),
        ("question,answer\nq,\n", ":2: 'answer' is null; fill it in or remove the row"),
        ('question,answer\n"q"x,a\n', ":2: broken quoting ("),
        ('question,answer\nq,a\n"q,a\nr,b\n', ":3: a quote that begins in this row is never closed"),
        (b"question,answer\nq,caf\xe9\n", ":2: byte 0xE9 at byte offset 21 is not UTF-8"),
        ("question,answer\nq,a\0\n", ":2: NUL byte at byte offset 19"),
        (b"\x1f\x8b", "gzip-compressed"),
    ],
    ids=range(13),
)
def test_bad_tables(tmp_path, content, message):
    path = write(tmp_path, content, "t.csv")
    assert fault(path).startswith(str(path))
    assert message in fault(path)


def test_a_quote_that_is_never_closed_reads_no_more_than_a_cell_may_hold(tmp_path, monkeypatch):
    from dude_peft.data import table

    monkeypatch.setattr(table, "MAX_LINE_BYTES", 0)
    path = write(tmp_path, 'question,answer\n"q' + "x\n" * 200_000, "t.csv")
    assert ":2: a quote that begins in this row is never closed" in fault(path)


def test_limit_is_exact_and_reads_no_further(tmp_path):
    path = write(tmp_path, 'question,answer\nq,a\nr,b\n"broken', "t.csv")
    assert len(load_rows(path, limit=2)) == 2
    bad_before = write(tmp_path, "question,answer\nq,\nr,b\ns,c\n", "u.csv")
    with pytest.raises(DataError, match=r":2: 'answer' is null"):
        load_rows(bad_before, limit=2)


# --- parquet ----------------------------------------------------------------------------------------------------------


def parquet(folder: Path, rows: list[dict], name: str = "t.parquet") -> Path:
    import pyarrow
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


def test_parquet_rows(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = parquet(tmp_path, [{"messages": turns, "score": 1.0}] * 600)
    rows = load_rows(path)
    assert len(rows) == 600
    assert rows[599].source == f"{path}:600"
    assert rows[0].messages == (Message("user", "q"), Message("assistant", "a"))
    assert len(load_rows(path, limit=3)) == 3


def test_bad_parquet(tmp_path):
    message = fault(parquet(tmp_path, [{"question": "q", "answer": a} for a in ("x", None, "y", None)]))
    assert message.endswith(":2: 'answer' is null; fill it in or remove the row (2 bad rows: 2, 4)")
    assert ": no known format in the columns ('a'); use prompt" in fault(parquet(tmp_path, [{"a": "b"}]))
    whole = parquet(tmp_path, [{"question": "q", "answer": "a"}]).read_bytes()
    assert "is not a readable Parquet file (" in fault(write(tmp_path, whole[:-9], "u.parquet"))
    assert "is not a readable Parquet file (" in fault(write(tmp_path, b"", "v.parquet"))


def test_a_parquet_column_or_key_that_is_there_twice_is_refused(tmp_path):
    """The last one would win, without a word."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    answers = [pa.array([text]) for text in ("q", "first", "second")]
    writer.write_table(
        pa.Table.from_arrays(answers, names=["prompt", "completion", "completion"]), tmp_path / "t.parquet"
    )
    assert ": the column 'completion' is there twice; keep one" in fault(tmp_path / "t.parquet")
    texts = [pa.array([each] * 2) for each in ("user", "q", "q2")]
    turns = pa.StructArray.from_arrays(texts, names=["role", "content", "content"])
    writer.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 2], turns)}), tmp_path / "s.parquet")
    assert "is not a readable Parquet file (" in fault(tmp_path / "s.parquet")


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    path = parquet(tmp_path, [{"question": "q", "answer": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "Parquet files need the pyarrow package: pip install 'dude-peft[train]'" in fault(path)


# --- plain text -------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_in_passages_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "PASSAGE_CHARACTERS", 20)
    text = "one two three\n\nfour five\nsix\nseven eight nine ten eleven\nend"
    path = write(tmp_path, text, "t.txt")
    rows = load_rows(path)
    assert "".join(row.answer for row in rows) == text
    assert rows[0].answer == "one two three\n\n"
    assert [row.messages[0].role for row in rows] == ["passage"] * (len(rows) - 1) + ["text"]
    numbers = [int(row.source.rpartition(":")[2]) for row in rows]
    starts = [1, *(1 + n for n in itertools.accumulate(row.answer.count("\n") for row in rows[:-1]))]
    assert numbers == starts
    assert [row.messages[0].role for row in load_rows(path, limit=1)] == ["passage"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no text (the file is empty or blank); add some text"),
        ("\n \n", "no text"),
        (b"ok\ncaf\xe9", ":2: byte 0xE9 at byte offset 6 is not UTF-8"),
        (b"\xff\xfea\0", "UTF-16 (byte offset 0)"),
    ],
)
def test_bad_text(tmp_path, content, message):
    assert message in fault(write(tmp_path, content, "t.txt"))


# --- mixtures in memory -----------------------------------------------------------------------------------------------


def test_rows_come_one_at_a_time(tmp_path):
    path = write(tmp_path, '{"text": "a"}\n' * 3 + "broken\n", "t.jsonl")
    rows = stream_rows(path)
    assert next(rows).answer == "a"  # the fault is behind it
    with pytest.raises(DataError, match=":4:1: malformed"):
        list(rows)


def test_load_rows_of_a_mixture(tmp_path):
    from dude_peft.data.mixture import Part

    for name, count in (("a", 6), ("b", 2)):
        write(tmp_path, "".join(f'{{"text": "{name}{i}"}}\n' for i in range(count)), f"{name}.jsonl")
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    rows = load_rows([Part(a, "train", None, 1.0), Part(b, "train", None, 1.0)], limit=8)
    assert [row.answer for row in rows if row.answer[0] == "b"] == ["b0", "b1"] * 2
    assert len({row.answer for row in rows}) == 4 + 2
    assert len(load_rows([Part(a, "train", 2), Part(b, "train")])) == 4
    with pytest.raises(ConfigError, match="only some sources of the mixture have a weight"):
        load_rows([Part(a, "train", None, 1.0), Part(b, "train")])


# --- fuzz -------------------------------------------------------------------------------------------------------------

_words = st.sampled_from(["question", "answer", "text", ",", "\t", '"', "\n", "\r\n", "q", " ", "é", "\0"])
_table = st.lists(_words, max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    content=st.binary(max_size=200) | _table.map(lambda parts: ("question,answer\n" + "".join(parts)).encode()),
    name=st.sampled_from(["f.csv", "f.tsv", "f.txt", "f.parquet"]),
)
@example(content=b"question,answer\n\r\n", name="f.csv")
@example(content=b"PAR1PAR1PAR1", name="f.parquet")
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
