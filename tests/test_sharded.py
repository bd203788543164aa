"""FSDP2 in two CPU processes (gloo), sharded per decoder layer: the same training as in one process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

STEPS = 3


def adapted(method, dtype):
    from models import make, perturb
    from peft import get_peft_model

    from dude_peft import DudeConfig

    model = get_peft_model(
        make("mistral-gqa", dtype), DudeConfig(method=method, r=4, lora_alpha=6, target_modules="all-linear")
    )
    perturb(model)
    return model.train()


def train(model, batches):
    """Losses of some steps; each step averages over its batches, as the two processes do."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    losses = []
    for step in batches:
        total = 0.0
        for ids in step:
            loss = model(input_ids=ids, labels=ids).loss / len(step)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def batch(step, process):
    from models import tokens

    return tokens(seed=10 * step + process)


def worker(process, address, method, out):
    """One of the two processes."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from dude_peft.tuner.layer import DudeLinear

    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=process, world_size=2)
    torch.manual_seed(0)
    model = adapted(method, torch.float32)
    norms = 0
    original = DudeLinear.change

    def counted(self, *args):
        nonlocal norms
        norms += 1
        return original(self, *args)

    DudeLinear.change = counted
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    losses = train(model, [[batch(step, process)] for step in range(STEPS)])
    mean = torch.tensor(losses)
    dist.all_reduce(mean, op=dist.ReduceOp.SUM)
    state = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    layers = sum(isinstance(module, DudeLinear) for module in model.modules())
    if process == 0:
        torch.save({"losses": (mean / 2).tolist(), "state": state, "norms": norms, "layers": layers}, out)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dude", "lora", "frozen-m", "edora", "osora", "salt", "full"])
def test_two_sharded_processes_train_as_one(method, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out = tmp_path / "sharded.pt"
    program = "import sys, test_sharded as t; t.worker(int(sys.argv[1]), *sys.argv[2:])"
    arguments = [address, method, str(out)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number), *arguments],
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    sharded = torch.load(out)

    torch.manual_seed(0)
    model = adapted(method, torch.float32)
    losses = train(model, [[batch(step, 0), batch(step, 1)] for step in range(STEPS)])
    assert sharded["losses"] == pytest.approx(losses, rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            difference = (sharded["state"][name] - parameter).norm() / parameter.norm()
            assert difference <= 1e-4, name
    if method in ("dude", "frozen-m", "edora"):
        assert sharded["norms"] == STEPS * sharded["layers"]
