"""What happens around the steps: bad numbers, measuring on the way, the best adapter, groups of rates, movement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama, write_rows

from dude_peft import DudeConfig
from dude_peft.config.schema import RunConfig, TrainSection
from dude_peft.errors import ConfigError, NumericsError, ResourceError
from dude_peft.measure.movement import MovementCallback, movement
from dude_peft.training import loop as loop_module
from dude_peft.training.groups import parameter_groups
from dude_peft.training.order import EpochOrder
from dude_peft.training.run import run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(checkpoint, tmp_path) -> dict:
    return {
        "model": {"name_or_path": str(checkpoint)},
        "adapter": {"r": 4},
        "data": {
            "train": str(write_rows(tmp_path / "train.jsonl", 24)),
            "test": str(write_rows(tmp_path / "test.jsonl", 6, start=100)),
        },
        "train": {"learning_rate": 0.01, "max_steps": 8, "logging_steps": 2, "per_device_train_batch_size": 4},
        "evaluation": {"rows": 1, "max_new_tokens": 2},
        "output_dir": str(tmp_path / "out"),
    }


def start(settings: dict, **changes: dict):
    merged = {
        key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in settings.items()
    }
    return run(RunConfig(**merged), quiet=True)


def lines(settings: dict) -> list[dict]:
    return [json.loads(line) for line in Path(settings["output_dir"], "metrics.jsonl").read_text().splitlines()]


# --- bad numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_bad_number_stops_before_the_step_and_names_the_rows(settings, monkeypatch, where, accumulated):
    """Poison in one micro-batch of step 4: exit 5, the rows named, the weights of step 3 in the last checkpoint."""
    from dude_peft.training.trainer import RunTrainer

    original = RunTrainer.compute_loss
    named: list[str] = []

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 3 and len(self.loop.batches) == accumulated - 1:
            if where == "loss":
                return loss * torch.nan
            return loss + (next(p for p in model.parameters() if p.requires_grad) * 0).abs().sqrt().sum()  # slope inf
        return loss

    seen = loop_module.Loop.seen

    def watched(self, loss, rows):
        named.append(", ".join(self.name_of(row).rpartition(":")[2] for row in rows.tolist()))
        seen(self, loss, rows)

    stepped = []
    before = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (stepped.append(1), before(self, *a, **k))[1])
    monkeypatch.setattr(RunTrainer, "compute_loss", poisoned)
    monkeypatch.setattr(loop_module.Loop, "seen", watched)
    with pytest.raises(NumericsError, match="at step 4, on rows ") as caught:
        start(settings, train={"save_steps": 1, "gradient_accumulation_steps": accumulated})
    assert len(stepped) == 3
    assert named[-1] in str(caught.value)
    if where == "loss" and accumulated > 1:
        assert named[-2] not in str(caught.value)  # only the micro-batch that was bad
    out = Path(settings["output_dir"])
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    for path in out.rglob("*.safetensors"):
        assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in load_file(path).values())
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("where", ["weight", "exp_avg", "exp_avg_sq", "lr"])
def test_no_bad_number_reaches_a_checkpoint(settings, monkeypatch, where):
    """Poison behind step 4, of which no loss has heard: the checkpoint of step 3 is the newest, and the run goes on."""
    original = loop_module.Loop.on_step_end

    def poisoned(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **rest):
        if state.global_step == 4:
            weight = next(p for p in model.parameters() if p.requires_grad)
            with torch.no_grad():
                if where == "weight":
                    weight.view(-1)[0] = torch.nan
                elif where == "lr":
                    optimizer.param_groups[0]["lr"] = float("inf")
                else:
                    optimizer.state[weight][where].view(-1)[-1] = torch.inf
        return original(self, args, state, control, model=model, lr_scheduler=lr_scheduler, **rest)

    monkeypatch.setattr(loop_module.Loop, "on_step_end", poisoned)
    with pytest.raises(NumericsError, match="has NaN or Inf after step 4; this step was not saved"):
        start(settings, train={"save_steps": 1})
    monkeypatch.undo()
    out = Path(settings["output_dir"])
    assert max(path.name for path in (out / "checkpoints").iterdir()) == "step-00000003"
    assert start(settings, train={"save_steps": 1}).steps == 8
    for path in out.rglob("*.safetensors"):
        assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in load_file(path).values())


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
@pytest.mark.parametrize(
    "train",
    [{"learning_rate": 1e20}, {"learning_rate": 1e38}, {"learning_rate": 1e38, "optim": "adafactor"},
     {"loraplus_lr_ratio": 1e38}],
    ids=str,
)  # fmt: skip
def test_the_last_step_is_looked_at_like_every_other(settings, train, trainer):
    if trainer == "trl":
        pytest.importorskip("trl")
        if train != {"learning_rate": 1e20}:
            pytest.skip("the same look")
    one = {"max_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant", "trainer": trainer}
    with pytest.raises(NumericsError, match=r"step 1.*lower train\.learning_rate"):
        start(settings, train=one | train, evaluation={"enabled": False}, data={"test": None})
    out = Path(settings["output_dir"])
    assert {path.name for path in out.iterdir()} <= {"run.json", "metrics.jsonl"}


def test_looking_takes_no_part_of_a_step(settings, monkeypatch):
    """Only where something is written, and behind the last step."""
    from dude_peft.training.trainer import RunTrainer

    looked = []
    original = RunTrainer.check_sound
    monkeypatch.setattr(
        RunTrainer, "check_sound", lambda self, *a: (looked.append(self.state.global_step), original(self, *a))[1]
    )
    start(settings, train={"save_steps": 5})
    assert looked == [5, 8]


def test_memory_that_runs_out_is_told_and_the_last_checkpoint_stays(settings, monkeypatch):
    """A real allocation that the CPU refuses, in step 4."""
    from dude_peft.training.trainer import RunTrainer

    original = RunTrainer.compute_loss

    def hungry(self, *args, **kwargs):
        if self.state.global_step == 3:
            torch.empty(10**15)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "compute_loss", hungry)
    with pytest.raises(ResourceError, match=r"does not fit into memory at step 4; lower train\.per_device"):
        start(settings, train={"save_steps": 1})
    monkeypatch.undo()
    assert start(settings, train={"save_steps": 1}).steps == 8


# --- measuring on the way -----------------------------------------------------------------------------------------


def script(monkeypatch, held_out: list[float]) -> None:
    """The held-out losses of a run, one after the other."""
    losses = iter(held_out)
    original = loop_module.Loop._measure_held_out

    def scripted(self, step, model):
        self.held_out_scores = lambda: {"loss": next(losses)}
        return original(self, step, model)

    monkeypatch.setattr(loop_module.Loop, "_measure_held_out", scripted)


def test_the_best_adapter_is_the_result(settings, monkeypatch):
    script(monkeypatch, [0.9, 0.5, 0.7, 0.8])
    report = start(settings, evaluation={"eval_steps": 2}, train={"save_steps": 1, "save_total_limit": 8})
    assert report.best_step == 4
    out = Path(settings["output_dir"])
    best = load_file(out / "checkpoints/step-00000004/adapter/adapter_model.safetensors")
    kept = load_file(out / "adapter/adapter_model.safetensors")
    last = load_file(out / "checkpoints/step-00000008/adapter/adapter_model.safetensors")
    assert all(best[name].equal(kept[name]) for name in best)
    assert not all(last[name].equal(kept[name]) for name in last)
    assert [(line["step"], line["eval_loss"]) for line in lines(settings) if "eval_loss" in line] == [
        (2, 0.9), (4, 0.5), (6, 0.7), (8, 0.8)
    ]  # fmt: skip
    assert [path.name for path in (out / "checkpoints").glob("best-*")] == ["best-00000004"]


def test_training_ends_early_and_stays_ended(settings, monkeypatch):
    script(monkeypatch, [0.5, 0.7, 0.6, 0.4])
    evaluation = {"eval_steps": 2, "early_stopping_patience": 2}
    report = start(settings, evaluation=evaluation)
    assert (report.steps, report.best_step) == (6, 2)
    out = Path(settings["output_dir"])
    (out / "report.json").unlink()  # as if killed behind the end of training
    again = start(settings, evaluation=evaluation)
    assert (again.steps, again.best_step) == (6, 2)


def test_the_threshold_ends_training_and_chooses_no_adapter(settings, monkeypatch):
    """Each a little better: too little for patience, and the last one is the best all the same."""
    script(monkeypatch, [0.5, 0.49, 0.48, 0.4])
    evaluation = {"eval_steps": 2, "early_stopping_patience": 2, "early_stopping_threshold": 0.05}
    report = start(settings, evaluation=evaluation)
    assert (report.steps, report.best_step) == (6, 6)


def test_small_gains_that_add_up_are_a_gain(settings, monkeypatch):
    script(monkeypatch, [0.5, 0.48, 0.44, 0.43])
    evaluation = {"eval_steps": 2, "early_stopping_patience": 2, "early_stopping_threshold": 0.05}
    report = start(settings, evaluation=evaluation)
    assert (report.steps, report.best_step) == (8, 8)


@pytest.mark.parametrize(
    ("kind", "warm"),
    [
        ("cosine", 0.05),
        ("cosine", 0),
        ("linear", 3),
        ("constant_with_warmup", 3),
        ("polynomial", 3),
        ("inverse_sqrt", 3),
    ],
)
def test_no_step_of_a_warm_up_has_no_rate(settings, kind, warm):
    """Step k of w has k / (w + 1) of the rate; afterwards it is transformers' schedule."""
    from transformers import get_scheduler

    start(
        settings, train={"lr_scheduler_type": kind, "warmup_steps": warm, "logging_steps": 1},
        evaluation={"enabled": False}, data={"test": None},
    )  # fmt: skip
    rates = [line["learning_rate"] / 0.01 for line in lines(settings) if "learning_rate" in line]
    steps = {0.05: 1, 3: 3, 0: 0}[warm]
    assert rates[:steps] == pytest.approx([step / (steps + 1) for step in range(1, steps + 1)])
    if kind == "inverse_sqrt":  # its fall depends on the warm-up's length, which is a step longer
        assert max(rates) == pytest.approx(1)
        return
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=steps, num_training_steps=8)
    wanted = []
    for _ in range(8):
        wanted.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[steps:] == pytest.approx(wanted[steps:], abs=1e-4)  # the polynomial's end is a rate, not a share


