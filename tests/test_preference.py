"""`train.objective: dpo` as users run it: against TRL's trainer, interrupted, in two processes, with bad input."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import served
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from test_train_resume import _CutError, cut_at, in_process, result, wait_for_a_checkpoint
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dude_peft import DudeConfig, check_data, plan
from dude_peft.comparison.cells import Grid
from dude_peft.config.reading import load_config, load_grid
from dude_peft.config.schema import DpoSection, RunConfig
from dude_peft.data.formats import Reading
from dude_peft.data.objectives import KINDS
from dude_peft.data.rows import load_rows
from dude_peft.errors import ConfigError, DataError
from dude_peft.measure.token_logps import row_logps
from dude_peft.training.preference import PreferenceLoss
from dude_peft.training.run import run
from dude_peft.training.trainer import RunTrainer

SLOW = pytest.mark.slow
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    save_tiny(folder / "model")
    write_pairs(folder / "train.jsonl", 22)  # with batches of 2, three to a step, an epoch ends with a short step
    write_pairs(folder / "test.jsonl", 4, start=100)
    return folder


def write_pairs(path: Path, count: int, *, start: int = 0) -> Path:
    """Pairs whose answers have many lengths."""
    rows = [
        {"prompt": f"say {n}", "chosen": "yes" + "!" * (n % 5), "rejected": f"no, never {n * n}"}
        for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(places: Path, out: Path, **sections: dict) -> dict:
    wanted: dict = {
        "model": {"name_or_path": str(places / "model")},
        "adapter": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        "data": {"train": str(places / "train.jsonl"), "test": str(places / "test.jsonl"), "template": "plain"},
        "train": {
            "objective": "dpo",
            "learning_rate": 0.01,
            "max_steps": 10,
            "logging_steps": 3,
            "per_device_train_batch_size": 2,
            "save_steps": 1,
        },
        "evaluation": {"rows": 2, "max_new_tokens": 2, "eval_steps": 4},
        "output_dir": str(out),
    }
    return {key: value | sections.get(key, {}) if isinstance(value, dict) else value for key, value in wanted.items()}


def start(wanted: dict):
    return run(RunConfig(**wanted), quiet=True)


def order_of_rows(monkeypatch) -> list[int]:
    """The numbers of the rows that runs train on from here on, in order."""
    order: list[int] = []
    seen = RunTrainer.training_step

    def noted(self, model, inputs, *rest):
        order.extend(inputs["rows"].tolist())
        return seen(self, model, inputs, *rest)

    monkeypatch.setattr(RunTrainer, "training_step", noted)
    return order


def same_losses_and_adapter(trainer, folder: Path) -> tuple[list[dict], list[dict]]:
    """The lines of losses of the run in `folder`/ours and of TRL's trainer, once they and the adapters are the same."""
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    ours = [line for line in lines(folder / "ours") if "loss" in line]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    assert abs(ours[0]["loss"] - ours[-1]["loss"]) > 1e-3  # it went somewhere
    trainer.model.save_pretrained(folder / "theirs")
    saved, wanted = load_file(folder / "ours" / WEIGHTS), load_file(folder / "theirs/adapter_model.safetensors")
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(saved[name], tensor, atol=1e-5), name
    return ours, theirs


def refuses_to_read(folder: Path, wanted: dict, words: str) -> None:
    """A file with this configuration is refused in one line with these words."""
    path = folder / "run.yaml"
    path.write_text(json.dumps(wanted))
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- equal to TRL -------------------------------------------------------------------------------------------------


