"""The command by subprocess: what it prints and exits with, and that it starts without the heavy libraries."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from served import children_seconds, dude, fresh
from tiny import save_tiny, write_rows

from dude_peft.version import __version__

PRODUCTS = {
    "adapter", "checkpoints", "run.json", "config.yaml", "metrics.jsonl", "loss.png", "page.html", "report.json",
}  # fmt: skip


def assert_refused(done: subprocess.CompletedProcess[str], code: int, label: str) -> str:
    """One line on stderr with this label, no traceback; returns it."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"dude: error[{label}]: ")
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model, rows and a configuration of a run of a second."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "test.jsonl", 8, start=100)
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    settings = {
        "model": {"name_or_path": "model"},
        "adapter": {"r": 4},
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "train": {"learning_rate": 0.01, "max_steps": 7, "logging_steps": 3},
        "evaluation": {"rows": 6, "max_new_tokens": 6, "samples": 2},
        "output_dir": "out",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def finished(place) -> subprocess.CompletedProcess[str]:
    """The command run once, for the tests that look at what it left."""
    done = dude("train", "run.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    return done


# --- a run that works ---------------------------------------------------------------------------------------------


def test_a_run_leaves_all_its_files(place, finished):
    assert {path.name for path in (place / "out").iterdir()} == PRODUCTS
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (place / "out/adapter").iterdir()}
    assert (place / "out/loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_object_a_line_and_the_last_step(place, finished):
    lines = [json.loads(line) for line in (place / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    keys = {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "epoch",
        "tokens",
        "tokens_per_second",
        "memory_bytes",
        "seconds",
    }
    assert all(set(line) == keys for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_report_says_what_ran_and_what_came_out(place, finished):
    report = json.loads((place / "out/report.json").read_text())
    assert report["method"] == "dude"
    assert report["steps"] == 7
    assert report["config"] == yaml.safe_load((place / "out/config.yaml").read_text())
    assert report["versions"]["dude_peft"] == __version__
    assert {"torch", "transformers", "peft", "python"} <= set(report["versions"])
    assert len(report["data"]["train"]["sha256"]) == 64
    assert report["data"]["train"]["rows"] == 24
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["after"]["rows"] == 6
    low, high = report["after"]["interval"]
    assert low <= report["after"]["right"] / 6 <= high
    assert {"model", "adapter", "evaluation_before", "training", "evaluation_after", "total"} <= set(report["seconds"])
    ours = [text for text in report["warnings"] if "copy construct" not in text]  # transformers 5.3 has one of its own
    assert [warning.split()[0] for warning in ours] == ["train.learning_rate"]


def test_the_output_shows_progress_samples_and_result_as_plain_lines(finished):
    text = finished.stdout
    assert "step 7/7  loss " in text
    assert "tokens/s" in text
    assert "the start equals the base model bit by bit" in text
    assert "expected: yes" in text
    assert "exact match" in text
    assert "\x1b" not in text
    assert finished.stderr == ""


# --- runs that cannot work ----------------------------------------------------------------------------------------


def test_an_output_folder_with_something_in_it_is_left_alone(place, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    before = children_seconds()
    line = assert_refused(fresh("train", "run.yaml", "--output-dir", tmp_path, cwd=place), 2, "config")
    assert children_seconds() - before < 5  # before torch is imported
    assert "--overwrite" in line
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("overrides", "code", "label", "hint"),
    [
        (["train.learning_rat=1"], 2, "config", "closest: 'train.learning_rate'"),
        (["model.name_or_path=./nowhere"], 2, "config", "no folder ./nowhere"),
        (["model.name_or_path=package:no_such_package"], 2, "config", "pip install"),
        (["model.name_or_path=run.yaml"], 2, "config", "is a file"),
        (["data.train=nowhere.jsonl"], 3, "data", "nowhere.jsonl"),
        (["data.train=bad.jsonl"], 3, "data", "bad.jsonl:2"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(place, tmp_path, overrides, code, label, hint):
    changes = [part for override in overrides for part in ("--set", override)]
    done = dude("train", "run.yaml", "--output-dir", tmp_path / "deep" / "out", *changes, cwd=place)
    assert hint in assert_refused(done, code, label)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "run.yaml", "--overwrit"], ["--nothing"]])
def test_wrong_usage_exits_with_2(arguments):
    done = dude(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["merge", "runs/mine/adapter"], "example: dude merge runs/mine/adapter -o merged"),
        (["train"], "example: dude train run.yaml --set train.max_steps=80"),
        (["train", "run.yaml", "--learning-rate", "3e-4"], "--set train.learning_rate=VALUE"),
        (
            ["train", "run.yaml", "--lr", "3e-4"],
            "--lr; for a key of the run: --set train.learning_rate=VALUE",
        ),
        (["plan", "run.yaml", "--lora_rank", "8"], "--set adapter.r=VALUE"),
        (["train", "run.yaml", "--outputdir", "x"], "--output-dir"),
        (["merge", "a", "-o", "b", "--lora_rank", "8"], "example: dude merge runs/mine/adapter -o merged"),
    ],
)
def test_wrong_usage_shows_what_to_write(arguments, hint):
    assert hint in assert_refused(dude(*arguments), 2, "config")


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "mine"], ["merge", "runs/a", "-o", "out"], ["chat", "runs/a"], ["upload", "runs/a", "me/mine"],
        ["export", "mine", "--to", "peft", "-o", "out"], ["generate", "runs/a", "hi"],
        ["eval", "runs/a", "-o", "out", "--tasks", "nosuch"],
        ["eval", "runs/a", "-o", "out", "--processes", "2"],
        ["verify", "runs/a/adapter"], ["merge", ".", "./nowhere", "-o", "out"], ["chat", "/nowhere"],
        ["export", "../nowhere", "--to", "peft", "-o", "out"], ["generate", "runs/a/adapter", "hi"],
        ["eval", "runs/a/adapter", "-o", "out"], ["upload", "runs/a/adapter", "me/mine"],
    ],
)  # fmt: skip
def test_a_folder_that_is_not_there_is_told_at_once(arguments, tmp_path):
    done = dude(*arguments, cwd=tmp_path)
    assert "no such folder" in assert_refused(done, 4, "artifact")
    assert list(tmp_path.iterdir()) == []