@pytest.mark.slow
def test_the_time_that_is_left_counts_the_last_evaluation(settings, monkeypatch, capsys, tmp_path):
    import time

    from dude_peft.training import held_out_scorer

    original = held_out_scorer.complete
    monkeypatch.setattr(held_out_scorer, "complete", lambda *a, **k: (time.sleep(2), original(*a, **k))[1])
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))
    for out in ("measured", "known"):  # the second run finds the scores from before, and how long they took
        run(RunConfig(**{**settings, "output_dir": str(tmp_path / out)}))
        last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 8/8"))
        assert int(last.rpartition("ETA ")[2].split()[0]) >= 2


def test_measuring_changes_no_training(settings, tmp_path):
    start(settings, adapter={"lora_dropout": 0.2})
    other = settings | {"output_dir": str(tmp_path / "other")}
    start(other, adapter={"lora_dropout": 0.2}, evaluation={"eval_steps": 1, "load_best_model_at_end": False})
    one, two = (load_file(Path(s["output_dir"], "adapter/adapter_model.safetensors")) for s in (settings, other))
    assert all(one[name].equal(two[name]) for name in one)


def test_patience_without_measuring_is_refused():
    from pydantic import ValidationError

    from dude_peft.config.schema import EvaluationSection

    with pytest.raises(ValidationError, match="eval_steps"):
        EvaluationSection(early_stopping_patience=2)


