"""`train.objective: grpo` as users run it: against TRL's trainer, interrupted, with bad rewards and bad input."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import served
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from test_preference import WEIGHTS, lines, refuses_to_read, settings, start
from test_train_resume import _CutError, cut_at, digest, in_process, result, wait_for_a_checkpoint
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dude_peft import DudeConfig, check_data, plan
from dude_peft.answer.merged import merged_if_equal
from dude_peft.config.schema import GrpoSection, RunConfig
from dude_peft.errors import ConfigError, DataError
from dude_peft.rewards.judge import Group, Judge
from dude_peft.training.group_order import GroupOrder
from dude_peft.training.rewarded import RewardedLoss
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
    if not hasattr(trl.GRPOTrainer, "_tokenize_prompts"):
        pytest.skip("this TRL's GRPOTrainer cannot be given answers")
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
    ours = ("rewards", "trust_reward_files", "reward_timeout", "reward_memory_gib")
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
        ("lora", "sgd", {}, {"num_iterations": 2, "epsilon": 2e-3, "beta": 0.5}),
        pytest.param(
            "dora", "sgd", {},
            {"loss_type": "grpo", "scale_rewards": "batch", "beta": 0.2, "use_bias_correction_kl": False},
            marks=SLOW,
        ),
        pytest.param("pissa", "sgd", {}, {"loss_type": "dr_grpo", "scale_rewards": "none"}, marks=SLOW),
        pytest.param("lora", "sgd", {}, {"loss_type": "bnpo", "temperature": 1.3, "top_p": 0.9}, marks=SLOW),
        pytest.param(
            "lora", "sgd", {"gradient_accumulation_steps": 2},
            {"importance_sampling_level": "sequence", "num_iterations": 3, "epsilon": 2e-4, "epsilon_high": 4e-4}
            | {"beta": 0.2},
            marks=SLOW,
        ),
        # With seed 0 an answer ends in the padding token, which TRL takes for a whole one.
        pytest.param("lora", "sgd", {"seed": 1}, {"mask_truncated_completions": True, "beta": 0.5}, marks=SLOW),
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
        "max_steps": 20, "logging_steps": 1, "optim": optim, "learning_rate": 1e-2 if optim != "sgd" else 2.0,
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


def test_the_reference_is_the_base_model_bit_by_bit_and_no_second_model_is_there(places, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(places / "model").eval()
    made, models = Rollouts._batch, []

    def compared(self, *arguments):
        batch = made(self, *arguments)
        self.model.set_adapter("default")
        kept, self.model = self.model, base
        base.get_base_model = lambda: base
        assert torch.equal(batch["base"], self._logps(batch))
        self.model = kept
        models.append(sum(isinstance(each, LlamaForCausalLM) for each in gc.get_objects()))
        return batch

    monkeypatch.setattr(Rollouts, "_batch", compared)
    gc.collect()
    before = sum(isinstance(each, LlamaForCausalLM) for each in gc.get_objects())
    train = {"max_steps": 4, "neftune_noise_alpha": 5.0, "learning_rate": 0.05, "logging_steps": 1}
    start(grpo(places, tmp_path / "out", adapter={"lora_dropout": 0.2}, section={"beta": 0.1}, train=train))
    assert models == [before + 1] * 4
    kl = [line["kl"] for line in lines(tmp_path / "out") if "loss" in line]
    assert min(kl) > 0


# --- interrupted --------------------------------------------------------------------------------------------------


def interrupted(places: Path, out: Path, section: dict | None = None, **train: object) -> dict:
    wanted = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "weight_decay": 0.1, **train}
    return grpo(places, out, adapter={"lora_dropout": 0.2}, section={"beta": 0.1} | (section or {}), train=wanted)


def whole_result(out: Path) -> dict:
    found = result(out) | {"rollouts": digest(out / "rollouts.jsonl")}
    found["state"]["loop"].pop("rollouts_bytes")
    return found


@pytest.mark.parametrize(
    ("step", "section", "train"),
    [
        (3, {"num_iterations": 2}, {}),
        pytest.param(7, {}, {}, marks=SLOW),
        pytest.param(5, {"num_iterations": 3, "importance_sampling_level": "sequence"}, {}, marks=SLOW),
        pytest.param(4, {"num_iterations": 2}, {"bf16": True, "gradient_checkpointing": True}, marks=SLOW),
    ],
)
def test_a_run_that_was_cut_goes_on_bit_by_bit(places, tmp_path, monkeypatch, step, section, train):
    start(interrupted(places, tmp_path / "whole", section, **train))
    with monkeypatch.context() as patch:
        cut_at(step, patch)
        with pytest.raises(_CutError):
            start(interrupted(places, tmp_path / "out", section, **train))
    with (tmp_path / "out/rollouts.jsonl").open("a") as file:
        file.write('{"step": 99}\n{"half')  # what a process wrote behind its last checkpoint
    torch.manual_seed(999)
    start(interrupted(places, tmp_path / "out", section, **train))
    assert whole_result(tmp_path / "out") == whole_result(tmp_path / "whole")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["files"]["rollouts.jsonl"] == digest(tmp_path / "out/rollouts.jsonl")
    assert [line["step"] for line in rollouts(tmp_path / "out")][::8] == list(
        range(1, 11, section.get("num_iterations", 1))
    )


@SLOW
@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
@pytest.mark.parametrize("with_", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_goes_on_bit_by_bit_and_leaves_no_process(places, tmp_path, with_):
    def process(name: str) -> subprocess.Popen:
        return in_process(tmp_path, interrupted(places, tmp_path / name, {"num_iterations": 2}, max_steps=20))

    assert process("whole").wait() == 0
    running = process("out")
    wait_for_a_checkpoint(tmp_path / "out", running)
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    assert children
    running.send_signal(with_)
    assert running.wait() == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[with_]
    assert not (tmp_path / "out/report.json").exists()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{child}") for child in children):
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{child}") for child in children)
    assert process("out").wait() == 0
    assert whole_result(tmp_path / "out") == whole_result(tmp_path / "whole")


# --- what a run tells ---------------------------------------------------------------------------------------------


def test_every_rollout_is_kept_with_its_rewards_and_held_out_answers_are_rewarded(places, tmp_path):
    section = {"rewards": [{"kind": "answer", "weight": 2.0}, LETTERS], "num_generations": 2}
    report = start(grpo(places, tmp_path / "out", section=section, train={"max_steps": 4, "logging_steps": 1}))
    found = rollouts(tmp_path / "out")
    assert len(found) == 4 * 8
    asked = {json.loads(line)["prompt"]: n for n, line in enumerate((places / "train.jsonl").read_text().splitlines())}
    for line in found:
        question = line["prompt"].removeprefix("### Question:\n").removesuffix("\n\n### Answer:\n")
        assert line["row"] == f"{places / 'train.jsonl'}:{asked[question] + 1}"
        assert line["answer"] == question.rpartition(" ")[2]
        assert line["reward"] == 2 * line["rewards"]["answer"] + line["rewards"]["letters"]
        assert 1 <= line["tokens"] <= 6
        assert line["ended"] or line["tokens"] == 6
    for pair in zip(found[::2], found[1::2], strict=True):
        assert pair[0]["prompt"] == pair[1]["prompt"]
        assert pair[0]["advantage"] == pytest.approx(-pair[1]["advantage"])
    logged = [line for line in lines(tmp_path / "out") if "loss" in line]
    for line in logged:
        own = [each for each in found if each["step"] == line["step"]]
        assert line["reward"] == pytest.approx(sum(each["reward"] for each in own) / 8)
        assert line["rewards/letters/mean"] == pytest.approx(sum(each["rewards"]["letters"] for each in own) / 8)
        assert line["completions/mean_length"] == sum(each["tokens"] for each in own) / 8
    after = report.after
    assert after.rewards["rewards/answer/mean"] == after.right / after.rows
    assert after.rewards["reward"] == 2 * after.rewards["rewards/answer/mean"] + after.rewards["rewards/letters/mean"]
    measured = [line for line in lines(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in measured] == [4]
    assert measured[0]["eval_reward"] == after.rewards["reward"]


@SLOW
def test_a_model_learns_what_is_rewarded(places, tmp_path):
    save_tiny(tmp_path / "model", initializer_range=0.1)  # one whose logits are large enough to be changed
    section = {"rewards": [{"kind": "format", "pattern": ".*[a-z].*[a-z].*"}], "num_generations": 8}
    train = {"max_steps": 30, "logging_steps": 1, "learning_rate": 0.03, "per_device_train_batch_size": 16}
    wanted = grpo(places, tmp_path / "out", section=section, train=train | {"save_steps": 30})
    start(wanted | {"model": {"name_or_path": str(tmp_path / "model")}, "evaluation": {"enabled": False}})
    rewards = [line["reward"] for line in lines(tmp_path / "out") if "loss" in line]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


def test_answers_are_drawn_with_merged_weights_where_these_are_equal_and_every_bit_comes_back():
    model = get_peft_model(tiny_llama(), DudeConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    for name, tensor in model.named_parameters():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * ("lora" in name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {"input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    logits = model(**batch).logits
    with torch.no_grad(), merged_if_equal(model, logits=lambda model: model(**batch).logits) as merged:
        assert merged
        assert torch.allclose(model(**batch).logits, logits, atol=1e-5)
    assert torch.equal(model(**batch).logits, logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with merged_if_equal(model.to(torch.bfloat16)) as merged:
        assert not merged


def test_steps_hold_whole_groups_and_every_prompt_is_asked():
    order = GroupOrder([0] * 7, 5, answers=2, step=6, iterations=2)
    places = list(order)
    assert len(places) == len(order) == 3 * 6 * 2
    steps = [places[start : start + 6] for start in range(0, len(places), 6)]
    assert all(step[0::2] == step[1::2] for step in steps)
    assert steps[0::2] == steps[1::2]
    asked = [prompt for step in steps[::2] for prompt in step[::2]]
    assert sorted(asked[:7]) == list(range(7))
    assert asked[7:] == asked[:2]
    order.begin(1)
    assert list(order) != places


def test_processes_share_a_step_by_whole_groups():
    one = list(GroupOrder([0] * 7, 5, answers=4, step=16, iterations=2))
    places = list(GroupOrder([0] * 7, 5, answers=4, step=16, iterations=2, batch=2, processes=2))
    for first in range(0, len(one), 16):
        batches = [places[begin : begin + 2] for begin in range(first, first + 16, 2)]  # dealt in turn
        assert [place for batch in batches[0::2] for place in batch] == one[first : first + 8]
        assert [place for batch in batches[1::2] for place in batch] == one[first + 8 : first + 16]


# --- rewards ------------------------------------------------------------------------------------------------------


def code(folder: Path, body: str) -> dict:
    """A file of rewards with a function of this body, and the section that confirms it."""
    path = folder / "rewards.py"
    path.write_text(f"import os, sys, time\n\ndef mine(completions, **others):\n    {body}\n")
    reward = {"kind": "function", "file": str(path), "function": "mine"}
    return {"rewards": [reward], "trust_reward_files": True, "reward_timeout": 1.0}


def judge_of(section: dict) -> Judge:
    settings = GrpoSection(**section)
    return Judge(settings.model_copy(update={"rewards": [each.sealed() for each in settings.rewards]}))


def test_your_own_reward_gets_what_trl_gives_and_is_part_of_what_the_run_is(places, tmp_path):
    body = (
        "print('noise'); sys.stdin.read()\n"
        "    assert set(others) == {'prompts', 'completion_ids', 'answer'}, others\n"
        "    assert len({*others['prompts']}) == len({*others['answer']}) == 1\n"
        "    return [len(ids) / 10 for ids in others['completion_ids']]"
    )
    section = code(tmp_path, body)
    report = start(grpo(places, tmp_path / "out", section=section, train={"max_steps": 2}))
    assert any("mine of" in text and "runs with your permissions" in text for text in report.warnings)
    assert all(line["rewards"]["mine"] == line["tokens"] / 10 for line in rollouts(tmp_path / "out"))
    assert len(report.config["train"]["grpo"]["rewards"][0]["sha256"]) == 64
    code(tmp_path, "return [1.0 for _ in completions]")
    with pytest.raises(ConfigError, match=r"another configuration .*rewards.*sha256"):
        start(grpo(places, tmp_path / "out", section=section, train={"max_steps": 2}))
    with pytest.raises(ConfigError, match=r"not the file that was meant: its sha256"):
        RunConfig(**report.config).resolved()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('solution')", r"the reward mine failed: line 4: KeyError: 'solution'"),
        ("time.sleep(60)", r"the reward mine took longer than 1 s, .*raise train.grpo.reward_timeout"),
        ("return [float('nan')] * len(completions)", r"the reward mine gave nan for the answer"),
        ("return [None] * len(completions)", r"the reward mine gave nothing for the answer"),
        ("return [1e300] * len(completions)", r"the reward mine gave 1e\+300"),
        ("return [0.5]", r"the reward mine gave 1 numbers for 4 answers"),
        ("return 0.5", r"the reward mine failed: it returned float, not a list of numbers"),
        ("return '1101'", r"the reward mine failed: it returned str, not a list of numbers"),
        ("return b'1101'", r"the reward mine failed: it returned bytes, not a list of numbers"),
        ("return ['right'] * len(completions)", r"the reward mine failed: .*ValueError"),
        ("os._exit(3)", r"the reward mine ended its process with status 3, .*; correct it, and start over"),
        ("os.kill(os.getpid(), 11)", r"ended its process with signal SIGSEGV, .*; correct it, or if it ran out of mem"),
        ("sys.exit(3)", r"the reward mine failed: line 4: SystemExit"),
    ],
)
def test_a_reward_that_fails_ends_the_run_with_the_prompt_and_the_row(places, tmp_path, body, words):
    judge = Judge(RunConfig(**grpo(places, tmp_path / "out", section=code(tmp_path, body))).resolved().train.grpo)
    with pytest.raises(DataError, match=words) as caught:
        judge.score(Group("rows.jsonl:7", "How\nmany?", ["one", "two", "three", "four"], [[1]] * 4, "4"))
    judge.close()
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert r"on the prompt 'How\nmany?'" in str(caught.value)
    assert "\n" not in str(caught.value)


LIMITED = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")


@LIMITED
@pytest.mark.parametrize(
    "body",
    [
        "kept = bytearray(1 << 30)",
        "kept = []\n    while True: kept.append(bytes(1 << 20))",
        "while True: completions.append(os.kept.append(bytes(1 << 20)))",  # never given back
        "text = 'a'\n    while True: text += text",
        pytest.param("import numpy; numpy.ones(1 << 28)", marks=SLOW),
        pytest.param("import torch; torch.ones(1 << 28)", marks=SLOW),
    ],
)
def test_a_reward_that_takes_too_much_memory_ends_its_own_process(tmp_path, body):
    section = code(tmp_path, f"os.kept = getattr(os, 'kept', [])\n    {body}") | {"reward_timeout": 30.0}
    judge = judge_of(section | {"reward_memory_gib": 0.25 if "torch" not in body else 0.9})
    process = judge._child.process
    with pytest.raises(DataError, match=r"the reward mine needs more than 0\.\d+ GiB of memory \(line \d: ") as caught:
        judge.score(Group("rows.jsonl:7", "How many?", ["one"], [[1]], "1"))
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert "on the prompt 'How many?'; raise train.grpo.reward_memory_gib to resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert process.poll() is not None


@LIMITED
def test_a_process_that_a_reward_starts_has_the_same_limit(tmp_path):
    body = "import subprocess\n    return [subprocess.run([sys.executable, '-c', 'bytearray(1 << 30)']).returncode]"
    judge = judge_of(code(tmp_path, body) | {"reward_memory_gib": 0.5, "reward_timeout": 30.0})
    assert judge.score(Group("a:1", "q", ["one"], [[1]], "1")) == [[1.0]]
    judge.close()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="groups of processes")
def test_what_a_reward_has_started_ends_with_it(tmp_path):
    body = (
        "import subprocess\n    other = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(other.pid))\n    other.wait()"
    )
    judge = judge_of(code(tmp_path, body))
    with pytest.raises(DataError, match="took longer than 1 s"):
        judge.score(Group("a:1", "q", ["one"], [[1]], "1"))
    with contextlib.suppress(psutil.NoSuchProcess):
        other = psutil.Process(int((tmp_path / "pid").read_text()))
        for _ in range(100):
            if other.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.05)
        other.kill()
        pytest.fail("it goes on")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies of a process")
def test_a_copy_that_a_reward_makes_of_its_process_answers_nothing(tmp_path):
    """`os.fork()` comes back twice, and the answers of the two were taken for those to two prompts."""
    body = (
        "copied = os.fork() == 0\n    time.sleep(0 if copied else 0.3)\n"
        "    return [9.0 if copied else float(len(each)) for each in completions]"
    )
    judge = judge_of(code(tmp_path, body) | {"reward_timeout": 30.0})
    for text in ("a", "bbb", "cc"):
        assert judge.score(Group("a:1", "q", [text], [[1]], "1")) == [[len(text)]]
    judge.close()


@LIMITED
def test_a_file_that_takes_too_much_memory_when_it_is_read_is_refused(tmp_path):
    section = code(tmp_path, "return []\n\nkept = bytearray(1 << 30)")
    with pytest.raises(ConfigError, match=r"mine: line 6: MemoryError.*0\.25 GiB, raise train.grpo.reward_memory_gib"):
        judge_of(section | {"reward_memory_gib": 0.25})


@SLOW
def test_torch_and_a_tokenizer_work_in_a_reward_under_the_default_limit(places, tmp_path):
    body = f"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained({str(places / "model")!r})
    model = AutoModelForCausalLM.from_pretrained({str(places / "model")!r})
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in completions])
    large = torch.ones(2000, 2000).matmul(torch.ones(2000, 1)).max()
    return model(input_ids=ids, labels=ids).loss.detach().expand(len(ids)) + large"""
    judge = judge_of(code(tmp_path, body) | {"reward_timeout": 60.0})
    found = judge.score(Group("a:1", "q", ["one", "two"], [[1]] * 2, "1"))
    judge.close()
    assert found[0] == found[1]
    assert 2000 < found[0][0] < 2010


