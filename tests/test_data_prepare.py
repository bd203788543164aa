"""The token cache: the same examples as in memory, found again, never trusted when damaged, in bounded memory."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_tokenizer

from dude_peft.data import Template, data_sha256, duplicates, encode, load_rows
from dude_peft.data import overlap as overlap_of_rows
from dude_peft.data.cache_folder import cache_folder
from dude_peft.data.encode import Encoder
from dude_peft.data.mixture import Part, mix
from dude_peft.data.prepare import prepare
from dude_peft.data.token_set import TokenSet, overlap
from dude_peft.errors import ConfigError, DataError, ResourceError


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in rows), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def ready(tmp_path, tokenizer):
    """prepare() with a cache of this test's own."""

    def call(source, *, max_length: int = 64, **options) -> TokenSet:
        template = options.pop("template", Template(tokenizer))
        return prepare(source, template, tokenizer, max_length=max_length, cache=tmp_path / "cache", **options)

    return call


def stores(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tokens").iterdir())


@pytest.fixture
def no_tokenising(monkeypatch):
    """From here on, tokenising anything is a failure."""

    def refuse():
        def examples(self, rows):
            raise AssertionError("tokenised again")

        monkeypatch.setattr(Encoder, "examples", examples)

    return refuse


ROWS = [("a", "b"), ("c", "d" * 90), ("e", "f"), ("a", "b"), ("g", "hi")]


def test_the_set_is_what_encode_makes_in_memory(tmp_path, ready, tokenizer):
    path = write(tmp_path / "t.jsonl", ROWS)
    rows, made = load_rows(path), ready(path)
    expected = encode(rows, Template(tokenizer), tokenizer, 64)
    assert list(made) == [{name: e[name] for name in ("input_ids", "labels")} for e in expected.examples]
    assert made[-1] == made[3]
    assert made[1:3] == [made[1], made[2]]
    assert made.lengths.tolist() == [len(e["input_ids"]) for e in expected.examples]
    assert [made.source(i) for i in range(4)] == [f"{path}:{n}" for n in (1, 3, 4, 5)]
    counts = made.counts
    assert (counts.rows, counts.dropped, counts.tokens, counts.trained_tokens, counts.longest) == (
        5, expected.dropped, expected.tokens, expected.trained_tokens, expected.longest,
    )  # fmt: skip
    assert counts.ended == 4
    assert counts.largest_id == max(max(e["input_ids"]) for e in expected.examples)
    assert made.sha256 == data_sha256(rows)
    assert made.duplicates == duplicates(rows) == 1
    with pytest.raises(IndexError):
        made[4]


def test_the_second_start_reads_the_cache(tmp_path, ready, no_tokenising):
    path = write(tmp_path / "t.jsonl", ROWS)
    first = ready(path)
    no_tokenising()
    assert list(ready(path)) == list(first)
    moved = path.rename(tmp_path / "moved.jsonl")  # found by content, named as it is called now
    assert ready(moved).source(1) == f"{moved}:3"
    assert len(stores(tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 128},
        {"train_on": "all"},
        {"limit": 3},
        {"template": "plain"},
    ],
)
def test_what_decides_the_examples_is_in_the_key(tmp_path, ready, tokenizer, change):
    path = write(tmp_path / "t.jsonl", ROWS)
    ready(path)
    if "template" in change:
        change = {"template": Template(tokenizer, "plain")}
    ready(path, **change)
    assert len(stores(tmp_path)) == 2
    write(path, [*ROWS, ("x", "y")])
    assert len(ready(path)) == 5
    tokenizer.add_tokens(["new"])
    ready(path)
    assert len(stores(tmp_path)) == 4


