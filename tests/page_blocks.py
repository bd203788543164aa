"""The code blocks of a Markdown page, run as a reader would run them: on a tiny model, in a folder of the page's own.

python   one after the other, in one namespace
bash     `dude` commands, each ends with 0
yaml     keys and values of a run's configuration
json     rows of data
console  what cannot run here, and transcripts: not run
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from models import tokens
from PIL import Image
from served import dude
from tiny import save_tiny, write_rows

from dude_peft.comparison.cells import Grid
from dude_peft.methods import METHODS

_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.S | re.M)
_HUB_MODEL = re.compile(r"HuggingFaceTB/SmolLM2-135M-Instruct")
RUN = {
    "model": {"name_or_path": "my-model"},
    "adapter": {"r": 4},
    "data": {"train": "mine.jsonl", "test": 0.1, "max_length": 64},
    "train": {"max_steps": 2, "per_device_train_batch_size": 2},
    "evaluation": {"rows": 2, "max_new_tokens": 4},
    "output_dir": "runs/mine",
}
"""The run.yaml beside a page: `my-model` is two layers wide, so a run takes two steps."""


def blocks(page: Path, *kinds: str) -> list[tuple[str, str]]:
    """(kind, text) of a page's code blocks, in order; with kinds, of these alone."""
    found = _BLOCK.findall(page.read_text("utf-8"))
    return [(kind, text) for kind, text in found if not kinds or kind in kinds]


def make_folder(folder: Path) -> Path:
    """What pages speak of: my-model, run.yaml, rows of every kind, pictures/a.png."""
    save_tiny(folder / "my-model")
    write_rows(folder / "mine.jsonl", 40)
    write_rows(folder / "test.jsonl", 4, start=40)
    texts = [f"General text, sentence {number}, of no use but to be read." for number in range(8)]
    (folder / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "general.txt").write_text("\n".join(texts * 4) + "\n")
    questions = [{"prompt": f"say {number}"} for number in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "pictures" / "a.png")
    return folder


def add_adapter(folder: Path) -> None:
    """The finished run `runs/mine`; `folder` is the current one."""
    import dude_peft

    dude_peft.train(str(folder / "run.yaml"))


def run_page(page: Path, folder: Path) -> None:
    """Runs a page's blocks in `folder`, which is the current one.

    Raises AssertionError, with the block, where one of them fails.
    """
    names: dict[str, Any] = {"batches": [{"input_ids": tokens(), "labels": tokens()}] * 2}
    with mock.patch.dict(METHODS):  # a page may add a method
        for kind, text in blocks(page):
            text = _HUB_MODEL.sub("my-model", text)
            if kind == "python":
                exec(compile(text, str(page), "exec"), names)
            elif kind == "bash":
                for line in text.replace("\\\n", " ").splitlines():
                    run_command(line, folder)
            elif kind == "yaml":
                check_configuration(text)
            elif kind == "json":
                check_rows(text, folder)


def run_command(line: str, folder: Path) -> None:
    """Runs a line of a bash block; a run that is there already is begun anew."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "dude", f"{line!r} is no dude command; put it into a console block"
    if words[1:2] == ["train"]:
        shutil.rmtree(folder / "runs" / "mine", ignore_errors=True)
    done = dude(*words[1:], cwd=folder)
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


def check_configuration(text: str) -> None:
    """Reads a part of a configuration over that of `run.yaml`."""
    from dude_peft.config.reading import load_config, load_grid

    asked = yaml.safe_load(text)
    if "methods" in asked:
        Grid(*load_grid(asked))
        return
    own = {"num_train_epochs", "curriculum"} & asked.get("train", {}).keys()
    below = {**RUN, "train": {}} if own else RUN
    load_config(_over(below, asked))


def check_rows(text: str, folder: Path) -> None:
    """Reads each line as a row of data in `folder`."""
    from dude_peft.data.formats import Reading

    for line in text.splitlines():
        row = json.loads(line)
        assert Reading(kind="pairs" if "rejected" in row else "answers", folder=folder).row(row, "the page")


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key: _over(below[key], above[key]) for key in below.keys() & above.keys() if isinstance(above[key], dict)}
    return {**below, **above, **both}
