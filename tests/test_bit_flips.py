"""One bit of one file that a run wrote: whoever reads the file afterwards refuses it, or comes to the same result."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, write_rows

from dude_peft.answer.decode import decode
from dude_peft.answer.decoding import Decoding
from dude_peft.answer.speaker import open_speaker
from dude_peft.config.schema import RunConfig
from dude_peft.errors import DudeError
from dude_peft.exporting.upload import upload
from dude_peft.exporting.verify import verify
from dude_peft.terminal.display import Display
from dude_peft.training import trainer as trainer_module
from dude_peft.training.run import run

EVERYWHERE = 12
"""Bits of each file in the slow tests; the first and the last byte are among them."""


class _CutError(Exception):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("flips")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 12)
    write_rows(folder / "test.jsonl", 3, start=100)
    before = os.environ["DUDE_CACHE"]
    os.environ["DUDE_CACHE"] = str(folder / "cache")
    yield folder
    os.environ["DUDE_CACHE"] = before


def start(place: Path, out: Path, **options: object) -> Any:
    settings = {
        "model": {"name_or_path": str(place / "model")},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl"), "template": "plain"},
        "train": {"learning_rate": 0.03, "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 1},
        "evaluation": {"rows": 1, "max_new_tokens": 2, "eval_steps": 2},
        "output_dir": str(out),
    }
    return run(RunConfig(**settings), quiet=True, **options)


@pytest.fixture(scope="module")
def finished(place) -> Path:
    start(place, place / "finished")
    return place / "finished"


@pytest.fixture(scope="module")
def interrupted(place) -> Path:
    """Killed right behind the checkpoint of step 5: one best adapter, checkpoints 4 and 5."""
    original = trainer_module.RunTrainer._save_checkpoint

    def save(self, *args):
        original(self, *args)
        if self.state.global_step == 5:
            raise _CutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.RunTrainer, "_save_checkpoint", save)
        with pytest.raises(_CutError):
            start(place, place / "interrupted")
    assert list((place / "interrupted/checkpoints").glob("best-*"))
    return place / "interrupted"


def trained(out: Path) -> dict[str, Any]:
    """What a run came to; lines of metrics.jsonl aside, of which nothing is read."""
    report = json.loads((out / "report.json").read_text())
    scores = {name: report[name] for name in ("before", "after", "best_step", "steps", "tokens", "config")}
    scores["config"].pop("output_dir")
    return {
        "adapter": hashlib.sha256((out / "adapter/adapter_model.safetensors").read_bytes()).hexdigest(),
        **scores,
    }


def files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]


def flipped(path: Path, count: int, seed: int) -> Iterator[str]:
    """Flips one bit at a time of a file, and puts it back."""
    data, chance = path.read_bytes(), random.Random(f"{path.name}:{seed}")
    bits = [chance.randrange(8 * len(data)) for _ in range(count)] if data else []
    if count > 2:
        bits[:2] = chance.randrange(8), 8 * (len(data) - 1) + chance.randrange(8)
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            yield f"{path.name}, bit {bit % 8} of byte {bit // 8}"
        finally:
            path.write_bytes(data)


def refused_or(action: Callable[[], Any]) -> Any:
    """What an action gives; None where it was refused in one line."""
    try:
        return action()
    except DudeError as error:
        told = str(error)
    assert "\n" not in told
    return None


# --- an interrupted run -------------------------------------------------------------------------------------------

KINDS = (
    "run.json", "before.json", "metrics.jsonl", "checkpoints/step-00000005/manifest.json",
    "checkpoints/step-00000005/state.json", "checkpoints/step-00000005/optimizer.safetensors",
    "checkpoints/step-00000005/adapter/adapter_model.safetensors", "BEST/trained.safetensors", "BEST/manifest.json",
)  # fmt: skip


def resumes_or_refuses(place: Path, interrupted: Path, wanted: dict[str, Any], name: Path, count: int) -> None:
    for number, what in enumerate(flipped(interrupted / name, count, seed=0)):
        copy = place / "copies" / f"{number}"
        shutil.copytree(interrupted, copy)
        try:
            if refused_or(lambda copy=copy: start(place, copy)) is not None:
                assert trained(copy) == wanted, what
            else:
                assert not (copy / "adapter").exists(), what
        finally:
            shutil.rmtree(copy)


@pytest.mark.parametrize("name", KINDS)
def test_a_bit_of_an_interrupted_run(place, finished, interrupted, name):
    best = next((interrupted / "checkpoints").glob("best-*")).relative_to(interrupted)
    resumes_or_refuses(place, interrupted, trained(finished), Path(name.replace("BEST", str(best))), 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_bit_of_every_file_of_an_interrupted_run(place, finished, interrupted):
    names = files(interrupted)
    assert len(names) > 20
    for name in names:
        resumes_or_refuses(place, interrupted, trained(finished), name, EVERYWHERE)


# --- a finished one -----------------------------------------------------------------------------------------------


def told(place: Path, run_folder: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads a finished run."""

    def generated() -> Any:
        speaker = open_speaker(str(run_folder / "adapter"), base=None, gguf_file=None, notes=Display(quiet=True))
        assert speaker.template(None).kind == "plain"
        return decode(speaker, [[70, 71, 72]], Decoding(max_new_tokens=4))

    def sent() -> Any:
        target = place / "sent"
        shutil.rmtree(target, ignore_errors=True)
        upload(run_folder / "adapter", "me/mine", folder=target, quiet=True)
        return {path.name: path.read_bytes() for path in target.iterdir()}

    return {
        "the run again": lambda: start(place, run_folder),
        "verify": lambda: verify(run_folder / "adapter", quiet=True) or "sound",
        "generate": generated,
        "upload": sent,
    }


def tells_or_refuses(place: Path, finished: Path, wanted: dict[str, Any], name: Path, count: int) -> None:
    for what in flipped(finished / name, count, seed=1):
        for action, act in told(place, finished).items():
            found = refused_or(act)
            if found is not None:
                assert found == wanted[action], f"{action}: {what}"


@pytest.fixture(scope="module")
def answers(place, finished) -> dict[str, Any]:
    return {action: act() for action, act in told(place, finished).items()}


@pytest.mark.parametrize(
    "name",
    ["run.json", "config.yaml", "report.json", "loss.png", "adapter/adapter_config.json",
     "adapter/adapter_model.safetensors"],
)  # fmt: skip
def test_a_bit_of_a_finished_run(place, finished, answers, name):
    tells_or_refuses(place, finished, answers, Path(name), 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_bit_of_every_file_of_a_finished_run(place, finished, answers):
    for name in files(finished):
        tells_or_refuses(place, finished, answers, name, EVERYWHERE)


# --- caches -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_bit_of_every_cached_file(place, finished):
    wanted = trained(finished)
    cache = place / "cache"
    names = [name for name in files(cache) if (cache / name).stat().st_size]
    assert len(names) > 8
    for name in names:
        kept = place / "kept"
        shutil.copytree(cache, kept)
        for what in flipped(cache / name, 3, seed=2):
            start(place, place / "again", overwrite=True)
            assert trained(place / "again") == wanted, what
            shutil.rmtree(cache)
            shutil.copytree(kept, cache)
        shutil.rmtree(kept)
