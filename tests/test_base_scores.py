"""What the base model knows of held-out rows is measured once: other runs on it and on the same rows find it."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from served import dude
from test_train_resume import result
from tiny import save_tiny, write_rows

from dude_peft.config.schema import RunConfig
from dude_peft.training import held_out_scorer
from dude_peft.training.run import run

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_scores"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * {factor}
        return found
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("known")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "test.jsonl", 6, start=100)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "base_scores"


@pytest.fixture
def measured(monkeypatch):
    found = []
    plain = held_out_scorer.item_losses

    def counted(*given, **named):
        found.append(1)
        return plain(*given, **named)

    monkeypatch.setattr(held_out_scorer, "item_losses", counted)
    return found


def settings(place, out, **sections):
    wanted = {
        "model": {"name_or_path": str(place / "model")},
        "adapter": {"r": 4, "lora_dropout": 0.1},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl")},
        "train": {"learning_rate": 0.01, "max_steps": 3},
        "evaluation": {"rows": 3, "max_new_tokens": 4},
        "output_dir": str(out),
    }
    return {key: value | sections.get(key, {}) if isinstance(value, dict) else value for key, value in wanted.items()}


def start(place, out, **sections):
    return run(RunConfig(**settings(place, out, **sections)), quiet=True)


def test_a_run_that_finds_them_is_bit_for_bit_the_run_that_measured_them(place, tmp_path, measured):
    first = start(place, tmp_path / "first")
    assert len(measured) == 2  # before and after
    second = start(place, tmp_path / "second")
    assert len(measured) == 3
    assert second.before == first.before
    assert result(tmp_path / "second") == result(tmp_path / "first")


def test_a_method_or_rate_more_measures_nothing(place, tmp_path, measured):
    wanted = start(place, tmp_path / "first").before
    for number, changes in enumerate(
        [{"adapter": {"method": "lora"}}, {"train": {"learning_rate": 0.1}}, {"data": {"train_rows": 12}}]
    ):
        assert start(place, tmp_path / str(number), **changes).before == wanted
    assert len(measured) == 5


@pytest.mark.slow
def test_what_they_depend_on_is_measured_again(place, tmp_path, measured):
    start(place, tmp_path / "first")
    write_rows(tmp_path / "other.jsonl", 6, start=200)
    save_tiny(tmp_path / "other", seed=1)
    changes = [
        {"data": {"test": str(tmp_path / "other.jsonl")}},
        {"model": {"name_or_path": str(tmp_path / "other")}},
        {"model": {"dtype": "bfloat16"}},
        {"model": {"quantization": "int8"}},
        {"evaluation": {"rows": 2}},
        {"evaluation": {"max_new_tokens": 3}},
        {"evaluation": {"batch_size": 2}},
        {"data": {"template": "plain"}},
    ]
    for number, change in enumerate(changes):
        count = len(measured)
        start(place, tmp_path / str(number), **change)
        assert len(measured) == count + 2, change
    assert len(list((tmp_path / "cache/base_scores").iterdir())) == len(changes) + 1


def test_other_ends_of_answers_are_measured_again(place, tmp_path, measured):
    """Which tokens end an answer, generation_config.json alone may say."""
    model = shutil.copytree(place / "model", tmp_path / "model")
    found = start(place, tmp_path / "first", model={"name_or_path": str(model)}).before
    assert any(answer.text for answer in found.answers)
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": list(range(261))}))
    found = start(place, tmp_path / "second", model={"name_or_path": str(model)}).before
    assert not any(answer.text for answer in found.answers)
    assert len(measured) == 4


def test_other_code_of_a_model_is_another_model(place, tmp_path, measured, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shutil.copytree(place / "model", tmp_path / "own")
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own_scores", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (model / "config.json").write_text(json.dumps(config))

    def loss(name, factor):
        (model / "own.py").write_text(OWN_CODE.format(factor=factor))
        own = {"name_or_path": str(model), "trust_remote_code": True}
        return start(place, tmp_path / name, model=own).before.loss

    assert loss("first", 1.0) != loss("second", 2.0)


def test_a_damaged_file_is_made_again_with_a_warning(place, tmp_path, cache):
    first = start(place, tmp_path / "first")
    (file,) = cache.glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"loss": ', b'"loss":1', 1))
    second = start(place, tmp_path / "second")
    assert any("is damaged; what it held is measured again" in text for text in second.warnings)
    assert second.before == first.before
    assert len(file.read_bytes().splitlines()) == len(whole.splitlines())
    assert not any("damaged" in text for text in start(place, tmp_path / "third").warnings)


@pytest.mark.slow
def test_the_command_says_so(place, tmp_path):
    for name in ("first", "second"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings(place, tmp_path / name)))
        done = dude("train", path, DUDE_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
    assert "held-out rows, before: known from an earlier run of this base model" in done.stdout
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "second")]
    assert reports[0]["before"] == reports[1]["before"]
    shutil.rmtree(tmp_path / "cache")