def test_a_tracker_that_is_not_installed_is_refused_before_the_model(settings, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(ConfigError, match="pip install wandb"):
        start(settings, train={"report_to": ["wandb"]})


# --- packing, and TRL's trainer ------------------------------------------------------------------------------------


def first_loss(settings: dict) -> float:
    return next(line["loss"] for line in lines(settings) if line["step"] == 1)


def test_packing_trains_on_the_same_losses(settings, tmp_path):
    """All rows in one step, padded and laid end to end: the same loss, tokens apart from padding, and gradient."""
    one = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 24}
    start(settings, train=one)
    packed = settings | {"output_dir": str(tmp_path / "packed")}
    start(packed, train=one, data={"packing": True, "max_length": 30})
    assert first_loss(packed) == pytest.approx(first_loss(settings), abs=1e-5)
    padded, flat = (next(line for line in lines(s) if line["step"] == 1) for s in (settings, packed))
    assert flat["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)
    assert flat["tokens"] == padded["tokens"]


def test_a_model_that_mixes_rows_is_not_packed(settings, tmp_path):
    from tiny import tiny_tokenizer
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path / "mamba"
    MambaForCausalLM(MambaConfig(vocab_size=261, hidden_size=32, num_hidden_layers=1, state_size=4)).save_pretrained(
        folder
    )
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"data\.packing: MambaForCausalLM does not keep packed rows apart"):
        start(settings, model={"name_or_path": str(folder)}, data={"packing": True})


@pytest.mark.parametrize("packing", [False, True])
def test_trl_s_trainer_sees_the_same_losses(settings, tmp_path, packing):
    pytest.importorskip("trl")
    data = {"packing": packing, "max_length": 30}
    one = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 24}
    start(settings, train=one, data=data)
    other = settings | {"output_dir": str(tmp_path / "trl")}
    start(other, train=one | {"trainer": "trl"}, data=data)
    assert first_loss(other) == pytest.approx(first_loss(settings), abs=1e-5)


def test_a_trl_that_loses_the_labels_is_refused(settings, monkeypatch):
    """TRL 1.0 to 1.6 dropped them where they packed: the loss was then over the prompts too."""
    trainer = pytest.importorskip("trl.trainer.sft_trainer").SFTTrainer
    real = trainer._prepare_dataset
    monkeypatch.setattr(trainer, "_prepare_dataset", lambda *a, **k: real(*a, **k).remove_columns("labels"))
    with pytest.raises(ConfigError, match="loses the labels"):
        start(settings, train={"trainer": "trl"}, data={"packing": True, "max_length": 30})