@SLOW
@LIMITED
def test_a_run_with_a_hungry_reward_exits_with_3_and_goes_on_with_more_memory(places, tmp_path):
    section = code(tmp_path, "kept = bytearray(1 << 28)\n    return [float(len(text)) for text in completions]")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(grpo(places, tmp_path / "out", section=section)))
    done = served.dude("train", path, "--set", "train.grpo.reward_memory_gib=0.25")
    assert done.returncode == 3
    assert "needs more than 0.25 GiB of memory" in done.stderr
    assert ".jsonl:" in done.stderr
    assert "Traceback" not in done.stderr
    done = served.dude("train", path)
    assert done.returncode == 0, done.stderr


@SLOW
def test_a_run_with_a_reward_that_hangs_exits_with_3_and_goes_on_with_more_time(places, tmp_path):
    section = code(
        tmp_path,
        f"""
    if len(completions) > 1 and not os.path.exists({str(tmp_path / "quick")!r}):
        time.sleep(60)
    return [float(len(text)) for text in completions]""",
    )
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(grpo(places, tmp_path / "out", section=section)))
    done = served.dude("train", path)
    assert done.returncode == 3
    assert "took longer than 1 s" in done.stderr
    assert "train.jsonl:" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "quick").touch()
    done = served.dude("train", path, "--set", "train.grpo.reward_timeout=60")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("reward", "body", "words"),
    [
        ({"file": "nowhere.py"}, "", "nowhere.py cannot be read"),
        ({"file": "https://example.com/rewards.py"}, "", "no file on this machine"),
        ({"function": "other"}, "return []", "has no function 'other'; it has mine"),
        ({}, "return [", "is no Python at line 4"),
        ({"sha256": "0" * 64}, "return []", "not the file that was meant"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_work_begins(places, tmp_path, reward, body, words):
    section = code(tmp_path, body)
    section["rewards"][0] |= reward
    with pytest.raises(ConfigError, match=words) as caught:
        start(grpo(places, tmp_path / "out", section=section))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_raises_when_it_is_read_is_refused(places, tmp_path):
    section = code(tmp_path, "return []\n\nimport nothing_of_this_name")
    with pytest.raises(ConfigError, match=r"rewards: mine: line 6: ModuleNotFoundError: .*nothing_of_this_name"):
        start(grpo(places, tmp_path / "out", section=section))


def test_built_in_rewards_are_what_they_say():
    settings = GrpoSection(
        max_completion_length=10,
        rewards=[
            {"kind": "answer"},
            {"kind": "format", "pattern": r".*#### -?\d+"},
            {"kind": "length", "soft_punish_cache": 4},
        ],
    )
    judge = Judge(settings)
    texts = ["3 + 4 = 7\n#### 7", "It is 7.", " #### 8 ", "nothing"]
    found = judge.score(Group("a:1", "q", texts, [[1] * n for n in (6, 7, 10, 12)], "so\n#### 7"))
    judge.close()
    assert found == [[1.0, 1.0, 0.0], [1.0, 0.0, -0.25], [0.0, 1.0, -1.0], [0.0, 0.0, -1.0]]


def test_math_verify_reads_what_is_equal_where_it_is_installed():
    pytest.importorskip("math_verify", reason="pip install math-verify")
    judge = Judge(GrpoSection(rewards=[{"kind": "math"}]))
    found = judge.score(Group("a:1", "q", [r"$\frac{1}{2}$", "$0.5$", "1/3", "#### 1/2"], [[1]] * 4, "1/2"))
    judge.close()
    assert [row[0] for row in found] == [1.0, 1.0, 0.0, 1.0]


def test_a_pattern_that_takes_for_ever_is_stopped():
    settings = GrpoSection(rewards=[{"kind": "format", "pattern": "(a+)+b"}], reward_timeout=0.5)
    judge = Judge(settings)
    with pytest.raises(DataError, match=r"a\.jsonl:1: the reward format took longer than 0\.5 s"):
        judge.score(Group("a.jsonl:1", "q", ["a" * 60], [[1]], "x"))


# --- refused, told ------------------------------------------------------------------------------------------------

OWN = {"kind": "function", "file": "rewards.py", "function": "mine"}


@pytest.mark.parametrize(
    ("section", "sections", "words"),
    [
        ({"rewards": [OWN]}, {}, r"trust_reward_files.*rewards.py:mine would run with your permissions"),
        ({"rewards": []}, {}, "train.grpo.rewards"),
        ({"rewards": [{"kind": "format"}]}, {}, "format needs 'pattern'"),
        ({"rewards": [{"kind": "format", "pattern": "("}]}, {}, "no regular expression"),
        ({"rewards": [{"kind": "answer", "pattern": "a"}]}, {}, "'pattern' has no effect on answer"),
        ({"rewards": [{"kind": "answer", "weight": 0}]}, {}, "weight 0"),
        ({"rewards": [{"kind": "answer"}, {"kind": "answer"}]}, {}, "two are called answer"),
        ({"rewards": [{"kind": "accuracy"}]}, {}, "train.grpo.rewards"),
        ({"beta": -0.1}, {}, "train.grpo.beta"),
        ({"num_generations": 1}, {}, "train.grpo.num_generations"),
        (
            {"num_generations": 3},
            {},
            "has 8 answers.*num_generations is 3.*whole groups; set it to [69]$",
        ),
        ({"temperature": 0}, {}, "train.grpo.temperature"),
        ({"top_p": 1.5}, {}, "train.grpo.top_p"),
        ({"loss_type": "cispo"}, {}, "train.grpo.loss_type"),
        ({"scale_rewards": True}, {}, "train.grpo.scale_rewards"),
        ({"use_vllm": True}, {}, "train.grpo.use_vllm"),
        ({}, {"train": {"objective": "sft"}}, "train.grpo.*no effect on train.objective: sft"),
        ({}, {"data": {"packing": True}}, "data.packing.*grpo: answers are padded"),
        ({}, {"data": {"train_on": "all"}}, "data.train_on.*own answers"),
        ({}, {"data": {"upft": 4}}, "data.upft"),
        ({}, {"train": {"trainer": "trl"}}, "train.trainer.*asks nothing"),
        ({}, {"train": {"torch_compile": True}}, "torch_compile"),
        ({}, {"train": {"train_sampling_strategy": "group_by_length"}}, "train_sampling_strategy"),
        ({"beta": 0.1}, {"adapter": {"bias": "all"}}, "adapter.bias.*no base model"),
        ({}, {"adapter": {"budget": {"parameters": "1%", "by": "fisher"}}}, "adapter.budget.by.*rows' answers"),
        ({}, {"evaluation": {"metric_for_best_model": "rewards/margins"}}, "measured on pairs"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_what_grpo_cannot_do_is_refused_in_one_line(places, tmp_path, section, sections, words):
    refuses_to_read(tmp_path, grpo(places, tmp_path / "out", section=section, **sections), words)


def test_rows_without_answers_pairs_text_and_long_answers_are_refused(places, tmp_path):
    for content, words in (
        ('{"prompt": "q"}', r"rows.jsonl:1: 'prompt' without 'completion'"),
        ('{"text": "plain"}', r"rows.jsonl:1: plain text asks nothing; train.objective: grpo"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b"}', r"preference data.*train.objective: dpo"),
    ):
        (tmp_path / "rows.jsonl").write_text(content + "\n")
        with pytest.raises(DataError, match=words):
            start(grpo(places, tmp_path / "out", data={"train": str(tmp_path / "rows.jsonl")}))
    with pytest.raises(ConfigError, match=r"max_completion_length: 500 tokens after a prompt of .*512; lower it"):
        start(grpo(places, tmp_path / "out", section={"max_completion_length": 500}))
    with pytest.raises(ValueError, match=r"reward is measured by train.objective: grpo"):
        RunConfig(**settings(places, tmp_path / "out", evaluation={"metric_for_best_model": "reward"}))


def test_a_reference_that_is_not_the_base_is_refused(places, tmp_path):
    start(grpo(places, tmp_path / "first", train={"max_steps": 2, "learning_rate": 0.05}))
    adapter = {"start": str(tmp_path / "first/adapter")}
    wanted = grpo(places, tmp_path / "out", section={"beta": 0.1})
    wanted["adapter"] = adapter
    with pytest.raises(ConfigError, match=r"objective: grpo: adapter.start is in the folded form, or trained.*merge"):
        start(wanted)
    start(wanted | {"train": wanted["train"] | {"grpo": wanted["train"]["grpo"] | {"beta": 0.0}, "max_steps": 2}})


def test_nothing_to_learn_and_answers_without_end_are_told_after_ten_steps(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dude_peft.training.drawn.only_ends", never_ends(tmp_path))
    section = {"rewards": [{"kind": "format", "pattern": "never this"}]}
    report = start(grpo(places, tmp_path / "out", section=section, train={"max_steps": 11}))
    told = [text for text in report.warnings if "in 10 steps" in text]
    assert len(told) == 2
    assert "no reward differed within any group" in told[0]
    assert "no answer ended within train.grpo.max_completion_length 6" in told[1]
    logged = [line for line in lines(tmp_path / "out") if "frac_reward_zero_std" in line]
    assert all(line["frac_reward_zero_std"] == line["completions/clipped_ratio"] == 1 for line in logged)
    assert all(line["loss"] == line["grad_norm"] == 0 for line in logged)


def never_ends(tmp_path):
    import contextlib

    from dude_peft.measure.score import only_ends

    @contextlib.contextmanager
    def without(model, tokenizer):
        with only_ends(model, tokenizer):
            model.get_base_model().generation_config.eos_token_id = None
            yield set()

    return without


# --- plan, page, built-in rows ------------------------------------------------------------------------------------


def test_a_run_on_builtin_problems_shows_its_rewards_and_its_page_does(places, tmp_path):
    path = tmp_path / "run.yaml"
    data = {"train": "builtin:word-problems", "test": 0.2, "train_rows": 20}
    section = {"rewards": [{"kind": "answer"}, LETTERS], "beta": 0.05}
    train = {"max_steps": None, "num_train_epochs": 1, "logging_steps": 1}
    path.write_text(json.dumps(grpo(places, tmp_path / "out", data=data, section=section, train=train)))
    made = plan(path)
    assert (made.rows.rows, made.steps) == (16, 8)
    assert any("answers that the model gives" in text for text in made.warnings)
    done = served.dude("train", path)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert all(words in said for words in ("reward 0.", "entropy 5.", "clipped 0.", "mean reward", "letters")), said
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["steps"], report["after"]["rows"]) == (8, 2)
    assert report["after"]["rewards"].keys() == {"reward", "rewards/answer/mean", "rewards/letters/mean"}
    done = served.dude("report", tmp_path / "out", "-o", tmp_path / "out.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.md").read_text()
    wanted = ("mean reward of the likeliest answers", "Rewards during training", "KL to the base", "rollouts.jsonl has")
    assert all(words in page for words in wanted), page[:3000]


def test_data_check_shows_what_is_asked(places, tmp_path):
    report = check_data(places / "train.jsonl", str(places / "model"), objective="grpo")
    assert (report.rows, report.questions) == (10, 10)


def test_the_best_adapter_is_that_of_the_reward(places, tmp_path):
    evaluation = {"eval_steps": 2, "early_stopping_patience": 2}
    report = start(grpo(places, tmp_path / "out", train={"max_steps": 20}, evaluation=evaluation))
    measured = {line["step"]: line["eval_reward"] for line in lines(tmp_path / "out") if "eval_loss" in line}
    assert measured[report.best_step] == max(measured.values()) == report.after.rewards["reward"]
    assert report.steps == report.best_step + 4


def test_of_a_step_without_judged_tokens_the_loss_is_zero():
    settings = GrpoSection(rewards=[{"kind": "answer"}], mask_truncated_completions=True)
    loss, inputs = RewardedLoss(settings), {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    inputs |= {"labels": torch.full((2, 3), -100), "advantages": torch.tensor([1.0, -1.0])}
    loss.look(None, inputs)
    assert inputs["logits_to_keep"] == 3
    logits = torch.randn(2, 3, 7, requires_grad=True)
    found = loss({"logits": logits}, inputs["labels"], torch.tensor(2))
    found.backward()
    assert float(found.detach()) == 0
    assert not logits.grad.any()
