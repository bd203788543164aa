"""`train.objective: grpo` in two processes: as one process on the same answers, cut and resumed, refused."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import served
import torch
from safetensors.torch import load_file
from test_preference import WEIGHTS, lines
from test_rewarded import LETTERS, SHORT, code, grpo, rollouts, whole_result, write
from tiny import save_tiny

from dude_peft import plan
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.training.strategy import check_strategy

RUN = """
import hashlib, json, os, sys
from collections import Counter

import torch

from dude_peft.config.schema import RunConfig
from dude_peft.training import rollouts, trainer
from dude_peft.training.drawn import Drawn
from dude_peft.training.run import run

_, config, answers, cut = sys.argv


def by_hash(model, tokenizer, prompts, *_, **__):
    seen, found = Counter(), []
    for prompt in prompts:
        digest = hashlib.sha256(repr((prompt, seen[tuple(prompt)])).encode()).digest()
        seen[tuple(prompt)] += 1
        ids = [digest[n] for n in range(2 + digest[0] % 5)]
        found.append(Drawn(ids, tokenizer.decode(ids), digest[1] % 2 == 0))
    return found


def save(self, *args):
    kept(self, *args)
    if self.state.global_step == int(cut):
        try:
            if self.args.process_index:  # until the first one, which has written the checkpoint, is gone
                torch.distributed.barrier()
        finally:
            os._exit(7)


if answers == "hash":
    rollouts.draw = by_hash
kept = trainer.RunTrainer._save_checkpoint
trainer.RunTrainer._save_checkpoint = save
run(RunConfig(**json.load(open(config))), quiet=True)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    save_tiny(folder / "model")
    generation = {"eos_token_id": [256, *range(150, 180)], "pad_token_id": 257}
    (folder / "model/generation_config.json").write_text(json.dumps(generation))
    write(folder / "train.jsonl", 10)
    write(folder / "test.jsonl", 2, start=100)
    (folder / "run.py").write_text(RUN)
    return folder


def trains(places: Path, wanted: dict, processes: int, *, answers: str = "drawn", cut: int = 0) -> None:
    for ended, said in ends(places, wanted, processes, answers=answers, cut=cut):
        assert ended == (7 if cut else 0), said


def ends(places: Path, wanted: dict, processes: int, *, answers: str = "drawn", cut: int = 0) -> list[tuple[int, str]]:
    """How each process ends by itself, for no launcher ends it: its exit code, and what it said."""
    config = Path(f"{wanted['output_dir']}.json")
    config.write_text(json.dumps(wanted))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(places / "run.py"), str(config), answers, str(cut)]
    running = [
        subprocess.Popen(
            command, env=os.environ | more | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(processes)
    ]
    said = [each.communicate(timeout=300)[1].decode() for each in running]
    return [(each.returncode, text) for each, text in zip(running, said, strict=True)]


SECTION = {"beta": 0.2, "num_generations": 4, "rewards": [LETTERS, SHORT]}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo as on POSIX")
@pytest.mark.parametrize("loss", [{"scale_rewards": "batch"}, {"loss_type": "grpo", "num_iterations": 2}])
def test_two_processes_learn_as_one_from_the_same_answers(places, tmp_path, loss):
    for name, processes, size in (("one", 1, 4), ("two", 2, 2)):
        train = {
            "max_steps": 4, "learning_rate": 0.05, "optim": "sgd", "logging_steps": 1, "lr_scheduler_type": "constant",
            "per_device_train_batch_size": size, "gradient_accumulation_steps": 2,
        }  # fmt: skip
        wanted = grpo(places, tmp_path / name, section={**SECTION, **loss}, train=train)
        trains(places, wanted, processes, answers="hash")
    times = ("tokens_per_second", "seconds", "memory_bytes")
    one, two = (
        [{key: value for key, value in line.items() if key not in times} for line in lines(tmp_path / name)]
        for name in ("one", "two")
    )
    for whole, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(whole, abs=2e-5)
    assert max(abs(line.get("loss", 0)) for line in one) > 1e-4
    told = [rollouts(tmp_path / name) for name in ("one", "two")]
    assert len(told[0]) == (32 if "num_iterations" not in loss else 16)
    for whole, shared in zip(*told, strict=True):
        assert shared["advantage"] == pytest.approx(whole["advantage"])
        assert {**shared, "advantage": 0} == {**whole, "advantage": 0}
    saved = [load_file(tmp_path / name / WEIGHTS) for name in ("one", "two")]
    assert all(torch.allclose(saved[0][name], saved[1][name], atol=1e-5) for name in saved[0])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo as on POSIX")
def test_two_processes_that_were_cut_between_iterations_go_on_bit_by_bit(places, tmp_path):
    train = {"max_steps": 6, "learning_rate": 0.05, "per_device_train_batch_size": 4}
    section = {**SECTION, "num_iterations": 2}
    trains(places, grpo(places, tmp_path / "whole", section=section, train=train), 2)
    wanted = grpo(places, tmp_path / "out", section=section, train=train)
    trains(places, wanted, 2, cut=3)
    trains(places, wanted, 2)
    assert whole_result(tmp_path / "out") == whole_result(tmp_path / "whole")
    answers = [line["completion"] for line in rollouts(tmp_path / "out")]
    assert answers[:4] != answers[4:8]  # each process draws its own


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo as on POSIX")
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('solution')", "the reward mine failed: line 6: KeyError: 'solution', on the prompt "),
        ("return [float('nan')] * len(completions)", "the reward mine gave nan for the answer "),
        ("time.sleep(60)", "the reward mine took longer than 1 s, on the prompt "),
    ],
)
def test_a_reward_that_fails_in_one_process_ends_both_by_the_same_error(places, tmp_path, body, words):
    for ended, said in ends(places, grpo(places, tmp_path / "out", section=only_in_the_second(tmp_path, body)), 2):
        assert ended == 1
        assert re.search(rf"errors.DataError: .*train.jsonl:\d+: {words}", said), said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo as on POSIX")
def test_a_reward_that_fails_in_the_second_process_is_told_once_with_3(places, tmp_path):
    section = only_in_the_second(tmp_path, "return [float('nan')] * len(completions)")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(grpo(places, tmp_path / "out", section=section)))
    done = served.dude("train", path, "--launch", "ddp", "--processes", "2")
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("dude: error[data]: ") == 1, done.stderr
    assert re.search(r"train.jsonl:\d+: the reward mine gave nan for the answer ", done.stderr)
    assert "Traceback" not in done.stderr


def only_in_the_second(folder: Path, body: str) -> dict:
    """Rewards that fail in the second of two processes, in training alone."""
    text = f"""
    if os.environ['RANK'] == '1' and len(completions) > 1:
        {body}
    return [float(len(text)) for text in completions]"""
    return code(folder, text)


def test_a_split_model_is_refused_and_the_plan_counts_the_prompts_of_all(places, tmp_path):
    train = {"max_steps": None, "num_train_epochs": 1}
    wanted = grpo(places, tmp_path / "out", train=train)
    for strategy in ("fsdp2", "zero3"):
        with pytest.raises(ConfigError, match=f"grpo: {strategy} splits the model, which has to answer whole; "):
            check_strategy(RunConfig(**wanted), strategy, 2, scored=False)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(wanted))
    assert (plan(path).steps, plan(path, processes=2).steps) == (5, 3)  # 10 prompts, 2 in a step of one process