# --- groups of rates ----------------------------------------------------------------------------------------------


def test_rates_of_a_b_and_m():
    model = get_peft_model(tiny_llama(), DudeConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]))
    section = TrainSection(learning_rate=1e-3, loraplus_lr_ratio=16.0, magnitude_lr_ratio=0.1, weight_decay=0.01)
    groups = parameter_groups(model, section, {n for n, _ in model.named_parameters() if "dB" in n})
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in rates
        elif "lora_dB" in name:
            assert rates[id(parameter)] == (1e-3 * 16, 0.01)
        elif "lora_dm" in name:
            assert rates[id(parameter)] == (1e-3 * 0.1, 0.0)
        else:
            assert rates[id(parameter)] == (1e-3, 0.0)


def test_a_ratio_is_applied(settings, tmp_path):
    start(settings)
    other = settings | {"output_dir": str(tmp_path / "other")}
    start(other, train={"magnitude_lr_ratio": 1e-6})
    moved, still = (
        [line["movement"] for line in lines(s) if "movement" in line]
        for s in (settings | {}, other)
    )  # fmt: skip
    assert moved == still == []  # nothing was asked for
    start(settings | {"output_dir": str(tmp_path / "a")}, train={"movement_steps": 8})
    start(settings | {"output_dir": str(tmp_path / "b")}, train={"movement_steps": 8, "magnitude_lr_ratio": 1e-6})
    moved, still = (
        next(line["movement"] for line in lines({"output_dir": tmp_path / name}) if "movement" in line)
        for name in ("a", "b")
    )
    for layer, numbers in moved.items():
        assert still[layer]["magnitude"] < 1e-4 * numbers["magnitude"]
        assert still[layer]["direction"] > 0.1 * numbers["direction"]


# --- movement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dude", "dora", "pissa", "lora"])
@pytest.mark.parametrize("size", [1e-4, 0.3])
def test_movement_is_dora_s_two_quantities(method, size):
    """Against the dense definition in float64, for changes down to where 1 - cos is 1e-8."""
    model = get_peft_model(tiny_llama(), DudeConfig(method=method, r=3, lora_alpha=5, target_modules=["q_proj"]))
    assert all(set(numbers.values()) == {0.0} for numbers in movement(model).values())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not (method in ("dora", "lora") and "dA" in name):
                parameter.add_(size * torch.randn_like(parameter))
    found = movement(model)
    assert len(found) == 2
    for layer in model.modules():
        if getattr(layer, "layer_name", None) not in found:
            continue
        layer.requires_grad_(False)
        tensors = layer.tensors("default")
        W0 = layer.get_base_layer().weight.double()
        A0 = torch.zeros_like(tensors.dA) if tensors.A0 is None else tensors.A0
        B0 = torch.zeros_like(tensors.dB) if tensors.B0 is None else tensors.B0
        D = tensors.dB.double() @ (A0 + tensors.dA).double() + B0.double() @ tensors.dA.double()
        V = W0 + layer.scaling["default"] * D
        cosine = torch.nn.functional.cosine_similarity(V, W0, dim=1).detach()
        numbers = found[layer.layer_name]
        assert numbers["direction"] == pytest.approx(float((1 - cosine).mean()), rel=2e-3, abs=2e-10)
        if tensors.dm is None:
            assert "magnitude" not in numbers
        else:
            wanted = (tensors.dm.abs() / W0.norm(dim=1)).mean()
            assert numbers["magnitude"] == pytest.approx(float(wanted), rel=1e-4)


def test_the_callback_works_in_any_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(tiny_llama(), DudeConfig(r=2, target_modules=["q_proj", "v_proj"]))
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
    told = MovementCallback()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, logging_steps=1, use_cpu=True, report_to=[], learning_rate=0.01,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[told])
    trainer.train()
    assert len(told.layers) == 4
    assert all(0 < numbers["magnitude"] < 1 and 0 < numbers["direction"] < 1 for numbers in told.layers.values())


# --- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [0, 6])
def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(grouped):
    lengths = [(7 * index) % 50 + 1 for index in range(101)]
    order = EpochOrder(lengths, seed=3, grouped=grouped)
    epochs = []
    for epoch in range(3):
        order.begin(epoch)
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(101))
    assert epochs[0] != epochs[1] != epochs[2]
    order.begin(1)
    assert list(order) == epochs[1]
    assert list(EpochOrder(lengths, seed=4, grouped=grouped)) != epochs[0]
    if grouped:
        steps = [epochs[0][first : first + 6] for first in range(0, 96, 6)]
        spread = sum(max(lengths[r] for r in step) - min(lengths[r] for r in step) for step in steps) / len(steps)
        assert spread < 8  # of 50, where a random step of six spreads over 35
