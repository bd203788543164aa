"""`dude compare` by command: both stages, failures as results, interruptions, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from served import dude
from tiny import save_tiny, write_rows

import dude_peft
from dude_peft.comparison.cells import Grid, around
from dude_peft.comparison.folder import CompareFolder
from dude_peft.comparison.outcome import Comparison, Trial
from dude_peft.comparison.run import compare
from dude_peft.comparison.statistics import summarise
from dude_peft.comparison.tuning import stage_one
from dude_peft.config.reading import load_grid
from dude_peft.errors import ArtifactError, BusyError, ConfigError, DataError, NumericsError, ResourceError

COSTS = {"seconds", "seconds_per_step", "start_seconds", "peak_memory"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model, rows, and a grid of eight runs of a second; one rate is far too high."""
    folder = tmp_path_factory.mktemp("compare")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 40)
    write_rows(folder / "test.jsonl", 8, start=100)
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid()))
    return folder


def grid(**changes: Any) -> dict[str, Any]:
    run = {
        "model": {"name_or_path": "model"},
        "adapter": {"r": 4},
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "train": {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4},
        "evaluation": {"rows": 4, "max_new_tokens": 4},
    }
    return {
        "run": run,
        "methods": ["dude", "lora"],
        "learning_rates": [0.003, 1e30],
        "extend": 0,
        "tuning_seeds": [0],
        "final_seeds": [1, 2],
        "output_dir": "out",
        **changes,
    }


@pytest.fixture(scope="module")
def finished(place) -> subprocess.CompletedProcess[str]:
    done = dude("compare", "grid.yaml", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def result(folder: Path) -> Comparison:
    return Comparison.read(folder)


def without_costs(folder: Path) -> Any:
    """What comparison.json holds but for times and what else is measured of the machine."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if key not in COSTS | {"sha256"}}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    return strip(json.loads((folder / "comparison.json").read_text()))


def reports(folder: Path) -> dict[str, int]:
    """When each run ended."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/report.json")}


# --- what it does -------------------------------------------------------------------------------------------------


def test_each_method_is_tuned_alike_and_tested_at_its_best_rate(place, finished):
    found = result(place / "out")
    assert found.methods == ("dude", "lora")
    for method in found.methods:
        trials = [trial for trial in found.trials if trial.method == method]
        assert sorted(trial.learning_rate for trial in trials) == [0.003, 1e30]
        losses = {trial.validation_loss: trial.learning_rate for trial in trials if trial.failed is None}
        chosen = found.protocol["chosen"][method]
        assert chosen["learning_rate"] == losses[min(losses)]
        finals = [final for final in found.finals if final.method == method]
        assert [(final.seed, final.learning_rate) for final in finals] == [(s, losses[min(losses)]) for s in (1, 2)]
    assert found.protocol["complete"]


def test_a_run_that_diverges_is_a_result_with_its_reason(place, finished):
    found = result(place / "out")
    failed = [trial for trial in found.trials if trial.failed is not None]
    assert [trial.learning_rate for trial in failed] == [1e30, 1e30]
    assert all(trial.failed.startswith("diverged: ") and trial.validation_loss is None for trial in failed)
    assert "dude: 1 of 2 trials failed; the first: diverged" in " ".join(found.warnings)
    assert "1 of 4" in finished.stdout


def test_items_and_costs_are_those_of_the_runs(place, finished):
    found = result(place / "out")
    assert found.items == tuple(f"test.jsonl:{line}" for line in range(1, 9))
    assert found.questions == found.items[:4]
    assert len(found.base.losses) == 8
    for final in found.finals:
        report = json.loads(
            next((place / "out/runs").glob(f"test-{final.method}*seed{final.seed}-*/report.json")).read_text()
        )
        total = sum(loss * tokens for loss, tokens in zip(final.losses, final.tokens, strict=True))
        assert total / sum(final.tokens) == pytest.approx(report["after"]["loss"], rel=1e-12)
        assert sum(final.right) == report["after"]["right"]
        assert final.trained_parameters == report["trainable_parameters"]
        assert final.adapter_bytes > 1000
        assert final.curve[-1][0] == 4
        assert final.peak_memory > 1e6


