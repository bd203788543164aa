"""One base model in the memory of several processes: values, what is tied, and that nobody's writes reach another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served import dude
from test_launch import environment, losses, places, program, tensors, wait_for, write_config  # noqa: F401
from tiny import save_tiny, tiny_llama

from dude_peft.machine.shared_pages import NotSharedError, Shared, own_copies_, take_up_

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd_create")
KINDS = {"plain": {}, "tied": {"tie_word_embeddings": True}, "bfloat16": {"dtype": torch.bfloat16}}


def made(kind: str = "plain", seed: int = 0) -> torch.nn.Module:
    model = tiny_llama(seed=seed, **KINDS[kind])
    # Remote code has such: what is not saved, booleans, no dimension, no numbers, another order in memory.
    model.model.register_buffer("seen", torch.tensor([True, False, True]), persistent=False)
    model.model.register_buffer("one", torch.tensor(0.5 + seed))
    model.model.register_buffer("none", torch.empty(0, 3))
    model.model.register_buffer("turned", (torch.arange(6.0) + seed).reshape(2, 3).t())
    model.model.table = torch.arange(3.0) + seed
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(kind == "plain")
    return model


def empty(kind: str = "plain") -> torch.nn.Module:
    """The same modules without values."""
    with torch.device("meta"):
        return made(kind).to("meta")


def of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {**found, "table": model.model.table}


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_has_the_same_model(kind):
    wanted, first, other = made(kind), made(kind), empty(kind)
    shared = Shared(first)
    take_up_(other, shared.offer)
    shared.close()
    for model in (first, other):
        assert of(model).keys() == of(wanted).keys()
        for name, tensor in of(wanted).items():
            found = of(model)[name]
            assert torch.equal(found, tensor), name
            assert type(found) is type(tensor), name
            assert (found.dtype, found.stride()) == (tensor.dtype, tensor.stride()), name
            assert found.requires_grad == tensor.requires_grad, name
            assert found.data_ptr() % 64 == 0, name
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")
        storages = {tensor.untyped_storage().data_ptr() for tensor in of(model).values() if tensor.numel()}
        assert len(storages) == len({id(tensor) for tensor in of(model).values() if tensor.numel()})
        ids = torch.arange(12).reshape(2, 6)
        assert torch.equal(model(ids).logits, wanted(ids).logits)


def test_what_one_writes_the_others_do_not_see():
    first, other, third = made(), empty(), empty()
    shared = Shared(first)
    take_up_(other, shared.offer)
    with torch.no_grad():
        of(first)["lm_head.weight"].fill_(1.0)
        of(other)["lm_head.weight"].fill_(2.0)
    take_up_(third, shared.offer)
    shared.close()
    assert torch.equal(of(third)["lm_head.weight"], of(made())["lm_head.weight"])
    assert of(first)["lm_head.weight"].eq(1.0).all()
    assert of(other)["lm_head.weight"].eq(2.0).all()


def test_what_cannot_be_mapped_is_told():
    first, shared = made(), None
    shared = Shared(first)
    offer = shared.offer
    with pytest.raises(NotSharedError, match="is something else in this process"):
        take_up_(empty(), replace(offer, token=bytes(32)))
    with pytest.raises(NotSharedError, match="is something else in this process"):
        take_up_(empty(), replace(offer, path="/dev/null"))
    with torch.device("meta"):
        larger = tiny_llama(num_hidden_layers=3).to("meta")
    with pytest.raises(NotSharedError, match="has other tensors, among them "):
        take_up_(larger, offer)
    shared.close()
    with pytest.raises(NotSharedError, match="cannot be opened: No such file"):
        take_up_(empty(), offer)
    assert torch.equal(of(first)["lm_head.weight"], of(made())["lm_head.weight"])


def test_where_it_cannot_be_made_the_model_is_as_it_was(monkeypatch):
    def refused(*_: object) -> int:
        raise OSError(24, "Too many open files")

    model = made()
    monkeypatch.setattr(os, "memfd_create", refused)
    with pytest.raises(NotSharedError, match=r"memfd_create does not work here: .*Too many open files"):
        Shared(model)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NotSharedError, match="darwin has no memfd_create"):
        Shared(model)
    own_copies_(model)
    for name, tensor in of(made()).items():
        assert torch.equal(of(model)[name], tensor), name
        assert of(model)[name].requires_grad == tensor.requires_grad, name


def test_memory_that_is_refused_on_the_way_leaves_a_whole_model(monkeypatch):
    model, write, calls = made(), os.pwrite, []

    def full(file: int, content: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return write(file, content[:1000], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NotSharedError, match="memory for it was refused: No space left"):
        Shared(model)
    for name, tensor in of(made()).items():
        assert torch.equal(of(model)[name], tensor), name


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_hold_one_model():
    wait_for([program("import test_shared_pages; test_shared_pages.memory()", rank, 2) for rank in range(2)])


def memory() -> None:
    """One process of the test above; the weights are 254 MB."""
    import torch.distributed as dist

    from dude_peft.machine.processes import gathered, is_first

    def proportional() -> int:
        return 1024 * int(re.search(r"^Pss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1])

    dist.init_process_group("gloo")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 20}
    with torch.device("meta"):
        model = tiny_llama(**sizes).to("meta")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 2e8
    before = sum(gathered(proportional()))
    shared = None
    if is_first():
        model = tiny_llama(**sizes)
        shared = Shared(model)
    offer = gathered(None if shared is None else shared.offer)[0]
    if shared is None:
        take_up_(model, offer)
    gathered(None)
    if shared is not None:
        shared.close()
    assert all(parameter.isfinite().all() for parameter in model.parameters())  # read by both
    gathered(None)
    grown = sum(gathered(proportional())) - before
    gathered(None)
    assert 0.9 < grown / weights < 1.2, grown / weights
    dist.destroy_process_group()


def without_memfd(folder: Path) -> str:
    """A PYTHONPATH on which Python has no memfd_create."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import os\ndel os.memfd_create\n")
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_one_model_is_the_run_with_a_model_in_each_process(places, tmp_path, kind):  # noqa: F811
    save_tiny(tmp_path / "model", **KINDS[kind])
    launched = ["--launch", "ddp", "--processes", "2", "--set", f"model.name_or_path={tmp_path / 'model'}"]
    one, each = write_config(places, tmp_path / "one"), write_config(places, tmp_path / "each")
    done = dude("train", one, *launched)
    assert done.returncode == 0, done.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "dude_peft.cli", "train", str(each), *launched],
        env={**environment(), "PYTHONPATH": without_memfd(tmp_path / "path")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    told = "warning: each process has a base model of its own (memfd_create does not work here"
    assert (done.stdout.count(told), alone.stdout.count(told)) == (0, 1)
    assert losses(tmp_path / "one") == losses(tmp_path / "each")
    assert all(torch.equal(tensors(tmp_path / "each")[name], each) for name, each in tensors(tmp_path / "one").items())


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(places, tmp_path):  # noqa: F811
    launched = ["--launch", "ddp", "--processes", "2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert dude("train", write_config(places, whole, save_steps=1), *launched).returncode == 0
    config = write_config(places, out, save_steps=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "dude_peft.cli", "train", str(config), *launched],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None and not list(out.glob("checkpoints/step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.glob("checkpoints/step-*"))
    done = dude("train", config, *launched)
    assert done.returncode == 0, done.stderr
    assert "resuming from the checkpoint" in done.stdout
    assert losses(out) == losses(whole)
    assert all(torch.equal(tensors(out)[name], tensor) for name, tensor in tensors(whole).items())