def by_trl(wanted: dict, order: list[int], folder: Path):
    """TRL's trainer, of dpo and kto with a separate reference model, on the same rows in the same order."""
    datasets = pytest.importorskip("datasets", reason="the trainers read datasets; install dude-peft[train]")
    objective = wanted["train"]["objective"]
    module = "trl" if objective in ("dpo", "kto") else f"trl.experimental.{objective}"
    trl = pytest.importorskip(module, reason="TRL is not here, or too old: pip install 'dude-peft[trl]'")

    class InOrder(getattr(trl, f"{objective.upper()}Trainer")):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = RunConfig(**wanted).resolved()
    rows = [json.loads(line) for line in Path(wanted["data"]["train"]).read_text().splitlines()]
    asked = [{**rows[n], "prompt": f"### Question:\n{rows[n]['prompt']}\n\n### Answer:\n"} for n in order]
    model = AutoModelForCausalLM.from_pretrained(wanted["model"]["name_or_path"])
    transformers.set_seed(config.train.seed)
    model = get_peft_model(model, DudeConfig(**config.adapter.settings(), task_type="CAUSAL_LM"))
    train, section = config.train, config.train.preference
    own = {name: value for name, value in section.model_dump().items() if value is not None}
    reference = {}
    if objective == "dpo":
        own["loss_type"] = [section.loss_type]
    if section.has_base:
        reference["ref_model"] = AutoModelForCausalLM.from_pretrained(wanted["model"]["name_or_path"])
    trainer = InOrder(
        model=model,
        **reference,
        args=getattr(trl, f"{objective.upper()}Config")(
            **own,
            output_dir=str(folder), max_steps=train.max_steps, learning_rate=train.learning_rate, optim=train.optim,
            per_device_train_batch_size=train.per_device_train_batch_size, lr_scheduler_type=train.lr_scheduler_type,
            gradient_accumulation_steps=train.gradient_accumulation_steps, warmup_steps=0, max_grad_norm=1.0,
            bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no",
            dataloader_pin_memory=False, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(asked),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("objective", "method", "optim", "section"),
    [
        ("dpo", "dude", "adamw_torch", {}),
        pytest.param("dpo", "lora", "sgd", {"loss_type": "ipo", "beta": 0.4}, marks=SLOW),
        pytest.param("dpo", "dora", "adamw_torch", {"loss_type": "robust", "label_smoothing": 0.1}, marks=SLOW),
        pytest.param("dpo", "pissa", "sgd", {"loss_type": "apo_zero", "beta": 0.5}, marks=SLOW),
        ("orpo", "lora", "adamw_torch", {"beta": 0.3}),
        ("cpo", "dude", "sgd", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
        pytest.param("cpo", "dora", "adamw_torch", {"label_smoothing": 0.1}, marks=SLOW),
    ],
)
def test_twenty_steps_are_trls_with_a_separate_reference_model(
    places, tmp_path, monkeypatch, objective, method, optim, section
):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    order = order_of_rows(monkeypatch)
    train = {
        "max_steps": 20, "logging_steps": 1, "optim": optim, "learning_rate": 1e-2 if optim != "sgd" else 2.0,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "gradient_accumulation_steps": 1, "objective": objective,
        objective: section,
    }  # fmt: skip
    wanted = settings(places, tmp_path / "ours", adapter={"method": method}, train=train)
    wanted["evaluation"] = {"enabled": False}
    start(wanted)
    trainer = by_trl(wanted, order, tmp_path / "trl")
    ours, theirs = same_losses_and_adapter(trainer, tmp_path)
    for name in ("rewards/margins", "rewards/accuracies", "logps/rejected"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], abs=2e-4), name


def test_the_reference_is_the_base_model_bit_by_bit_and_no_second_model_is_there(places, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(places / "model")
    wanted = settings(places, tmp_path / "out", adapter={"lora_dropout": 0.2}, train={"neftune_noise_alpha": 5.0})
    looked, models = PreferenceLoss.look, []

    def compared(self, model, inputs):
        looked(self, model, inputs)
        with torch.no_grad():
            logits = base(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        assert torch.equal(self._base, row_logps(logits, inputs["labels"])[0])
        judged = (inputs["labels"] != -100).any(0)
        assert inputs["logits_to_keep"] == len(judged) == int(judged.sum()) + 1 < inputs["input_ids"].shape[1]
        models.append(sum(isinstance(each, LlamaForCausalLM) for each in gc.get_objects()))

    monkeypatch.setattr(PreferenceLoss, "look", compared)
    gc.collect()
    before = sum(isinstance(each, LlamaForCausalLM) for each in gc.get_objects())
    report = start(wanted)
    assert models == [before + 1] * 10
    assert report.before.loss == pytest.approx(0.6931471805599453, rel=1e-12)
    assert report.before.preference["rewards/margins"] == 0.0
    assert report.after.preference["rewards/margins"] > 0.05
    assert report.after.preference["right"] == report.after.preference["pairs"] == 4


def test_held_out_pairs_are_scored_as_the_saved_adapter_scores_them(places, tmp_path):
    from dude_peft import load_adapter

    report = start(settings(places, tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(places / "model")
    tuned = load_adapter(AutoModelForCausalLM.from_pretrained(places / "model"), tmp_path / "out/adapter").eval()
    tokenizer, found = tiny_tokenizer(), []
    for line in (places / "test.jsonl").read_text().splitlines():
        row, ratios = json.loads(line), []
        for side in ("chosen", "rejected"):
            asked = tokenizer(f"### Question:\n{row['prompt']}\n\n### Answer:\n")["input_ids"]
            ids = [*asked, *tokenizer(row[side])["input_ids"], 256]
            with torch.no_grad():
                logits = [model(input_ids=torch.tensor([ids])).logits[0] for model in (tuned, base)]
            logp = [each.double().log_softmax(-1) for each in logits]
            at = torch.arange(len(asked), len(ids))
            ratios.append(
                sum(sign * part[at - 1, torch.tensor(ids)[at]].sum() for sign, part in zip((1, -1), logp, strict=True))
            )
        found.append(float(-torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1]))))
    assert report.after.losses == pytest.approx(found, rel=1e-4)
    assert report.after.loss == pytest.approx(sum(found) / 4, rel=1e-5)


# --- interrupted, several processes, early stopping ---------------------------------------------------------------


def interrupted(places: Path, out: Path, objective: str) -> dict:
    train = {"objective": objective, "gradient_accumulation_steps": 3, "weight_decay": 0.1, "logging_steps": 4}
    return settings(places, out, adapter={"lora_dropout": 0.2}, train=train)


@pytest.mark.parametrize(
    ("objective", "step"),
    [("dpo", 3), *(pytest.param(*case, marks=SLOW) for case in [("dpo", 6), ("dpo", 9), ("orpo", 5)])],
)
def test_a_run_that_was_cut_goes_on_bit_by_bit(places, tmp_path, monkeypatch, objective, step):
    start(interrupted(places, tmp_path / "whole", objective))
    with monkeypatch.context() as patch:
        cut_at(step, patch)
        with pytest.raises(_CutError):
            start(interrupted(places, tmp_path / "out", objective))
    torch.manual_seed(999)
    start(interrupted(places, tmp_path / "out", objective))
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert any("rewards/margins" in line for line in lines(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "train", "method"),
    [
        ("dpo", {"bf16": True, "gradient_checkpointing": True}, "dude"),
        ("dpo", {"train_sampling_strategy": "group_by_length", "optim": "adafactor"}, "lora"),
        ("cpo", {"neftune_noise_alpha": 5.0, "cpo": {"loss_type": "simpo", "beta": 2.0}}, "pissa"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_other_settings_go_on_bit_by_bit_as_well(places, tmp_path, monkeypatch, objective, train, method):
    def wanted(name: str) -> dict:
        made = interrupted(places, tmp_path / name, objective)
        return made | {"train": made["train"] | train, "adapter": made["adapter"] | {"method": method}}

    start(wanted("whole"))
    with monkeypatch.context() as patch:
        cut_at(5, patch)
        with pytest.raises(_CutError):
            start(wanted("out"))
    start(wanted("out"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
def test_a_killed_process_goes_on_bit_by_bit(places, tmp_path):
    def process(name: str) -> subprocess.Popen:
        return in_process(tmp_path, interrupted(places, tmp_path / name, "dpo"))

    assert process("whole").wait() == 0
    running = process("out")
    wait_for_a_checkpoint(tmp_path / "out", running)
    running.kill()
    running.wait()
    assert not (tmp_path / "out/report.json").exists()
    assert process("out").wait() == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_the_best_adapter_may_be_that_of_the_accuracy_and_training_stops_early(places, tmp_path):
    wanted = settings(
        places,
        tmp_path / "out",
        train={"max_steps": 40, "learning_rate": 0.02},
        evaluation={
            "eval_steps": 2,
            "metric_for_best_model": "rewards/accuracies",
            "early_stopping_patience": 2,
        },
    )
    report = start(wanted)
    measured = {
        line["step"]: line["eval_rewards/accuracies"] for line in lines(tmp_path / "out") if "eval_loss" in line
    }
    best = max(measured.values())
    assert report.best_step == next(step for step, value in measured.items() if value == best)
    assert report.steps == report.best_step + 4 < 40
    assert report.after.preference["rewards/accuracies"] == best


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo as on POSIX")
@pytest.mark.parametrize(("strategy", "objective"), [("ddp", "dpo"), ("fsdp2", "dpo"), ("ddp", "orpo")])
def test_two_processes_train_as_one(places, tmp_path, strategy, objective):
    found, rows = {}, str(write_pairs(tmp_path / "train.jsonl", 24))
    for name, size, arguments in (("one", 4, []), ("two", 2, ["--launch", strategy, "--processes", "2"])):
        train = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2, "max_steps": 6}
        train |= {"objective": objective, "learning_rate": 0.003}
        path = tmp_path / f"{name}.yaml"
        wanted = settings(places, tmp_path / name, train=train, data={"train": rows})
        path.write_text(json.dumps(wanted))
        done = served.dude("train", path, *arguments)
        assert done.returncode == 0, done.stderr
        found[name] = [
            {key: line[key] for key in line if "loss" in key or "/" in key} for line in lines(tmp_path / name)
        ]
    for one, two in zip(*found.values(), strict=True):
        assert two == pytest.approx(one, abs=2e-5)
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"packing": True}}, "data.packing.*padded to one length"),
        ({"data": {"train_on": "all"}}, "data.train_on.*judged whole"),
        ({"data": {"upft": 4}}, "data.upft.*judged whole"),
        ({"train": {"trainer": "trl"}}, "train.trainer.*takes no pairs"),
        ({"train": {"torch_compile": True}}, "torch_compile.*not compiled"),
        ({"adapter": {"bias": "all"}}, "adapter.bias.*no base model"),
        ({"adapter": {"budget": {"parameters": "1%", "by": "fisher"}}}, "adapter.budget.by.*uniform or spectrum"),
        ({"train": {"objective": "sft", "dpo": {"beta": 0.2}}}, "train.dpo.*no effect on train.objective: sft"),
        ({"train": {"dpo": {"beta": 0}}}, "train.dpo.beta.*0"),
        ({"train": {"dpo": {"beta": -0.1}}}, "train.dpo.beta"),
        ({"train": {"dpo": {"beta": 1e38}}}, "train.dpo.beta.*1000"),
        ({"train": {"dpo": {"loss_type": "sigmod"}}}, "train.dpo.loss_type"),
        ({"train": {"dpo": {"label_smoothing": 0.1}}}, "label_smoothing.*no effect on sigmoid"),
        ({"train": {"dpo": {"loss_type": "exo_pair"}}}, "label_smoothing.*exo_pair needs one above 0"),
        ({"train": {"dpo": {"loss_type": "robust", "label_smoothing": 0.5}}}, "label_smoothing"),
        ({"train": {"dpo": {"reference_free": True}}}, "train.dpo.reference_free"),
        ({"train": {"objective": "dop"}}, "train.objective.*dpo"),
        ({"train": {"objective": "orpo", "dpo": {}}}, "train.dpo.*no effect on train.objective: orpo"),
        ({"train": {"objective": "cpo", "cpo": {"simpo_gamma": 1.0}}}, "simpo_gamma.*no effect on sigmoid"),
        ({"train": {"objective": "cpo", "cpo": {"loss_type": "ipo", "label_smoothing": 0.1}}}, "no effect on ipo"),
        ({"train": {"objective": "cpo", "cpo": {"cpo_alpha": -1}}}, "train.cpo.cpo_alpha"),
        ({"train": {"objective": "orpo", "orpo": {"beta": 0}}}, "train.orpo.beta"),
        ({"train": {"objective": "orpo"}, "data": {"packing": True}}, "data.packing.*orpo: the two answers"),
        (
            {"train": {"objective": "sft"}, "evaluation": {"metric_for_best_model": "rewards/margins"}},
            "metric_for_best_model.*measured on pairs",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_what_dpo_cannot_do_is_refused_in_one_line(places, tmp_path, sections, words):
    refuses_to_read(tmp_path, settings(places, tmp_path / "out", **sections), words)


def test_general_rows_are_told_to_be_mols(places, tmp_path):
    wanted = settings(places, tmp_path / "out", data={"general": str(places / "train.jsonl")})
    with pytest.raises(ValueError, match=r"not used by train\.objective: dpo"):
        RunConfig(**wanted)


def test_rows_of_another_objective_say_which_they_fit(places, tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "q", "completion": "a"}\n')
    for sections, words in (
        ({"data": {"train": str(answers)}}, "answers.jsonl:1: rows of answers.*train.objective: sft, mol"),
        ({"data": {"train": "builtin:word-problems"}}, "word-problems: its rows fit train.objective: sft"),
        ({"train": {"objective": "sft"}}, "train.jsonl:1: chosen, rejected: preference data.*train.objective: dpo"),
        (
            {"train": {"objective": "sft"}, "data": {"train": "builtin:preferences"}},
            "builtin:preferences: its rows fit train.objective: dpo",
        ),
    ):
        with pytest.raises(DataError, match=words) as caught:
            start(settings(places, tmp_path / "out", **sections))
        assert "\n" not in str(caught.value)


U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
B = {"role": "assistant", "content": "better"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "chosen": "a"}, "'chosen' without 'rejected'"),
        ({"prompt": "q", "rejected": "a"}, "'rejected' without 'chosen'"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "'chosen' is null"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "'rejected' is int"),
        ({"chosen": "a", "rejected": "b"}, "nothing asks; add a column prompt"),
        ({"chosen": [U, A], "rejected": [{**U, "content": "x"}, B]}, "differ before the answer, in message 0"),
        ({"chosen": [U, A, U, B], "rejected": [U, A]}, "all of 'rejected' is the beginning of 'chosen'"),
        ({"chosen": [U, A], "rejected": [U]}, "has no answer"),
        ({"chosen": [A], "rejected": [B]}, "no user message before the answer"),
        ({"prompt": "other", "chosen": [U, A], "rejected": [U, B]}, "whole conversation without what 'prompt' asks"),
        ({"text": "a"}, "rows of answers"),
        ({"id": 3}, "no pair of answers in the columns"),
    ],
)
def test_bad_pairs_are_told_with_their_place(tmp_path, row, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=words) as caught:
        load_rows(str(path), reading=Reading(kind="pairs"))
    assert str(caught.value).startswith(f"{path}:1:")
    assert "\n" not in str(caught.value)


def test_a_start_that_is_not_the_base_model_is_refused_with_what_to_do(places, tmp_path):
    start(settings(places, tmp_path / "first"))
    again = settings(places, tmp_path / "second")
    again["adapter"] = {"start": str(tmp_path / "first/adapter")}
    with pytest.raises(
        ConfigError, match=r"reference.*another model than the start; merge the adapter with dude merge"
    ):
        start(again)
    assert not (tmp_path / "second").exists() or not any((tmp_path / "second").glob("*.json"))


def test_an_adapter_that_does_not_give_the_base_back_is_refused(places, tmp_path, monkeypatch):
    from contextlib import nullcontext

    from dude_peft.training import model_checks

    monkeypatch.setattr(model_checks, "as_base", lambda model: nullcontext())
    start(settings(places, tmp_path / "fresh"))  # a fresh adapter changes nothing
    peft = tmp_path / "peft.json"
    peft.write_text(json.dumps({"peft_type": "LORA", "r": 2, "init_lora_weights": False}))
    wanted = settings(places, tmp_path / "out")
    wanted["adapter"] = {"method": f"peft:{peft}"}
    with pytest.raises(ConfigError, match="disabled adapter does not give the base model back"):
        start(wanted)
    monkeypatch.undo()
    report = start(wanted)
    assert report.after.preference["rewards/margins"] != 0.0
    assert report.before.preference["rewards/margins"] == 0.0


def test_compare_refuses_pairs(places, tmp_path):
    wanted = {"run": settings(places, tmp_path / "run"), "methods": ["dude", "lora"], "output_dir": str(tmp_path)}
    grid = Grid(*load_grid(wanted))
    with pytest.raises(ConfigError, match="dpo: dude compare ranks methods by the loss of answers"):
        grid.final(grid.contestants[0], 1e-3, {}, 3)


# --- rows, plan, report -------------------------------------------------------------------------------------------


def test_every_shape_of_a_pair_becomes_the_same_tokens(tmp_path, places):
    u, a, b = {"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}, {"from": "gpt", "value": "no"}
    shapes = [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"question": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": [u], "chosen": [a], "rejected": [b]},
        {"prompt": "q", "chosen": [u, a], "rejected": [u, b], "score_chosen": 9.0},
        {"chosen": [u, a], "rejected": [u, b]},
        {"instruction": "q", "chosen": a, "rejected": b},
    ]
    path = tmp_path / "shapes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in shapes))
    report = check_data(path, str(places / "model"), objective="dpo")
    assert report.examples == len(shapes) == report.duplicates + 1
    assert set(report.samples) == {
        "<|user|>q<|end|>\n<|assistant|>«yes<|end|>»",
        "<|user|>q<|end|>\n<|assistant|>«no<|end|>»",
    }
    mapped = tmp_path / "mapped.csv"
    mapped.write_text("ask,good,bad\nq,yes,no\n")
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert check_data(mapped, str(places / "model"), objective="dpo", columns=columns).samples == report.samples[:2]


def test_only_what_follows_the_shared_messages_is_judged(tmp_path, places):
    shared = [S, U, A, U]
    row = {"chosen": [*shared, B], "rejected": [*shared, A, U, {**A, "content": "worse"}]}
    path = tmp_path / "turns.jsonl"
    path.write_text(json.dumps(row) + "\n")
    better, worse = check_data(path, str(places / "model"), objective="dpo").samples
    begin = "<|system|>s<|end|>\n<|user|>u<|end|>\n<|assistant|>a<|end|>\n<|user|>u<|end|>\n<|assistant|>"
    assert better == f"{begin}«better<|end|>»"
    assert worse == f"{begin}«a<|end|>»\n<|user|>u<|end|>\n<|assistant|>«worse<|end|>»"


def test_data_check_counts_what_cannot_be_learned(tmp_path, places):
    rows = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no" * n} for n in range(1, 5)]
    rows += [
        {"prompt": "same", "chosen": "a", "rejected": "a"},
        {"prompt": "long", "chosen": "a", "rejected": "b" * 99},
    ]
    path, test = tmp_path / "rows.jsonl", tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test.write_text(json.dumps(rows[0]) + "\n")
    done = served.dude(
        "data", "check", path, "--model", places / "model", "--objective", "dpo", "--test", test, "--max-length", 60
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "format: prompt + chosen + rejected" in said
    assert "pairs: 4; 1 left out as identical; the chosen answer is longer in 1, by -5 to 1 tokens" in said
    assert "1 of 6 pairs are left out: their chosen and rejected answers are the same tokens" in said
    assert "1 of 6 rows are longer than max_length 60" in said
    assert "1 of 1 held-out examples repeat the question" in said
    assert "objective: dpo" in said
    same = tmp_path / "same.jsonl"
    same.write_text(json.dumps(rows[4]) + "\n")
    with pytest.raises(DataError, match="in all 1 pairs the chosen and the rejected answer are the same"):
        check_data(same, str(places / "model"), objective="dpo")
    with pytest.raises(ConfigError, match="--objective 'ppo': choose sft, mol, dpo, orpo, cpo"):
        check_data(path, str(places / "model"), objective="ppo")


def test_the_builtin_pairs_are_deterministic_and_differ_in_the_last_number_alone():
    rows = load_rows("builtin:preferences", limit=300, reading=Reading(kind="pairs"))
    assert rows == load_rows("builtin:preferences", limit=400, reading=Reading(kind="pairs"))[:300]
    for row in rows:
        right, wrong = row.messages[-1].content, row.rejected[-1].content
        assert row.prompt == row.rejected[:-1] == row.messages[:-1]
        (*steps, last), (*others, other) = (text.split("\n#### ")[0].split(" = ") for text in (right, wrong))
        assert steps == others
        assert last == right.split("#### ")[1] != other == wrong.split("#### ")[1]
        assert int(other) >= 0
    test = load_rows("builtin:preferences", split="test", limit=300, reading=Reading(kind="pairs"))
    assert not {row.prompt for row in rows} & {row.prompt for row in test}


def test_a_run_on_builtin_pairs_learns_them_and_its_page_says_so(places, tmp_path):
    wanted = settings(
        places,
        tmp_path / "out",
        data={"train": "builtin:preferences", "test": 0.2, "train_rows": 40},
        train={"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 8},
    )
    del wanted["train"]["max_steps"]
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(wanted))
    done = served.dude("train", path)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert all(words in said for words in ("accuracy", "margin", "pairs ranked right, by reward"))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["data"]["train"]["examples"], report["steps"]) == (32, 4)
    assert report["after"]["preference"]["pairs"] == 8 == len(report["after"]["losses"])
    assert report["tokens"] == report["data"]["train"]["tokens"]
    assert start(json.loads(path.read_text())).after.preference["pairs"] == 8  # finished: read back
    done = served.dude("report", tmp_path / "out", "-o", tmp_path / "out.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.md").read_text()
    assert all(words in page for words in ("preference loss a pair", "Held-out pairs", "Rewards of the pairs"))
    again = load_config(tmp_path / "out/config.yaml")
    assert again.train.dpo == DpoSection(beta=0.1)


@pytest.mark.parametrize(
    ("objective", "rate"),
    [("sft", 3e-4), ("dpo", 1.5e-5), ("orpo", 1.5e-5), ("cpo", 1.5e-5), ("kto", 1.5e-5), ("grpo", 1.5e-5)],
)
def test_where_nobody_set_a_rate_it_is_a_twentieth_of_that_for_rows(objective, rate):
    wanted = {"model": {"name_or_path": "m"}, "data": {"train": "a.jsonl", "test": "b.jsonl"}, "output_dir": "out"}
    config = RunConfig(**wanted, train={"objective": objective, "max_steps": 1})
    assert config.resolved().train.learning_rate == rate


def test_a_plan_counts_both_answers(places, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings(places, tmp_path / "out")))
    pairs = plan(path)
    assert pairs.rows.rows == 22
    assert pairs.as_dict()["batch"]["rows"] == 4
    assert "4 conversations, two of each pair, of" in pairs._repr_html_()
    report = check_data(places / "train.jsonl", str(places / "model"), objective="dpo", template="plain")
    assert pairs.rows.tokens_per_row == pytest.approx(report.tokens / 22)
    assert pairs.tokens_per_step == pytest.approx(2 * report.tokens / 22)
    assert any("the base model's pass over every pair is not counted" in text for text in pairs.warnings)
    alone = tmp_path / "alone.yaml"
    wanted = settings(places, tmp_path / "out", train={"objective": "sft", "per_device_train_batch_size": 4})
    wanted["data"] |= {"columns": {"completion": "chosen"}}
    alone.write_text(json.dumps(wanted))
    assert plan(alone).cost.bill.weights == pairs.cost.bill.weights


def test_every_objective_has_a_kind_of_rows():
    from typing import get_args

    from dude_peft.config.schema import TrainSection

    assert set(get_args(TrainSection.model_fields["objective"].annotation)) == set(KINDS)


def test_a_text_file_has_no_pairs(places, tmp_path):
    (tmp_path / "rows.txt").write_text("hi\n", encoding="utf-8")
    with pytest.raises(DataError, match="text has no pairs; it fits"):
        check_data(tmp_path / "rows.txt", str(places / "model"), objective="dpo")