@pytest.mark.parametrize("name", ["ids", "trained", "starts", "ended", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_cache_is_made_again(tmp_path, ready, name, damage):
    path = write(tmp_path / "t.jsonl", ROWS)
    expected = list(ready(path))
    (folder,) = stores(tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    changed = {"flip": data, "cut": data[:-1], "empty": b""}
    (folder / name).unlink()
    if damage != "gone":
        (folder / name).write_bytes(changed[damage])
    assert list(ready(path)) == expected
    assert stores(tmp_path) == [folder]


def test_nothing_is_left_of_a_set_that_cannot_be_made(tmp_path, ready):
    path = write(tmp_path / "t.jsonl", ROWS)
    with path.open("a") as file:
        file.write("{]\n")
    with pytest.raises(DataError, match=r":6:2: malformed JSON"):
        ready(path)
    assert stores(tmp_path) == []
    long = write(tmp_path / "long.jsonl", [("q", "a" * 200)])
    with pytest.raises(DataError, match=r"long.jsonl: none of the 1 rows fits into max_length 64; the longest needs 2"):
        ready(long)
    with pytest.raises(ConfigError, match="max_length is '1'"):
        ready(tmp_path / "missing.jsonl", max_length=1)
    with pytest.raises(DataError, match=r"no such file; did you mean"):
        ready(tmp_path / "tt.jsonl")


@pytest.mark.slow
def test_two_processes_make_a_set_once(tmp_path, ready):
    path = write(tmp_path / "t.jsonl", [(f"q{i}", "a") for i in range(3000)])
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from tiny import tiny_tokenizer\n"
        "from dude_peft.data import Template\n"
        "from dude_peft.data.prepare import prepare\n"
        "tokenizer = tiny_tokenizer(); made = []\n"
        "options = dict(max_length=64, cache=Path(sys.argv[2]), advance=made.append)\n"
        "print(len(prepare(sys.argv[1], Template(tokenizer, 'plain'), tokenizer, **options)), len(made))"
    )
    program = [sys.executable, "-c", code, str(path), str(tmp_path / "cache"), str(Path(__file__).parent)]
    both = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = sorted(process.communicate(timeout=240)[0] for process in both)
    assert out in (["3000 0\n", "3000 3000\n"],)
    assert len(stores(tmp_path)) == 1


# --- files that change ------------------------------------------------------------------------------------------------


def test_a_file_that_changes_is_noticed(tmp_path, ready):
    path = write(tmp_path / "t.jsonl", ROWS)
    made = ready(path)
    made.verify_unchanged()
    os.utime(path, ns=(1, 1))  # touched, but the bytes are the same
    made.verify_unchanged()
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"t.jsonl: the file was changed while it was in use"):
        made.verify_unchanged()
    path.unlink()
    with pytest.raises(DataError, match="was changed"):
        made.verify_unchanged()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, ready):
    path = write(tmp_path / "t.jsonl", ROWS)

    def append(count: int) -> None:
        with path.open("a") as file:
            file.write("\n")

    with pytest.raises(DataError, match="was changed while it was in use"):
        ready(path, advance=append)
    assert stores(tmp_path) == []


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_mix_gives_each_source_its_share():
    assert [len(each) for each in mix([10, 10], [3.0, 1.0], 12, 0)] == [9, 3]
    assert [len(each) for each in mix([10, 5, 5], [None] * 3, None, 0)] == [10, 5, 5]
    assert [each.tolist() for each in mix([3, 2], [None, None], None, 5)] == [[0, 1, 2], [0, 1]]
    assert [len(each) for each in mix([1, 1, 1], [1.0, 1.0, 1.0], 5, 0)] == [2, 2, 1]
    cycled = mix([4], [1.0], 11, 3)[0].tolist()
    assert cycled[:8] == [0, 1, 2, 3] * 2
    assert len(set(cycled[8:])) == 3
    first, again, other = (mix([100, 100], [1.0, 1.0], 60, seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert first != mix([100, 100], [1.0, 1.0], 60, 1)[1].tolist()
    with pytest.raises(ConfigError, match="999,999,999 rows is more than 10,000,000, the most that 30 can be"):
        mix([10, 20], [1.0, 1.0], 999_999_999, 0)
    with pytest.warns(UserWarning, match=r"source 'b\.jsonl' of the mixture gives no row"):
        mix([10, 10], [1e6, 1.0], 10, 0, ["a.jsonl", "b.jsonl"])
    # pinned: a seed gives the same rows on every machine and with every version of numpy
    assert mix([10], [1.0], 4, 0)[0].tolist() == PINNED


PINNED = [1, 4, 5, 7]


def test_a_mixture_is_a_choice_among_cached_sources(tmp_path, ready, no_tokenising):
    a = write(tmp_path / "a.jsonl", [(f"a{i}", "x") for i in range(8)])
    b = write(tmp_path / "b.jsonl", [("b0", "y"), ("b1", "y")])
    made = ready([Part(str(a), "train", None, 1.0), Part(str(b), "train", None, 1.0)])
    assert len(made) == 10
    from_b = [made.source(i) for i in range(10) if made.source(i).startswith(str(b))]
    assert from_b == [f"{b}:1", f"{b}:2"] * 2 + from_b[4:]
    assert len(from_b) == 5
    assert (made.duplicates, made.counts.rows) == (0, 10)
    assert made.counts.tokens == sum(len(e["input_ids"]) for e in made)
    no_tokenising()
    more = ready([Part(str(a), "train", None, 3.0), Part(str(b), "train", None, 1.0)], seed=1, limit=8)
    assert len(more) == 8
    assert more.sha256 not in (made.sha256, ready(a).sha256)
    assert ready([Part(str(a), "train")]).sha256 == ready(a).sha256


def test_overlap_is_that_of_rows(tmp_path, ready):
    train = write(tmp_path / "a.jsonl", [(f"q{i}", "x") for i in range(20)])
    test = write(tmp_path / "b.jsonl", [("q3", "other"), ("new", "x"), ("q7", "x")])
    assert overlap(ready(train), ready(test)) == overlap_of_rows(load_rows(train), load_rows(test)) == 2


def test_sources_without_a_file(ready):
    made = ready("builtin:word-problems", limit=5, max_length=400)
    assert made.source(4) == "builtin:word-problems[train]:4"
    assert made.sha256 == data_sha256(load_rows("builtin:word-problems", limit=5))
    made.verify_unchanged()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path, ready):
    def peak(count: int) -> int:
        path = write(tmp_path / f"{count}.jsonl", [(f"question {i} " * 20, "answer " * 20) for i in range(count)])
        tracemalloc.start()
        ready(path, max_length=1000)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(10)  # whatever is loaded once
    small, large = peak(1100), peak(6600)
    assert large < 1.2 * small + 2**20, (small, large)


# --- where the cache is -----------------------------------------------------------------------------------------------


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("DUDE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dude"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "dude"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # as a home that cannot be written, for root as well
    assert cache_folder().is_dir()
    assert "dude-cache-" in cache_folder().name
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(ResourceError, match=r"DUDE_CACHE: .* is not writable; set it to another folder"):
        cache_folder()


def test_lengths_are_numbers_that_packing_takes(tmp_path, ready):
    made = ready(write(tmp_path / "t.jsonl", ROWS))
    assert made.lengths.dtype == np.int64
