"""`train.extra_arguments`: each field of Trainer is handed on with an effect, or refused before a model is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from served import dude
from tiny import save_tiny, write_rows
from transformers import TrainingArguments

from dude_peft.config.reading import load_config
from dude_peft.config.schema import RunConfig, TrainSection
from dude_peft.config.trainer_fields import HANDED_ON, classified
from dude_peft.errors import ConfigError
from dude_peft.training import run as run_module
from dude_peft.training import trainer as trainer_module
from dude_peft.training.extra_arguments import handed_on
from dude_peft.training.run import run


class _CutError(Exception):
    pass


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extra")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 14)
    return folder


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


def settings(places: Path, out: Path, **train: object) -> dict:
    return {
        "model": {"name_or_path": str(places / "model")},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(places / "train.jsonl"), "template": "plain"},
        "train": {"learning_rate": 0.01, "max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 1, **train},
        "evaluation": {"enabled": False},
        "output_dir": str(out),
    }


def weights(out: Path) -> dict:
    return load_file(out / "adapter/adapter_model.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_every_field_of_the_installed_trainer_is_known():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not fields - classified()
    assert fields >= HANDED_ON


EFFECTS = {
    "adam_beta1": ({"adam_beta1": 0.5}, {}),
    "adam_beta2": ({"adam_beta2": 0.5}, {}),
    "adam_epsilon": ({"adam_epsilon": 0.01}, {}),
    "lr_scheduler_kwargs": ({"lr_scheduler_kwargs": {"num_cycles": 3.0}}, {}),
    "optim_args": ({"optim_args": "momentum=0.9"}, {"optim": "sgd"}),
}


@pytest.mark.parametrize("what", EFFECTS)
def test_a_field_has_an_effect_is_recorded_and_resumes_bit_by_bit(places, tmp_path, monkeypatch, what):
    extra, beside = EFFECTS[what]
    wanted = settings(places, tmp_path / "with", extra_arguments=extra, **beside)
    run(RunConfig(**wanted), quiet=True)
    run(RunConfig(**settings(places, tmp_path / "without", **beside)), quiet=True)
    assert not same(tmp_path / "with", tmp_path / "without")
    report = json.loads((tmp_path / "with/report.json").read_text())
    assert report["config"]["train"]["extra_arguments"] == extra
    assert load_config(tmp_path / "with/config.yaml").train.extra_arguments == extra

    original = trainer_module.RunTrainer._save_checkpoint

    def cut(self, *args):
        original(self, *args)
        if self.state.global_step == 2:
            raise _CutError

    interrupted = {**wanted, "output_dir": str(tmp_path / "cut")}
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.RunTrainer, "_save_checkpoint", cut)
        with pytest.raises(_CutError):
            run(RunConfig(**interrupted), quiet=True)
    other = {**interrupted, "train": {**interrupted["train"], "extra_arguments": {}}}
    with pytest.raises(ConfigError, match=rf"train\.extra_arguments\.{what}"):
        run(RunConfig(**other), quiet=True)
    one_more = {
        **interrupted,
        "train": {**interrupted["train"], "extra_arguments": extra | {"torch_empty_cache_steps": 9}},
    }
    with pytest.raises(ConfigError, match=r"another configuration \(train\.extra_arguments\.torch_empty_cache_steps"):
        run(RunConfig(**one_more), quiet=True)
    run(RunConfig(**interrupted), quiet=True)
    assert same(tmp_path / "with", tmp_path / "cut")


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"adam_beta_2": 0.9}, "no field of TrainingArguments that a run can take; closest: 'adam_beta2'"),
        ({"zzz": 1}, "known: adam_beta1"),
        ({"learning_rate": 1e-3}, r"set train\.learning_rate"),
        ({"data_seed": 3}, r"set train\.seed"),
        ({"save_strategy": "no"}, "checkpoints of its own"),
        ({"dataloader_drop_last": True}, "which rows a step has"),
        ({"push_to_hub": True}, "dude upload"),
        ({"fsdp": "full_shard"}, "--launch"),
        ({"torch_compile_mode": "max-autotune"}, "by timing"),
        ({"torch_compile_backend": "inductor"}, r"with train\.torch_compile: true alone"),
        ({"lr_scheduler_kwargs": {"x": 1}}, r"no effect on train\.lr_scheduler_type: constant"),
        ({"run_name": "x"}, r"set train\.report_to"),
        ({"adam_beta2": float("nan")}, "finite"),
    ],
)
def test_a_field_is_refused_while_the_file_is_read(tmp_path, extra, told):
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(settings(tmp_path, tmp_path / "out", extra_arguments=extra, lr_scheduler_type="constant"))
    assert "\n" not in str(caught.value)
    assert "train.extra_arguments" in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"adam_beta2": "0.9"}, "valid number, got '0.9'"),
        ({"adam_beta2": 2.0}, "Invalid beta parameter"),
        ({"lr_scheduler_kwargs": {"cycles": 3}}, "unexpected keyword argument 'cycles'"),
        ({"optim_args": "momentum=0.9"}, "has no effect on train.optim: adamw_torch"),
        ({"lr_scheduler_kwargs": "num_cycles"}, "must be a mapping, not str"),
        ({"full_determinism": 1}, "valid boolean"),
        ({"optim_args": "a"}, "write it as name=value,name=value"),
        ({"lr_scheduler_kwargs": {"num_cycles": "NaN"}}, "is text; write a finite number"),
        ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "change it"),
        ({"lr_scheduler_kwargs": {"num_cycles": None}}, "change it"),
        ({"lr_scheduler_kwargs": {"num_cycles": 1e308}}, "change it"),
        ({"adam_epsilon": 0}, "an epsilon of 0 makes NaN"),
    ],
)
def test_a_value_is_refused_before_the_model_is_loaded(places, tmp_path, monkeypatch, extra, told):
    monkeypatch.setattr("dude_peft.training.loading.load_model", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(ConfigError, match=told) as caught:
        run(RunConfig(**settings(places, tmp_path / "out", extra_arguments=extra)), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_full_determinism_is_on_while_the_run_trains_and_not_behind_it(places, tmp_path, monkeypatch):
    from transformers import Trainer

    def switches():
        cudnn = torch.backends.cudnn
        return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, os.environ.get("CUDA_LAUNCH_BLOCKING")

    seen, trained = [], Trainer.train
    monkeypatch.setattr(
        Trainer, "train", lambda self, *rest, **named: seen.append(switches()) or trained(self, *rest, **named)
    )
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = switches()
    assert not before[0]
    run(RunConfig(**settings(places, tmp_path / "out", extra_arguments={"full_determinism": True})), quiet=True)
    assert seen == [(True, True, "1")]
    assert switches() == before
    assert torch.backends.cudnn.benchmark


def test_a_field_written_beside_the_keys_is_told_where_it_belongs(tmp_path):
    for name, told in (
        ("adam_beta2", "write it into train.extra_arguments"),
        ("dataloader_num_workers", "nothing to do"),
    ):
        with pytest.raises(ConfigError, match=rf"key 'train\.{name}' is unknown; .*{told}"):
            load_config(settings(tmp_path, tmp_path / "out", **{name: 0.9}))


def test_a_plan_refuses_what_the_run_refuses_and_says_what_it_does_not_count(places, tmp_path):
    from dude_peft.planning.run import plan

    wanted = settings(places, tmp_path / "out", extra_arguments={"adam_beta2": 2.0})
    with pytest.raises(ConfigError, match="Invalid beta parameter"):
        plan(RunConfig(**wanted), quiet=True)
    wanted["train"] |= {"optim": "sgd", "extra_arguments": {"optim_args": "momentum=0.9"}, "torch_compile": True}
    warnings = plan(RunConfig(**wanted), quiet=True).warnings
    assert any("optim_args" in each for each in warnings)
    assert any("torch_compile" in each for each in warnings)


def test_the_command_refuses_in_one_line(places, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(places, tmp_path / "out", extra_arguments={"save_only_model": True})))
    done = dude("train", file)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "train.extra_arguments.save_only_model" in done.stderr


@pytest.mark.parametrize(
    ("schedule", "given", "rate", "told"),
    [
        ("inverse_sqrt", {"timescale": 0}, 0.01, "division by zero"),
        ("inverse_sqrt", {"timescale": -5}, 0.01, "no share of it"),
        ("polynomial", {"power": -5}, 0.01, "change"),
        ("polynomial", {"lr_end": 4e-5}, 1e-5, "smaller than initial lr"),
        ("polynomial", {}, 1e-8, "smaller than initial lr"),
        ("polynomial", {"lr_end": 1e-4}, 0.01, None),
        ("cosine", {"num_cycles": 2}, 0.01, None),
    ],
)
def test_a_schedule_is_walked_through_before_the_model_is_loaded(schedule, given, rate, told):
    section = TrainSection(
        lr_scheduler_type=schedule, learning_rate=rate, max_steps=20, extra_arguments={"lr_scheduler_kwargs": given}
    )
    if told is None:
        assert handed_on(section) == {"lr_scheduler_kwargs": given}
        return
    with pytest.raises(ConfigError, match=told) as caught:
        handed_on(section)
    assert "\n" not in str(caught.value)


def test_a_whole_number_stands_for_a_decimal():
    assert handed_on(TrainSection(learning_rate=0.1, extra_arguments={"adam_beta1": 0})) == {"adam_beta1": 0.0}
