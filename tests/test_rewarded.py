"""`train.objective: grpo` as users run it: against TRL's trainer, interrupted, with bad rewards and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from test_preference import WEIGHTS, lines, settings, start
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dude_peft import DudeConfig
from dude_peft.config.schema import RunConfig
from dude_peft.training.rollouts import Rollouts

SLOW = pytest.mark.slow
LETTERS = {"kind": "format", "pattern": ".*[ -~].*[ -~].*", "name": "letters"}
"""A random model of bytes writes two printable characters by chance, so that groups differ."""
SHORT = {"kind": "length", "soft_punish_cache": 5}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewarded")
    save_tiny(folder / "model")
    generation = {"eos_token_id": [256, *range(150, 180)], "pad_token_id": 257}  # many tokens that end an answer
    (folder / "model/generation_config.json").write_text(json.dumps(generation))
    write(folder / "train.jsonl", 10)
    write(folder / "test.jsonl", 4, start=100)
    return folder


def write(path: Path, count: int, *, start: int = 0) -> Path:
    rows = [{"prompt": "say " + "it " * (n % 4) + str(n), "completion": str(n)} for n in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def grpo(places: Path, out: Path, *, section: dict | None = None, **sections: dict) -> dict:
    own = {"num_generations": 4, "max_completion_length": 6, "rewards": [LETTERS, SHORT]} | (section or {})
    train = {"objective": "grpo", "per_device_train_batch_size": 8, "grpo": own} | sections.pop("train", {})
    return settings(places, out, train=train, **sections)


def rollouts(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]


# --- equal to TRL -------------------------------------------------------------------------------------------------


def by_trl(wanted: dict, answers: list[tuple], folder: Path):
    """TRL's trainer on the same answers to the same prompts in the same order; rewards are those of the run."""
    datasets = pytest.importorskip("datasets", reason="the trainers read datasets; install dude-peft[train]")
    trl = pytest.importorskip("trl", reason="TRL is not here: pip install 'dude-peft[trl]'")
    config = RunConfig(**wanted).resolved()
    train, section = config.train, config.train.rewarded
    asked = iter(answers)

    class SameAnswers(trl.GRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _tokenize_prompts(self, prompts):
            self.step_answers = [next(asked) for _ in prompts]
            return [prompt for prompt, _, _ in self.step_answers], None, {}

        def _generate_single_turn(self, *_):
            return [ids for _, ids, _ in self.step_answers], None

    def reward(number: int):
        def named(completions, **_):
            return [scores[number] for _, _, scores in trainer.step_answers]

        named.__name__ = section.rewards[number].title
        return named

    model = AutoModelForCausalLM.from_pretrained(wanted["model"]["name_or_path"])
    transformers.set_seed(train.seed)
    model = get_peft_model(model, DudeConfig(**config.adapter.settings(), task_type="CAUSAL_LM"))
    ours = ("rewards", "trust_reward_files", "reward_timeout")
    own = {name: value for name, value in section.model_dump().items() if name not in ours and value is not None}
    every = section.num_iterations * train.max_steps * train.per_device_train_batch_size
    trainer = SameAnswers(
        model=model,
        reward_funcs=[reward(number) for number in range(len(section.rewards))],
        args=trl.GRPOConfig(
            **own,
            reward_weights=[reward.weight for reward in section.rewards],
            output_dir=str(folder), max_steps=train.max_steps, learning_rate=train.learning_rate, optim=train.optim,
            per_device_train_batch_size=train.per_device_train_batch_size, lr_scheduler_type=train.lr_scheduler_type,
            gradient_accumulation_steps=train.gradient_accumulation_steps, warmup_steps=0, max_grad_norm=1.0,
            bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no",
            dataloader_pin_memory=False, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * every * train.gradient_accumulation_steps),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("method", "optim", "train", "section"),
    [
        ("dude", "adamw_torch", {}, {"beta": 0.1}),
        ("lora", "sgd", {}, {"num_iterations": 2, "epsilon": 1e-4, "beta": 0.5}),
        pytest.param("dora", "sgd", {}, {"loss_type": "grpo", "scale_rewards": "batch", "beta": 0.2}, marks=SLOW),
        pytest.param("pissa", "sgd", {}, {"loss_type": "dr_grpo", "scale_rewards": "none"}, marks=SLOW),
        pytest.param("lora", "sgd", {}, {"loss_type": "bnpo", "temperature": 1.3, "top_p": 0.9}, marks=SLOW),
        pytest.param(
            "lora", "sgd", {"gradient_accumulation_steps": 2},
            {"importance_sampling_level": "sequence", "num_iterations": 3, "epsilon": 1e-5, "epsilon_high": 2e-5},
            marks=SLOW,
        ),
        pytest.param("lora", "sgd", {}, {"mask_truncated_completions": True, "beta": 0.5}, marks=SLOW),
    ],
)  # fmt: skip
def test_twenty_steps_are_trls_on_the_same_answers(places, tmp_path, monkeypatch, method, optim, train, section):
    answers: list[tuple] = []
    kept = Rollouts._keep

    def noted(self, step, rows, prompts, drawn, scores, *rest):
        answers.extend((prompts[row], each.ids, own) for row, each, own in zip(rows, drawn, scores, strict=True))
        kept(self, step, rows, prompts, drawn, scores, *rest)

    monkeypatch.setattr(Rollouts, "_keep", noted)
    train_changes = train
    train = {
        "max_steps": 20, "logging_steps": 1, "optim": optim, "learning_rate": 1e-3 if optim != "sgd" else 0.1,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "gradient_accumulation_steps": 1, **train,
    }  # fmt: skip
    wanted = grpo(places, tmp_path / "ours", adapter={"method": method}, train=train, section=section)
    wanted["train"]["grpo"]["rewards"] = [LETTERS, SHORT | {"weight": 0.5}]
    wanted["evaluation"] = {"enabled": False}
    start(wanted)
    trainer = by_trl(wanted, answers, tmp_path / "trl")
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    ours = [line for line in lines(tmp_path / "ours") if "loss" in line]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    assert max(line.get("frac_reward_zero_std", 0) for line in ours) < 1  # there was something to learn
    names = {"reward", "reward_std", "rewards/letters/mean", "rewards/length/std", "grad_norm"}
    names |= {"completions/mean_length", "completions/clipped_ratio"}
    if section.get("scale_rewards") != "batch":  # TRL's is then of the batch
        names.add("frac_reward_zero_std")
    if "gradient_accumulation_steps" not in train_changes:  # TRL averages means of forward passes, we all tokens
        names |= {"entropy", *(["kl"] if "beta" in section else [])}
        names |= {"clip_ratio/region_mean"} if "num_iterations" in section else set()
    for name in sorted(names):
        both = [(mine[name], its[name]) for mine, its in zip(ours, theirs, strict=True) if name in mine and name in its]
        assert len(both) >= 20 // section.get("num_iterations", 1)
        assert [mine for mine, _ in both] == pytest.approx([its for _, its in both], abs=1e-4, rel=1e-4), name
    if "num_iterations" in section:
        assert max(line["clip_ratio/region_mean"] for line in ours) > 0  # clipping took part
    trainer.model.save_pretrained(tmp_path / "theirs")
    saved, wanted = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(saved[name], tensor, atol=1e-5), (name, (saved[name] - tensor).abs().max())
    moved = [tensor.abs().max() for name, tensor in saved.items() if "lora_B" in name]
    assert max(moved) > 1e-3