def test_tuning_never_names_the_test_rows(place, finished):
    for path in (place / "out/runs").glob("tune-*.yaml"):
        assert "test.jsonl" not in path.read_text()
    assert all("test.jsonl" in path.read_text() for path in (place / "out/runs").glob("test-*.yaml"))


def test_each_run_is_one_of_dude_train(place, finished):
    path = next((place / "out/runs").glob("tune-dude-0.003-*.yaml"))
    done = dude("train", path.relative_to(place), cwd=place)
    assert done.returncode == 0, done.stderr
    assert "this run is finished" in done.stdout


def test_the_log_tells_what_goes_on_and_what_comes_next(finished):
    assert "[1/8] " in finished.stdout
    assert "; ETA " in finished.stdout
    assert "best so far " in finished.stdout
    assert "Each method at its best setting" in finished.stdout
    assert finished.stdout.splitlines()[-3:-1] == ["page: out/page.html", "next:"]
    assert finished.stdout.splitlines()[-1].startswith("  dude chat out/runs/test-")


def test_its_page_is_that_of_dude_report(place, finished, tmp_path):
    done = dude("report", place / "out", "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_bytes() == (place / "out/page.html").read_bytes()


def test_the_same_command_again_runs_nothing_and_writes_the_same_bytes(place, finished):
    before, bytes_before = reports(place / "out"), (place / "out/comparison.json").read_bytes()
    done = dude("compare", "grid.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "8 runs have ended already" in done.stdout
    assert (reports(place / "out"), (place / "out/comparison.json").read_bytes()) == (before, bytes_before)


@pytest.mark.slow
def test_what_is_killed_or_stopped_goes_on_and_comes_to_the_same(place, finished, tmp_path):
    """kill -9 of the comparison and of a run, then SIGTERM, then to the end: of three runs that `finished` has too."""
    elsewhere = copied(place, tmp_path)
    (elsewhere / "grid.yaml").write_text(yaml.safe_dump(grid(methods=["lora"], final_seeds=[1])))
    ended: list[subprocess.CompletedProcess[str]] = []
    begun: list[dict[str, int]] = []
    seen: set[int] = set()
    for number in (signal.SIGKILL, signal.SIGTERM, None):
        seen |= {int(lock.read_text().split()[1]) for lock in elsewhere.rglob(".dude-lock")}  # killed ones leave theirs
        thread = threading.Thread(
            target=lambda: ended.append(dude("compare", "grid.yaml", "--jobs", "2", cwd=elsewhere))
        )
        thread.start()
        if number is not None:
            run = owner(elsewhere / "out/runs", "*/.dude-lock", seen)
            if number == signal.SIGTERM:
                with contextlib.suppress(ProcessLookupError):  # it has ended in this moment
                    os.kill(run, signal.SIGKILL)  # as the kernel does it where memory is out
                time.sleep(0.5)
            os.kill(owner(elsewhere / "out", ".dude-lock", seen), number)
        thread.join()
        begun.append(reports(elsewhere / "out"))
    assert [done.returncode for done in ended] == [-9, 143, 0]
    assert ended[1].stderr.strip().endswith("run the same command again, it goes on")
    assert begun[0].items() <= begun[1].items() <= begun[2].items(), "a run that had ended ran again"
    whole, part = without_costs(place / "out"), without_costs(elsewhere / "out")
    assert part["trials"] == [trial for trial in whole["trials"] if trial["method"] == "lora"]
    assert part["finals"] == [one for one in whole["finals"] if (one["method"], one["seed"]) == ("lora", 1)]
    assert part["base"] == whole["base"]


def copied(place: Path, target: Path) -> Path:
    shutil.copytree(place, target / "copy", ignore=shutil.ignore_patterns("out"))
    return target / "copy"


def owner(folder: Path, pattern: str, seen: set[int]) -> int:
    """The process that a lock names, once there is one that was not seen before."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        for path in folder.glob(pattern):
            words: list[str] = []
            with contextlib.suppress(FileNotFoundError):  # its owner has just ended
                words = path.read_text().split()
            if words and int(words[1]) not in seen:
                seen.add(int(words[1]))
                return int(words[1])
        time.sleep(0.01)
    raise AssertionError(f"no {pattern} in {folder}")


def test_the_python_interface_gives_the_same_result_and_prints_nothing(place, finished, monkeypatch, capfd):
    monkeypatch.chdir(place)
    found = dude_peft.compare(grid(), collect=True)
    assert found == result(place / "out")
    assert capfd.readouterr().out == ""
    assert found._repr_html_().startswith("<table>")


@pytest.mark.slow
def test_runs_by_hand_one_command_each(place, tmp_path):
    elsewhere = copied(place, tmp_path)
    (elsewhere / "grid.yaml").write_text(
        yaml.safe_dump(grid(methods=["lora"], learning_rates=[0.003], extend=0, final_seeds=[1]))
    )
    for stage in ("tune", "test"):
        printed = dude("compare", "grid.yaml", "--print-commands", cwd=elsewhere)
        assert printed.returncode == 0, printed.stderr
        (line,) = printed.stdout.splitlines()
        words = line.split()
        assert words[:4] == ["dude", "compare", "grid.yaml", "--run"]
        assert words[4].startswith(stage)
        partly = dude("compare", "grid.yaml", "--collect", cwd=elsewhere)
        assert "runs have not ended yet" in partly.stdout
        done = dude(*words[1:], cwd=elsewhere)
        assert done.returncode == 0, done.stderr
    done = dude("compare", "grid.yaml", "--collect", cwd=elsewhere)
    assert "one final seed: no interval over seeds is possible" in done.stdout.splitlines()[0]
    assert result(elsewhere / "out").protocol["complete"]
    assert len(result(elsewhere / "out").finals) == 1


def test_a_dry_run_tells_the_cost_and_makes_nothing(place, tmp_path):
    elsewhere = copied(place, tmp_path)
    done = dude("compare", "grid.yaml", "--dry-run", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "runs: 8: 4 to tune, 4 to test" in done.stdout
    assert "trained parameters" in done.stdout
    assert "a run: " in done.stdout
    assert not (elsewhere / "out").exists()


def test_a_method_whose_trials_all_failed_is_told_as_not_tested(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    given = grid(learning_rates=[0.003], methods=["dude"], output_dir=str(tmp_path / "out"))
    made = Grid(*load_grid(given))
    folder = CompareFolder(tmp_path / "out")
    with folder.held():
        folder.begin(made.record(), 1)
        for cell in made.tuning(made.contestants[0], made.points(made.contestants[0].rates)):
            folder.fail(cell, "killed by SIGKILL, twice; was memory out?")
    found = compare(*load_grid(given), collect=True)
    said = " ".join("".join(capsys.readouterr()).split())
    assert found.warnings[0] == (
        "dude: 1 of 1 trials failed, so it was not tested; the first: killed by SIGKILL, twice; was memory out?"
    )
    assert "dude: no setting had trials that all ended well, so none was tested." in said
    assert "1 of 1 │" in said, "runs that were never started did not fail"
    for wrong in ("test runs failed", "stands last", "Two seeds", "next:"):
        assert wrong not in said
    with pytest.raises(ResourceError, match=r"all 1 runs of the comparison failed.*the first: killed by SIGKILL"):
        found.check()
    trials = tuple(replace(trial, failed="diverged: NaN") for trial in found.trials)
    with pytest.raises(NumericsError, match="the first: diverged"):
        replace(found, trials=trials).check()
    replace(found, trials=(*trials, replace(trials[0], failed=None))).check()
    replace(found, trials=(), finals=()).check()


@pytest.mark.slow
def test_a_planted_difference_and_a_planted_tie_are_found_as_such(place, tmp_path):
    """`twin` is lora under another name; `weak` trains one thin layer kind alone."""
    elsewhere = copied(place, tmp_path)
    write_rows(elsewhere / "test.jsonl", 24, start=100)
    planted = grid(
        methods=[
            "lora",
            {"twin": {"adapter.method": "lora", "train.logging_steps": 3}},
            {"weak": {"adapter.method": "lora", "adapter.r": 1, "adapter.target_modules": ["k_proj"]}},
        ],
        learning_rates=[0.001, 0.003],
        extend=0,
        final_seeds=[1, 2, 3],
    )
    (elsewhere / "grid.yaml").write_text(yaml.safe_dump(planted))
    done = dude("compare", "grid.yaml", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    pairs = {frozenset((pair.first, pair.second)): pair for pair in summarise(result(elsewhere / "out")).pairs}
    assert pairs[frozenset(("lora", "twin"))].better is None
    assert pairs[frozenset(("lora", "weak"))].better == "lora"
    assert pairs[frozenset(("twin", "weak"))].better == "twin"
    said = " ".join(done.stdout.split())
    assert any(pairs[frozenset((better, "weak"))].words in said for better in ("lora", "twin"))


# --- the protocol, without runs -----------------------------------------------------------------------------------


def stage(best: dict[str, float | None], *, extend: int = 3, most_runs: int = 200, **changes: Any):
    """Stage 1 where the validation loss grows with the distance from each method's best rate; None: all fail."""
    import math

    made = Grid(*load_grid(grid(learning_rates=None, extend=extend, methods=list(best), **changes)))

    def trial(cell) -> Trial:
        peak = best[cell.method]
        loss = None if peak is None else abs(math.log10(cell.rate / peak))
        reason = "diverged" if loss is None else None
        return Trial(cell.method, cell.settings, cell.rate, cell.seed, loss, reason, 1.0, 4)

    return made, stage_one(made, trial, most_runs)


def own(method: str) -> float:
    return dude_peft.METHODS[method].learning_rate


def test_the_default_rates_are_half_decades_around_the_methods_own():
    made, _ = stage({"dude": 1e-4, "lora": 1e-4})
    for each in made.contestants:
        assert each.rates == tuple(around(own(each.name)))
        assert each.rates[2] == own(each.name)
        assert each.rates[-1] / each.rates[0] == pytest.approx(100)


def test_a_best_rate_on_the_edge_extends_the_grid_and_the_others_get_as_many_trials():
    peak = own("dude") / 10**1.5
    _, found = stage({"dude": peak, "lora": own("lora") * 1.2})
    assert found.choices["dude"].edge == ""
    assert found.choices["dude"].rate == pytest.approx(peak, rel=0.01)
    assert len(found.added["dude"]) == len(found.added["lora"]) == 2
    assert max(found.added["dude"]) < min(around(own("dude")))
    assert min(found.rates["lora"]) == min(around(own("lora"))), "refined, not extended"
    assert found.added["lora"][0] == pytest.approx(own("lora") * 10**0.25, rel=0.01)


@pytest.mark.parametrize(("limits", "added"), [({"extend": 2}, 2), ({"extend": 0}, 0), ({"most_runs": 12 + 4}, 2)])
def test_extension_is_bounded_and_the_edge_is_told(limits, added):
    made, found = stage({"dude": 1e-12, "lora": own("lora")}, final_seeds=[1], **limits)
    assert (made.runs, made.round) == (12, 2)
    assert len(found.added["dude"]) == added
    assert found.choices["dude"].edge == "lowest"


def test_where_all_trials_fail_lower_rates_are_tried_and_nothing_is_chosen():
    _, found = stage({"dude": None, "lora": own("lora")})
    assert found.choices["dude"] is None
    assert max(found.added["dude"]) < min(around(own("dude")))
    assert found.choices["lora"] is not None


def test_halving_keeps_the_better_half_of_each_method_and_records_the_rest():
    made, found = stage({"dude": own("dude"), "lora": own("lora")}, prune=[0.25, 0.5])
    assert made.trials == 5 + 3 + 2
    assert len(found.short) == 2 * (5 + 3)
    assert {cell.config.train.max_steps for cell in found.short} == {1, 2}
    assert len(found.cells) == 2 * 2
    assert [(each.share, each.method) for each in found.pruned].count((0.25, "dude")) == 2
    assert {each.rate for each in found.pruned if each.method == "lora"}.isdisjoint({own("lora")})
    assert found.choices["lora"].rate == own("lora")


def test_the_three_parts_of_the_rows_have_no_question_in_common(place, monkeypatch):
    from dude_peft.config.schema import ModelSection
    from dude_peft.model.load import load_tokenizer
    from dude_peft.training.run_data import read

    monkeypatch.chdir(place)
    shares = grid(test=0.25, validation=0.2)
    made = Grid(*load_grid(shares))
    each = made.contestants[0]
    cell = next(made.tuning(each, made.points(each.rates)))
    tokenizer = load_tokenizer(ModelSection(name_or_path="model"), "model")
    tuned, judged = (read(one.config, tokenizer) for one in (cell, made.final(each, 1e-3, {}, 1)))
    learned, validation, test = (
        set(part.prompts().tolist()) for part in (tuned.train, tuned.held_out.examples, judged.held_out.examples)
    )
    assert (len(learned), len(validation), len(test)) == (22, 8, 10)
    assert len(learned | validation | test) == 40
    assert set(judged.train.prompts().tolist()) == learned | validation


# --- what it refuses ----------------------------------------------------------------------------------------------


def with_run(**changes: Any) -> dict[str, Any]:
    run = grid()["run"]
    return grid(run={key: {**value, **changes.get(key, {})} for key, value in run.items()})


REFUSED = {
    "unknown method": (grid(methods=["dude", "lorra"]), ConfigError, r"there is no method 'lorra'.*closest: 'lora'"),
    "unknown axis": (grid(axes={"train.warmup_step": [0]}), ConfigError, r"'axes'.*closest: 'train.warmup_steps'"),
    "unknown override": (grid(methods=[{"dude": {"adapter.rank": 2}}]), ConfigError, r"dude: key 'adapter.rank' is"),
    "unknown key": (grid(seeds=[1]), ConfigError, r"key 'seeds' is unknown"),
    "wrong value": (grid(axes={"train.warmup_steps": [-1]}), ConfigError, r"expected a number >= 0"),
    "other data": (grid(methods=[{"dude": {"data.train": "x"}}]), ConfigError, r"different data or another model"),
    "data axis": (grid(axes={"data.max_length": [8, 9]}), ConfigError, r"different data or another model"),
    "twice": (grid(methods=["dude", "dude"]), ConfigError, r"dude is named twice"),
    "unequal": (grid(learning_rates={"dude": [1e-3], "lora": [1e-3, 1e-4]}), ConfigError, r"same number of trials"),
    "set twice": (
        grid(methods=["lora", {"dude": {"adapter.r": 2}}], ranks=[4]), ConfigError, r"dude: adapter.r is also set",
    ),
    "ranks and budget": (
        with_run(adapter={"budget": {"parameters": "50%"}}) | {"ranks": [2, 4]}, ConfigError,
        r"dude: adapter.budget decides the ranks",
    ),
    "one run twice": (
        grid(axes={"train.weight_decay": [0, 0.0]}), ConfigError, r"two runs are the same.*weight_decay 0, .*0.0, seed",
    ),
    "one folder for two": (
        grid(methods=[{name: {"adapter.method": "dude"}} for name in ("方", "法")]), ConfigError, r"other letters",
    ),
    "what a later method lacks": (
        with_run(train={"magnitude_lr_ratio": 4}), ConfigError, r"method 'lora' trains no magnitude; leave it out",
    ),
    "preferences": (with_run(train={"objective": "kto"}), ConfigError, r"kto: .* of answers, not of pairs or rewards"),
    "layers that are not there": (
        grid(methods=["lora", {"wide": {"adapter.method": "dude", "adapter.target_modules": ["q_prj"]}}]), ConfigError,
        r"'methods': wide: .*q_prj.*q_proj",
    ),
    "a rank that is too large": (grid(ranks=[2, 65]), ConfigError, r"'methods': dude r=65: .*(65|rank)"),
    "preferences of one": (
        grid(methods=["lora", {"dpo": {"adapter.method": "dude", "train.objective": "dpo"}}]), ConfigError,
        r"objective: dpo: .* answers, not of pairs or rewards",
    ),
    "seed not fresh": (grid(final_seeds=[0, 1]), ConfigError, r"0 is a tuning seed too"),
    "too many": (grid(max_runs=7), ConfigError, r"takes 8 runs, but max_runs is 7"),
    "chosen by the test": (with_run(evaluation={"eval_steps": 1, "early_stopping_patience": 1}), ConfigError, r"judge"),
    "contamination": (grid(test="train.jsonl"), DataError, r"test: 40 of 40 rows .* \(train.jsonl:1 = train.jsonl:1; "),
    "tuned on the test": (grid(validation="test.jsonl"), DataError, r"test: 8 of 8 rows .* of a validation row"),
    "no row left": (grid(validation=0.99), DataError, r"validation: a share of 0.99 of 40 .* leaves none"),
    "no test": (with_run(data={"test": None}, evaluation={"enabled": False}), ConfigError, r"needs test rows"),
    "no answers": (
        {**with_run(data={"test": "plain.txt"}), "primary": "right"}, ConfigError, r"'primary': right needs test rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_unfair_or_mistaken_grid_is_refused_before_any_run(place, tmp_path, monkeypatch, name):
    monkeypatch.chdir(place)
    (place / "plain.txt").write_text("one\n\ntwo\n")
    given, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as raised:
        dude_peft.compare({**given, "output_dir": str(tmp_path / "out")})
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output_dir", "kind", "words"),
    [
        ("x" * 300, ResourceError, r"output_dir: x+.* cannot be written \(File name too long\)"),
        ("train.jsonl/out", ConfigError, r"output_dir: train.jsonl/out is inside a file"),
        ("train.jsonl", ConfigError, r"output_dir: train.jsonl is a file"),
        (".", ConfigError, r"output_dir: \. is not empty, and holds no comparison"),
        ("a\0b", ResourceError, r"output_dir: .*cannot be written"),
        ("LOOP", ResourceError, r"output_dir: .*loop cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_is_told_in_one_line(place, tmp_path, monkeypatch, output_dir, kind, words):
    monkeypatch.chdir(place)
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(kind, match=words) as caught:
        dude_peft.compare(grid(output_dir=output_dir.replace("LOOP", str(tmp_path / "loop"))))
    assert "\n" not in str(caught.value)


def test_a_method_without_a_rank_competes_once():
    made = Grid(*load_grid(grid(methods=["dude", "full"], ranks=[2, 4])))
    made.check(None)
    assert [each.name for each in made.contestants] == ["dude r=2", "dude r=4", "full"]


def test_a_folder_of_another_grid_is_refused_with_the_difference(place, finished, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match=r"another comparison \(final_seeds: \[1, 2\] -> \[3\]\)"):
        dude_peft.compare(grid(final_seeds=[3]))
    (place / "full").mkdir(exist_ok=True)
    (place / "full/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty, and holds no comparison"):
        dude_peft.compare(grid(output_dir="full"))


def test_a_run_edited_by_hand_is_refused_by_its_name(place, finished, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    report = next(Path("out/runs").glob("tune-lora-0.003-*/report.json"))
    config = Path(f"{report.parent}.yaml")
    whole = config.read_text()
    config.write_text(whole.replace("max_steps: 4", "max_steps: 9"))
    with pytest.raises(ConfigError, match=r"tune-lora-0.003-.*\.yaml: this run was edited \(train.max_steps: 4 -> 9\)"):
        dude_peft.compare(grid(), collect=True)
    config.write_text(whole)
    report.write_text(report.read_text().replace('"steps": 4', '"steps": 5'))
    with pytest.raises(ArtifactError, match=r"run tune-lora-0.003-seed0-\w+: .*remove its folder, it runs again"):
        dude_peft.compare(grid(), collect=True)


def test_two_comparisons_in_one_folder(place, finished, monkeypatch):
    from dude_peft.folder.lock import RunLock

    monkeypatch.chdir(place)
    lock = RunLock(Path("out"))
    try:
        with pytest.raises(BusyError, match="in use by process"):
            dude_peft.compare(grid(), collect=True)
    finally:
        lock.release()


def test_a_bad_grid_is_one_line_of_the_command(place):
    done = dude("compare", "grid.yaml", "--max-runs", "3", cwd=place)
    assert done.returncode == 2
    assert done.stderr == (
        "dude: error[config]: the grid takes 8 runs, but max_runs is 3; name fewer methods, rates or seeds, or add "
        "--max-runs 8\n"
    )
