"""`dude plan --launch`: what one of several processes needs, against torch's own tracker, and what they send."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served import dude
from test_launch import FSDP2, write_config
from test_plan import cost_of, llama, run_of
from tiny import save_tiny, write_rows

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError, ResourceError
from dude_peft.model.load import load_settings
from dude_peft.planning.bill import cost
from dude_peft.planning.live_bytes import LiveBytes
from dude_peft.planning.run import plan
from dude_peft.planning.spread import ALONE, Spread
from dude_peft.training.strategy import shares_base

HERE = Path(__file__).parent


def spread_cost(config: RunConfig, spread: Spread, length: int = 48):
    where = config.model.name_or_path
    return cost(config, load_settings(config.model, where), where, length, gpu=False, spread=spread)


@pytest.fixture
def folder(tmp_path):
    llama().config.save_pretrained(tmp_path)
    return tmp_path


def test_one_process_is_the_plan_without_processes(folder):
    config = run_of(folder)
    found = [spread_cost(config, Spread("fsdp2", 1)), spread_cost(config, ALONE), cost_of(config, 48)]
    assert found[0].bill == found[1].bill == found[2].bill
    assert all(each.exchange.sent == each.bill.exchanged == 0 for each in found)


def test_ddp_keeps_the_gradients_twice_and_sends_them_in_a_ring(folder):
    config = run_of(folder, gradient_accumulation_steps=3)
    one, four = spread_cost(config, ALONE).bill, spread_cost(config, Spread("ddp", 4))
    assert four.bill.total - one.total == four.bill.exchanged == one.trained
    assert four.exchange.sent == 2 * 3 * one.trained // 4


def test_ddp_does_so(tmp_path):
    place = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=place)
    try:
        layer = torch.nn.Linear(40, 30, bias=False)
        with LiveBytes([]) as live:
            wrapped = torch.nn.parallel.DistributedDataParallel(layer)
            wrapped(torch.ones(1, 40)).sum().backward()
            assert live.now == pytest.approx(2 * layer.weight.nbytes, abs=400)
    finally:
        torch.distributed.destroy_process_group()


def test_fsdp2_keeps_shares_and_gathers_blocks_twice(folder):
    config = run_of(folder, gradient_accumulation_steps=3)
    one, found = spread_cost(config, ALONE).bill, spread_cost(config, Spread("fsdp2", 4))
    assert found.bill.trained == pytest.approx(one.trained / 4, rel=0.01)
    assert found.bill.weights == pytest.approx(one.weights / 4, rel=0.01)
    assert found.bill.adapter_frozen == one.adapter_frozen, "buffers are whole"
    assert found.bill.optimizer == pytest.approx(one.optimizer / 4, rel=0.01)
    outside = 2 * 1024 * 128 * 4 + 128 * 4  # embeddings, head and the last norm
    assert found.exchange.outside == outside
    total = one.weights + one.trained - 2 * 16 * 4  # the rotary embedding's frequencies are buffers
    assert found.exchange.sent == 3 * (3 * (2 * total - outside) + one.trained) // 4


def test_accumulated_gradients_are_whole_until_they_are_sent(folder):
    found = spread_cost(run_of(folder, gradient_accumulation_steps=2), Spread("fsdp2", 4)).bill
    assert found.gradients == pytest.approx(4 * found.trained, rel=0.01)


CASES = {
    "two": (5, 2, {}, {}, 48),
    "four": (5, 4, {}, {}, 48),
    "deeper": (9, 4, {}, {}, 48),
    "checkpointing": (9, 4, {}, {"gradient_checkpointing": True}, 48),
    "few tokens": (5, 4, {}, {"per_device_train_batch_size": 1}, 16),
    "large rank": (5, 4, {"r": 64}, {"per_device_train_batch_size": 1}, 16),
    "full": (5, 4, {"method": "full"}, {"per_device_train_batch_size": 1}, 16),
}


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_share_is_that_of_torch_s_tracker(case, tmp_path):
    """torch takes the step of one process of many, without the others, and follows every storage."""
    layers, processes, adapter, train, length = CASES[case]
    llama(layers=layers).config.save_pretrained(tmp_path)
    config = run_of(tmp_path, adapter, **{"per_device_train_batch_size": 2, **train})
    bill = spread_cost(config, Spread("fsdp2", processes), length).bill
    asked = {
        "processes": processes,
        "folder": str(tmp_path),
        "checkpointing": config.train.gradient_checkpointing,
        "adapter": config.adapter.settings(),
        "rows": config.train.per_device_train_batch_size,
        "length": length,
    }
    program = [sys.executable, str(HERE / "sharded_memory.py"), json.dumps(asked)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert bill.weights + bill.trained == pytest.approx(found["SHARDED_PARAM"], rel=1e-3)
    assert bill.adapter_frozen == pytest.approx(found["BUFFER"], rel=1e-2, abs=256)
    assert bill.optimizer == pytest.approx(found["OPT"], rel=1e-2)
    assert bill.total - bill.runtime == pytest.approx(found["Total"], rel=0.1)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("plan")
    save_tiny(place / "float32")
    write_rows(place / "train.jsonl", 40)
    write_rows(place / "test.jsonl", 8, start=100)
    return place


def test_what_is_told_of_processes(places, tmp_path, capsys):
    config = RunConfig(**json.loads(write_config(places, tmp_path / "out").read_text()))
    made = plan(config, strategy="fsdp2", processes=3)
    found, told = made.as_dict(), capsys.readouterr().out
    assert found["processes"]["strategy"] == "fsdp2"
    assert found["processes"]["number"] == 3
    assert found["processes"]["memory"] == 3 * found["memory"]["total"] == made.memory
    assert found["processes"]["host_memory"] is None
    assert "peak memory of a step in each process" in told
    assert "of all 3 processes" in told
    assert "processes: 3, fsdp2; each sends " in told


def test_ddp_on_cpus_has_the_base_model_once(places, tmp_path, capsys):
    config = RunConfig(**json.loads(write_config(places, tmp_path / "out").read_text()))
    made = plan(config, strategy="ddp", processes=3)
    told, bill, weights = capsys.readouterr().out, made.cost.bill, made.cost.static.weights
    assert bill.weights == -(-weights // 3)
    assert made.memory == 3 * bill.total
    assert made.as_dict()["processes"]["share_base"] is True
    assert "the base model is in memory once, a part in each bill" in " ".join(told.split())
    alone = plan(config, device_memory="900MiB", strategy="ddp", processes=3, quiet=True)
    assert alone.cost.bill.weights == weights
    assert alone.as_dict()["processes"]["share_base"] is False


@pytest.mark.parametrize(
    ("changes", "quantised"),
    [
        ({}, True),
        ({"model": {"trust_remote_code": True}}, False),
        ({"train": {"objective": "reward"}}, False),
    ],
)
def test_what_each_process_loads_itself(places, tmp_path, changes, quantised):
    settings = json.loads(write_config(places, tmp_path / "out").read_text())
    settings["evaluation"] = {}  # a reward model answers nothing
    whole = RunConfig(**settings).resolved()
    assert shares_base(whole, "ddp", 2, gpu=False, quantised=False)
    assert not shares_base(whole, "ddp", 2, gpu=True, quantised=False)
    assert not shares_base(whole, "ddp", 1, gpu=False, quantised=False)
    assert not shares_base(whole, "fsdp2", 2, gpu=False, quantised=False)
    for key, value in changes.items():
        settings[key] |= value
    assert not shares_base(RunConfig(**settings), "ddp", 2, gpu=False, quantised=quantised)


@pytest.mark.slow
def test_the_command(places, tmp_path):
    config = write_config(places, tmp_path / "out")
    done = dude("plan", config, "--launch", "fsdp2", "--processes", "3", "--json")
    assert json.loads(done.stdout)["processes"]["number"] == 3
    told = dude("plan", config, "--launch", "ddp", "--processes", "3", "--device-memory", "2GiB").stdout
    assert "in each process" in told
    assert "host memory at the start" in told
    assert told.strip().endswith("--launch ddp --processes 3")


@pytest.mark.parametrize(
    ("sets", "arguments", "words"),
    [
        ([], ["--processes", "2"], "--processes goes with --launch"),
        ([], ["--launch", "ddpp", "--processes", "2"], "choose ddp, fsdp2, zero3"),
        (["--set", "train.torch_compile=true"], ["--launch", "ddp", "--processes", "2"], "works in one process"),
        (["--set", "model.quantization=nf4"], ["--launch", "zero3", "--processes", "2"], "cannot be split"),
        (["--set", "train.movement_steps=2"], ["--launch", "fsdp2", "--processes", "2"], "movement_steps: it needs"),
        (["--set", "train.orthogonality=0.1"], ["--launch", "zero3", "--processes", "2"], "needs whole weights"),
    ],
)
def test_what_the_run_refuses_is_refused(places, tmp_path, sets, arguments, words):
    done = dude("plan", write_config(places, tmp_path / "out"), *sets, *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr


def test_memory_is_of_each_gpu_or_of_the_machine(places, tmp_path):
    config = RunConfig(**json.loads(write_config(places, tmp_path / "out").read_text()))
    one = plan(config, quiet=True)
    gpus = plan(config, device_memory="900MiB", strategy="ddp", processes=64, quiet=True)
    assert gpus.memory == gpus.cost.bill.total < 900 << 20
    assert gpus.host_memory == 64 * (gpus.cost.exchange.whole + gpus.cost.bill.runtime)
    split = plan(config, device_memory="900MiB", strategy="fsdp2", processes=64, quiet=True)
    assert split.host_memory == split.cost.exchange.whole + 64 * split.cost.bill.runtime
    whole = (one.disk.adapter, one.disk.checkpoint)
    assert (split.disk.adapter, split.disk.checkpoint) == whole, "the adapter and its checkpoint are whole"
    many = replace(gpus, device=one.device, spread=Spread("ddp", 100_000))
    assert many.memory == 100_000 * many.cost.bill.total
    with pytest.raises(ResourceError, match=r"of memory in 100000 processes, but this machine"):
        many.check()


def test_unknown_numbers_of_processes_are_refused(places, tmp_path):
    config = RunConfig(**json.loads(write_config(places, tmp_path / "out").read_text()))
    with pytest.raises(ConfigError, match="choose ddp, fsdp2, zero3"):
        plan(config, strategy="fsdp", processes=2, quiet=True)
    with pytest.raises(ConfigError, match="give at least 1"):
        plan(config, processes=0, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_steps_are_those_of_the_run(places, tmp_path, processes):
    config = write_config(places, tmp_path / "out", max_steps=None, num_train_epochs=1)
    launched = ["--launch", "ddp", "--processes", str(processes)]
    wanted = json.loads(dude("plan", config, *launched, "--json").stdout)["steps"]
    done = dude("train", config, *launched)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/report.json").read_text())["steps"] == wanted
