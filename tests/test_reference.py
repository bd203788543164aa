"""`train.dpo.precompute_ref_log_probs`: the base model's part of pairs, measured once and kept for other runs."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_preference import WEIGHTS, interrupted, lines, places, settings, start  # noqa: F401  # places: a fixture
from test_train_resume import _CutError, cut_at, result

from dude_peft import plan
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.training import preference, reference
from dude_peft.training.strategy import check_strategy

ONCE = {"dpo": {"precompute_ref_log_probs": True}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference_log-probabilities"


@pytest.fixture
def passes(monkeypatch):
    """Base passes: in training steps, and before training."""
    found = {"steps": 0, "before": 0}

    def counted(where, plain):
        def logps_of(*given):
            found[where] += 1
            return plain(*given)

        return logps_of

    monkeypatch.setattr(preference, "logps_of", counted("steps", preference.logps_of))
    monkeypatch.setattr(reference, "logps_of", counted("before", reference.logps_of))
    return found


def test_a_run_learns_the_same_with_no_base_pass_in_its_steps(places, tmp_path, passes):  # noqa: F811
    start(settings(places, tmp_path / "live"))
    assert passes == {"steps": 10, "before": 0}
    start(settings(places, tmp_path / "once", train=ONCE))
    assert (passes["steps"], passes["before"] > 0) == (10, True)
    live, once = ({k: v for k, v in line.items() if "/" in k or "loss" in k} for line in (
        lines(tmp_path / "live")[-2], lines(tmp_path / "once")[-2]
    ))  # fmt: skip
    assert once == pytest.approx(live, abs=1e-5)
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("live", "once"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_a_second_run_measures_nothing_and_another_model_or_batch_does(places, tmp_path, passes):  # noqa: F811
    start(settings(places, tmp_path / "first", train=ONCE))
    first = passes["before"]
    start(settings(places, tmp_path / "rate", train={**ONCE, "learning_rate": 0.001}, adapter={"r": 4}))
    assert passes["before"] == first
    start(settings(places, tmp_path / "batch", train=ONCE, evaluation={"batch_size": 3}))
    assert passes["before"] > first
    again = passes["before"]
    other = shutil.copytree(places / "model", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    from safetensors.torch import save_file

    save_file(weights, other / "model.safetensors", {"format": "pt"})
    start(settings(places, tmp_path / "model", train=ONCE, model={"name_or_path": str(other)}))
    assert passes["before"] > again


def test_an_interrupted_measurement_goes_on(places, tmp_path, monkeypatch, passes):  # noqa: F811
    def wanted(out):
        return settings(places, out, train=ONCE, evaluation={"batch_size": 4})

    start(wanted(tmp_path / "whole"))
    whole = passes["before"]
    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as patch:
        plain = reference.Reference._logps

        def cut(self, rows):
            if passes["before"] == whole + 3:
                raise _CutError
            return plain(self, rows)

        patch.setattr(reference.Reference, "_logps", cut)
        with pytest.raises(_CutError):
            start(wanted(tmp_path / "out"))
    start(wanted(tmp_path / "out"))
    assert passes["before"] == 2 * whole, "what was measured is not measured again"
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_that_was_cut_goes_on_bit_by_bit(places, tmp_path, monkeypatch, kept):  # noqa: F811
    def wanted(name):
        made = interrupted(places, tmp_path / name, "dpo")
        return made | {"train": made["train"] | ONCE}

    start(wanted("whole"))
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(_CutError):
            start(wanted("out"))
    if not kept:
        shutil.rmtree(tmp_path / "cache")
    start(wanted("out"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_damaged_cache_is_made_again_with_a_warning(places, tmp_path, cache):  # noqa: F811
    start(settings(places, tmp_path / "first", train=ONCE))
    (file,) = cache.glob("*.jsonl")
    content = file.read_bytes()
    place = content.index(b'"0": [') + 8
    changed = b"1" if content[place : place + 1] != b"1" else b"2"
    file.write_bytes(content[:place] + changed + content[place + 1 :])
    report = start(settings(places, tmp_path / "second", train=ONCE))
    assert any("is damaged; what it held is measured again" in text for text in report.warnings)
    assert file.read_bytes() == content


def test_several_processes_are_refused_and_the_plan_knows(places, tmp_path):  # noqa: F811
    config = RunConfig(**settings(places, tmp_path / "out", train=ONCE))
    with pytest.raises(ConfigError, match="precompute_ref_log_probs measures in one process"):
        check_strategy(config, "ddp", 2, scored=False)
    assert not any("third longer" in text for text in plan(config).warnings)
