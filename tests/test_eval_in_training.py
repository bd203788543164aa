"""`evaluation.tasks` of a run, and `dude eval` in several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval", reason="dude eval needs lm_eval, which is not installed here")

from eval_data import save_adapter, save_model, write_data
from safetensors.torch import load_file
from served import dude
from tiny import write_rows

from dude_peft.config.schema import EvaluationSection, RunConfig
from dude_peft.errors import ConfigError, DataError
from dude_peft.evaluation.in_training import TasksOfRun
from dude_peft.evaluation.options import EvalOptions
from dude_peft.evaluation.run import evaluate
from dude_peft.planning.run import plan
from dude_peft.training.loop import Loop
from dude_peft.training.run import run
from dude_peft.training.task_scores import TaskScore, chosen_score

TASKS = ["gsm8k_cot_zeroshot", "mmlu_anatomy"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_data(folder / "data")
    save_adapter(save_model(folder / "model"), folder / "adapter")
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "test.jsonl", 4, start=100)
    (folder / "text.txt").write_text("All the world's a stage.\n" * 600, encoding="utf-8")
    return folder


def settings(place: Path, output: Path, **evaluation: object) -> dict:
    return {
        "model": {"name_or_path": str(place / "model")},
        "adapter": {"r": 4},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl")},
        "train": {"learning_rate": 0.01, "max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4},
        "evaluation": {"rows": 1, "max_new_tokens": 2} | evaluation,
        "output_dir": str(output),
    }


def scored(place: Path, output: Path, **evaluation: object):
    tasks = {"tasks": TASKS, "tasks_data_dir": str(place / "data"), "tasks_limit": 4, "tasks_steps": 2}
    return run(RunConfig(**settings(place, output, **tasks | evaluation)), scorer_of=TasksOfRun, quiet=True)


def as_json(value: object) -> object:
    return json.loads(json.dumps(value, default=vars))


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(place):
    """A run that is scored every second step, and at its end with a general text."""
    output = place / "run"
    return scored(place, output, tasks_text=str(place / "text.txt")), output


def test_scoring_changes_nothing_of_the_training(place, done, tmp_path):
    _, output = done
    run(RunConfig(**settings(place, tmp_path / "plain")), quiet=True)
    with_tasks, without = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (output, tmp_path / "plain"))
    assert with_tasks.keys() == without.keys()
    assert all(with_tasks[name].equal(without[name]) for name in without)
    kept = [{k: line[k] for k in ("step", "loss", "grad_norm")} for line in metrics(output) if "loss" in line]
    assert kept == [{k: x[k] for k in ("step", "loss", "grad_norm")} for x in metrics(tmp_path / "plain")]


def test_scores_on_the_way_and_at_the_end(place, done):
    report, output = done
    on_the_way = [line for line in metrics(output) if "tasks" in line]
    assert [line["step"] for line in on_the_way] == [2, 4]
    assert set(on_the_way[0]["tasks"]) == {
        "gsm8k_cot_zeroshot/exact_match,strict-match",
        "gsm8k_cot_zeroshot/exact_match,flexible-extract",
        "mmlu_anatomy/acc,none",
    }
    results = json.loads((output / "scores" / "results.json").read_text())
    assert as_json(report.tasks["measures"]) == results["measures"]
    assert report.tasks["text"]["kl_tuned_base"] > 0
    last = on_the_way[-1]["tasks"]
    for measure in results["measures"]:
        assert measure["base"] is not None
        assert last[f"{measure['task']}/{measure['metric']},{measure['filter']}"] == measure["model"]["value"]


def test_the_end_is_what_the_command_says(place, done, tmp_path):
    _, output = done
    options = EvalOptions(tuple(TASKS), place / "data", limit=4)
    found = evaluate(str(output / "adapter"), options, tmp_path / "o")
    ours = json.loads((output / "scores" / "results.json").read_text())["measures"]
    assert ours == as_json(found.measures)


def test_a_task_chooses_the_best_adapter(place, tmp_path, monkeypatch):
    """Scores that fall after step 2: that adapter is the result."""
    values = iter([0.75, 0.25])

    def falling(self, model, tokenizer, folder):
        return {"mmlu_anatomy/acc,none": TaskScore(next(values), True)}

    monkeypatch.setattr(TasksOfRun, "score", falling)
    report = scored(place, tmp_path / "o", metric_for_best_model="mmlu_anatomy", eval_steps=4)
    assert report.best_step == 2
    best = tmp_path / "o" / "checkpoints" / "best-00000002" / "adapter" / "adapter_model.safetensors"
    kept, expected = load_file(tmp_path / "o" / "adapter" / "adapter_model.safetensors"), load_file(best)
    assert all(kept[name].equal(expected[name]) for name in expected)


def test_scores_beside_the_loss_leave_the_choice_to_the_loss(place, tmp_path, monkeypatch):
    """The loss chooses the adapter and counts the patience, whatever is scored at the same steps."""
    losses = iter([0.9, 0.5, 0.7, 0.8])
    original = Loop._measure_held_out

    def scripted(self, step, model):
        self.held_out_scores = lambda: {"loss": next(losses)}
        return original(self, step, model)

    monkeypatch.setattr(Loop, "_measure_held_out", scripted)
    monkeypatch.setattr(TasksOfRun, "score", lambda *_: {"mmlu_anatomy/acc,none": TaskScore(0.5, True)})
    report = scored(place, tmp_path / "o", eval_steps=1, tasks_steps=1, early_stopping_patience=3)
    assert (report.best_step, report.steps) == (2, 4)


def test_patience_counts_scores(place, tmp_path, monkeypatch):
    monkeypatch.setattr(TasksOfRun, "score", lambda *_: {"mmlu_anatomy/acc,none": TaskScore(0.5, True)})
    report = scored(
        place, tmp_path / "o", metric_for_best_model="mmlu_anatomy", tasks_steps=1, early_stopping_patience=2
    )
    assert (report.best_step, report.steps) == (1, 3)


def test_a_stopped_run_finds_its_answers(place, tmp_path, monkeypatch):
    """Ctrl-C in the scores at the end: the same command computes what is missing, without training again."""
    from dude_peft.evaluation.harness_model import HarnessModel

    original, calls = HarnessModel._computed, []

    def stopping(self, batch, compute):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, batch, compute)

    monkeypatch.setattr(HarnessModel, "_computed", stopping)
    with pytest.raises(KeyboardInterrupt):
        scored(place, tmp_path / "o", tasks_steps=None)
    assert (tmp_path / "o" / "adapter" / "adapter_model.safetensors").is_file()
    report = scored(place, tmp_path / "o", tasks_steps=None)
    provenance = json.loads((tmp_path / "o" / "scores" / "results.json").read_text())["provenance"]
    assert provenance["answers"]["base"]["found"] > 0
    assert report.steps == 4


@pytest.mark.parametrize(
    ("evaluation", "error", "words"),
    [
        ({"tasks": ["gsm8q"]}, ConfigError, r"evaluation\.tasks: there is no task 'gsm8q'; did you mean 'gsm8k'"),
        ({"tasks": ["gsm8k", "gsm8k"]}, ConfigError, r"evaluation\.tasks: 'gsm8k' is listed twice"),
        (
            {"tasks": ["gsm8k"], "tasks_data_dir": "/nowhere"},
            DataError,
            r"evaluation\.tasks_data_dir /nowhere: no such",
        ),
        ({"tasks_text": "/nowhere.txt"}, DataError, r"evaluation\.tasks_text /nowhere\.txt: no such"),
    ],
)
@pytest.mark.parametrize("command", [run, plan])
def test_a_mistake_costs_no_weights(place, tmp_path, monkeypatch, evaluation, error, words, command):
    monkeypatch.setattr("dude_peft.training.loading.load_model", None)
    data = {"tasks_data_dir": str(place / "data")} if "tasks" in evaluation else {}
    config = RunConfig(**settings(place, tmp_path / "o", **data | evaluation))
    with pytest.raises(error, match=words):
        command(config, scorer_of=TasksOfRun)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"tasks_steps": 2}, "needs 'evaluation.tasks'"),
        ({"tasks": ["gsm8k"], "metric_for_best_model": "gsm8k"}, "set 'evaluation.tasks_steps'"),
        ({"tasks": ["gsm8k"], "tasks_steps": 2, "metric_for_best_model": "mmlu"}, "'mmlu' is not measured"),
    ],
)
def test_what_contradicts_itself_is_refused(evaluation, words):
    with pytest.raises(ValueError, match=words):
        EvaluationSection(**evaluation)


def test_a_run_in_python_is_told_of_the_scorer(place, tmp_path):
    with pytest.raises(ConfigError, match="scorer_of=dude_peft"):
        run(RunConfig(**settings(place, tmp_path / "o", tasks=["wordmath"])), quiet=True)


def test_a_metric_that_the_task_has_not(place):
    scores = {"a/acc,none": TaskScore(0.5, True), "a/loss,none": TaskScore(2.0, False)}
    assert chosen_score(scores, "a") == -0.5
    assert chosen_score(scores, "a/loss,none") == 2.0
    with pytest.raises(ConfigError, match="no 'a/f1' among a/acc,none, a/loss,none"):
        chosen_score(scores, "a/f1")


# ---- several processes


@pytest.mark.slow
def test_two_processes_answer_as_one(place, tmp_path):
    options = EvalOptions(tuple(TASKS), place / "data", batch_size=2, text=place / "text.txt")
    one = evaluate(str(place / "adapter"), options, tmp_path / "one")
    asked = ["--tasks", ",".join(TASKS), "--data-dir", place / "data", "--batch-size", 2, "--text", place / "text.txt"]
    command = ["eval", place / "adapter", "-o", tmp_path / "two", *asked, "--processes", 2]
    finished = dude(*command)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["provenance"]["processes"] == 2
    assert results["provenance"]["answers"] == one.provenance["answers"]
    assert results["measures"] == as_json(one.measures)
    assert results["text"]["loss"] == pytest.approx(one.text.loss, abs=1e-6)
    assert results["text"]["kl_tuned_base"] == pytest.approx(one.text.kl_tuned_base, abs=1e-6)
    for name in TASKS:
        ours, theirs = (
            [json.loads(line) for line in (tmp_path / o / "samples" / f"{name}.jsonl").read_text().splitlines()]
            for o in ("two", "one")
        )
        for line, other in zip(ours, theirs, strict=True):
            assert line["doc_hash"] == other["doc_hash"]
            assert {k: v for k, v in line["model"].items() if k not in ("responses", "filtered")} == {
                k: v for k, v in other["model"].items() if k not in ("responses", "filtered")
            }


@pytest.mark.slow
def test_a_mistake_of_several_is_told_once(place, tmp_path):
    finished = dude(
        "eval", place / "adapter", "-o", tmp_path / "o", "--tasks", "gsm8q", "--data-dir", place / "data",
        "--processes", 2,
    )  # fmt: skip
    assert finished.returncode == 2
    assert finished.stderr.count("there is no task") == 1


@pytest.mark.slow
def test_two_processes_train_and_score(place, tmp_path):
    tasks = {"tasks": ["mmlu_anatomy"], "tasks_data_dir": str(place / "data"), "tasks_limit": 4, "tasks_steps": 2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(place, tmp_path / "two", **tasks)), encoding="utf-8")
    finished = dude("train", path, "--launch", "ddp", "--processes", 2)
    assert finished.returncode == 0, finished.stderr
    assert [line["step"] for line in metrics(tmp_path / "two") if "tasks" in line] == [2, 4]
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["tasks"]["measures"][0]["items"] == 4
    refused = dude("train", path, "--launch", "fsdp2", "--processes", 2, "--output-dir", tmp_path / "cut")
    assert refused.returncode == 2
    assert "split by fsdp2" in refused.stderr