def test_control_characters_do_not_reach_the_terminal():
    line = assert_refused(dude("train", "\x1b[31mred\x07\n.yaml"), 2, "config")
    assert "\x1b" not in line
    assert "\x07" not in line


def interrupted(arguments, line_start, cwd=None, held_down=False):
    """Exit code and standard error of the command, stopped by Ctrl-C when a line with that start appears."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dude_peft.cli", *map(str, arguments)],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        # A suite that was started in the background has Ctrl-C switched off, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(line_start):
                break
        process.send_signal(signal.SIGINT)
        while held_down and process.poll() is None:
            time.sleep(0.01)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors


def test_ctrl_c_exits_with_130(place, tmp_path):
    arguments = ["train", "run.yaml", "--output-dir", tmp_path / "out", "--set", "train.max_steps=100000"]
    code, errors = interrupted(arguments, "step ", place)
    assert code == 130, errors
    assert errors.startswith("dude: error[interrupted]: ")
    assert not (tmp_path / "out/adapter").exists()


_INTERRUPTED_IMPORT = """
import sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == {name!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
sys.argv = ["dude", "verify", "."]
from dude_peft.__main__ import main
main()
"""


@pytest.mark.parametrize("name", ["typer", "dude_peft.kinds", "dude_peft.exporting.verify", "torch"])
def test_ctrl_c_during_an_import_is_one_line_and_130(name, tmp_path):
    program = _INTERRUPTED_IMPORT.format(name=name)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert assert_refused(done, 130, "interrupted") == "dude: error[interrupted]: stopped by Ctrl-C"


def test_ctrl_c_before_a_command_begins_has_its_line():
    program = "import dude_peft.cli as c; c.app = lambda **_: 130; c.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert assert_refused(done, 130, "interrupted") == "dude: error[interrupted]: stopped by Ctrl-C"


@pytest.mark.slow
def test_ctrl_c_held_down_still_leaves_one_line_and_its_code(place, tmp_path):
    arguments = ["train", "run.yaml", "--output-dir", tmp_path / "out", "--set", "train.max_steps=100000"]
    code, errors = interrupted(arguments, "step ", place, held_down=True)
    assert code == 130, errors
    assert errors.strip().splitlines()[-1].startswith("dude: error[interrupted]: stopped by Ctrl-C")
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_closed_pipe_does_not_end_the_run(place, tmp_path):
    quick = "--set evaluation.enabled=false"
    command = f"{sys.executable} -m dude_peft.cli train run.yaml --output-dir {tmp_path / 'out'} {quick} | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/report.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "run.yaml", "--set", "output_dir={name}"),
        ("eval", "out/adapter", "--text", "{name}", "-o", "scores"),
        ("generate", "out/adapter", "hello", "-o", "{name}"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_no_file_system_takes(place, finished, arguments):
    done = dude(*(argument.format(name="x" * 300) for argument in arguments), cwd=place)
    assert "long" in assert_refused(done, 2, "config")


# --- starting fast ------------------------------------------------------------------------------------------------


def test_help_and_version():
    assert "train" in fresh("--help").stdout
    assert "--set" in dude("train", "--help").stdout
    assert dude("--version").stdout.strip() == f"dude {__version__}"


def test_the_command_starts_without_the_heavy_libraries():
    heavy = ("torch", "transformers", "peft", "matplotlib", "datasets", "numpy", "accelerate")
    code = f"import sys, dude_peft.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
