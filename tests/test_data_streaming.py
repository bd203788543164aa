"""data.streaming, and rows one at a time: from the hub, of mixtures, for the plan, and the memory that many take."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import fake_hub
from tiny import SPECIAL, save_tiny, tiny_llama, tiny_tokenizer, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dude_peft.config.schema import DataSection
from dude_peft.data import Template, load_rows
from dude_peft.data.encode import Encoder
from dude_peft.data.formats import Reading
from dude_peft.data.mixture import Part, mix
from dude_peft.data.prepare import prepare
from dude_peft.data.rows import stream_any
from dude_peft.errors import DataError
from dude_peft.planning import rows as planned

STREAM = Reading(streaming=True)
RECORDS = [{"prompt": f"say {number}", "completion": "yes"} for number in range(9)]


class Hub:
    """In place of `datasets.load_dataset`: real data sets, and what was asked of it."""

    def __init__(self, records: list[dict[str, str]], lost_at: int | None = None) -> None:
        self.records, self.lost_at, self.asked = records, lost_at, []

    def load_dataset(self, *_: Any, **options: Any) -> Any:
        self.asked.append(options.get("streaming", False))
        if not options.get("streaming"):
            return datasets.Dataset.from_list(self.records)
        return datasets.IterableDataset.from_generator(self.stream)

    def stream(self) -> Any:
        for number, record in enumerate(self.records):
            if number == self.lost_at:
                raise ConnectionError("gone")
            yield record


def hub(monkeypatch, records: list[dict[str, str]] = RECORDS, **options: Any) -> Hub:
    made = Hub(records, **options)
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    return made


def told(*arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(*arguments, **options)
    return str(caught.value)


# --- the hub --------------------------------------------------------------------------------------------------------


def test_streamed_rows_are_those_of_the_copy(monkeypatch):
    made = hub(monkeypatch)
    assert load_rows("user/set", reading=STREAM) == load_rows("user/set")
    assert load_rows("user/set", limit=4, reading=STREAM) == load_rows("user/set", limit=4)
    assert made.asked == [True, False, True, False]


def test_a_stream_that_breaks_off_is_told_with_its_row(monkeypatch):
    hub(monkeypatch, lost_at=5)
    message = told("user/set", reading=STREAM)
    assert message.startswith("user/set[train]:5: cannot be read from here on (ConnectionError: gone); ")
    assert len(load_rows("user/set", limit=5, reading=STREAM)) == 5  # nothing behind them is asked for


def test_streamed_or_copied_the_tokens_are_the_same_files(monkeypatch, tmp_path):
    tokenizer = tiny_tokenizer()
    options = {"max_length": 64, "cache": tmp_path / "cache"}
    hub(monkeypatch)
    first = prepare("user/set", Template(tokenizer), tokenizer, streaming=True, **options)
    monkeypatch.setattr(Encoder, "examples", lambda *_: pytest.fail("tokenised again"))
    for streaming in (True, False):
        again = prepare("user/set", Template(tokenizer), tokenizer, streaming=streaming, **options)
        assert (again.sha256, list(again)) == (first.sha256, list(first))


def test_rows_that_change_between_hashing_and_tokenising_are_refused(monkeypatch, tmp_path):
    tokenizer = tiny_tokenizer()
    made = hub(monkeypatch)
    original = made.load_dataset

    def changing(*arguments: Any, **options: Any) -> Any:
        if made.asked:
            made.records = RECORDS[:-1]
        return original(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", changing)
    with pytest.raises(DataError, match=r"user/set\[train\]: the rows changed while they were read; start again"):
        prepare("user/set", Template(tokenizer), tokenizer, max_length=64, streaming=True, cache=tmp_path / "cache")
    assert not any((tmp_path / "cache" / "tokens").glob("*/manifest.json"))


# --- mixtures, and the plan -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(None, None), (1.0, 1.0), (5.0, 1.0)])
@pytest.mark.parametrize("limit", [None, 7, 40])
def test_a_mixture_row_by_row_is_the_choice_of_its_sources(tmp_path, weights, limit):
    names = [write_rows(tmp_path / f"{size}.jsonl", size, start=100 * size) for size in (4, 11)]
    parts = [Part(str(name), "train", weight=weight) for name, weight in zip(names, weights, strict=True)]
    sets = [load_rows(name) for name in names]
    chosen = mix([4, 11], weights, limit, 3)
    expected = [rows[index] for rows, indices in zip(sets, chosen, strict=True) for index in indices]
    assert list(stream_any(parts, limit=limit, seed=3)) == expected


def test_the_plan_counts_evenly_spaced_rows_of_many(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", 45)
    data = DataSection(train=str(path), test=0.2)
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    all_rows = planned.count_rows(data, tokenizer, model)
    assert (all_rows.counted, all_rows.rows, all_rows.longest) == (45, 36, max_tokens := all_rows.longest)
    monkeypatch.setattr(planned, "_MOST_ROWS", 10)
    few = planned.count_rows(data, tokenizer, model)
    assert (few.counted, few.rows, few.longest) == (9, 36, 512)
    assert abs(few.tokens_per_row - all_rows.tokens_per_row) < 0.2 < max_tokens


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    text: str
    anonymous_mib: int
    """Most memory that was no page of a file, which the system takes back when it wants to."""


def command(*arguments: object, **environment: str) -> Ended:
    """`dude ARGUMENTS` in a process of its own, watched: libraries read HF_HOME and HF_ENDPOINT when imported."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    started = [sys.executable, "-m", "dude_peft", *map(str, arguments)]
    most = 0
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                most = max(most, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
            except (OSError, TypeError):  # it has just ended
                pass
            time.sleep(0.02)
        assert process.stdout is not None
        return Ended(process.returncode, process.stdout.read(), most >> 10)


def configuration(folder: Path, **data: Any) -> Path:
    """A run of a few steps on the model of `folder`."""
    settings = {
        "model": {"name_or_path": str(folder / "model")},
        "adapter": {"r": 4},
        "data": data,
        "train": {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01},
        "evaluation": {"rows": 2, "max_new_tokens": 2},
        "output_dir": str(folder / "out"),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return path


def parquet(count: int) -> dict[str, bytes]:
    """The files of a data set with `count` rows."""
    columns = {"prompt": [f"say {number}" for number in range(count)], "completion": ["yes"] * count}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=50)
    return {"data/train-00000-of-00001.parquet": file.getvalue()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_streams_a_hub_set_copies_none_of_it_and_knows_it_again(tmp_path):
    save_tiny(tmp_path / "model")
    path = configuration(tmp_path, train="owner/set", test=0.1, streaming=True)
    own = {"DUDE_CACHE": str(tmp_path / "cache")}

    def copies() -> list[Path]:
        return [file for kind in ("*.parquet", "*.arrow") for file in (tmp_path / "home").rglob(kind)]

    with fake_hub(tmp_path / "home", parquet(500)) as hub:
        check = command("data", "check", "owner/set", "--model", tmp_path / "model", "--streaming", **hub, **own)
        assert "examples: 500" in check.text, check.text
        first = command("train", path, "--no-page", **hub, **own)
        assert first.code == 0, first.text
        assert copies() == []
        copied = command("train", path, "--set", "data.streaming=false", **hub, **own)
        assert copied.code == 0, copied.text  # the same rows, and so the same run, which is done
        assert copies()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["data"]["train"]["examples"] == 450
    with fake_hub(tmp_path / "home", parquet(499)) as hub:
        other = command("train", path, **hub, **own)
    assert other.code == 3, other.text
    assert "data.train: the rows differ from those that this run started with" in other.text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_memory_of_a_run_does_not_follow_its_rows(tmp_path):
    """200 MB of rows against 2 MB: what grows is some bytes a row, for lengths, hashes and the order of an epoch."""
    words = [f"word{number}" for number in range(5000)]
    vocabulary = {word: number for number, word in enumerate(["<unk>", *SPECIAL[:2], *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(SPECIAL[:2])
    names = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[1], "unk_token": "<unk>"}
    tiny_llama(vocab_size=len(vocabulary)).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(tmp_path / "model")
    draw = random.Random(0)
    test = write_rows(tmp_path / "test.jsonl", 6, start=10**8)
    peaks = {}
    for megabytes in (2, 200):
        path, size, rows = tmp_path / f"{megabytes}.jsonl", 0, 0
        with path.open("w") as file:
            while size < megabytes * 10**6:
                answer = " ".join(draw.choices(words, k=40))
                size += file.write(json.dumps({"prompt": f"say {rows}", "completion": answer}) + "\n")
                rows += 1
        config = configuration(tmp_path, train=str(path), test=str(test))
        options = ["--overwrite", "--no-page"]
        ended = command("train", config, *options, DUDE_CACHE=str(tmp_path / "cache"))
        assert ended.code == 0, ended.text
        peaks[megabytes] = ended.anonymous_mib
    assert peaks[200] < peaks[2] + 64, peaks  # 13 were measured
