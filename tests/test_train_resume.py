"""Interrupted in every way, then started again: the same weights, optimizer, schedule and lines, bit by bit."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from night import NIGHT, more_by_night, some_by_day
from safetensors.torch import load_file, save_file
from tiny import save_tiny, write_rows

from dude_peft.artifact.sealed import folder_facts, seal_folder, sealed, unsealed
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ArtifactError, BusyError, ConfigError, DataError, ResourceError, StoppedError
from dude_peft.exporting.adapter import open_adapter
from dude_peft.folder.checkpoint import FORMAT_VERSION, Checkpoints
from dude_peft.folder.lock import RunLock
from dude_peft.machine.stop import Stop
from dude_peft.training import run as run_module
from dude_peft.training import trainer as trainer_module
from dude_peft.training.run import run

STEPS = 24
TIMES = ("tokens_per_second", "seconds", "memory_bytes")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 22)  # batches of 2, three to a step: the last step of an epoch is a short one
    write_rows(folder / "test.jsonl", 4, start=100)
    return folder


def settings(places: Path, out: Path, **train: object) -> dict:
    return {
        "model": {"name_or_path": str(places / "model")},
        "adapter": {"r": 2, "lora_dropout": 0.2, "target_modules": ["q_proj", "down_proj"]},
        # The plain template needs no process that renders: these tests start hundreds of runs.
        "data": {"train": str(places / "train.jsonl"), "test": str(places / "test.jsonl"), "template": "plain"},
        "train": {
            "learning_rate": 0.01,
            "max_steps": STEPS,
            "logging_steps": 5,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "weight_decay": 0.1,
            "save_steps": 1,
            **train,
        },
        "evaluation": {"rows": 2, "max_new_tokens": 2, "eval_steps": 7},
        "output_dir": str(out),
    }


def start(wanted: dict, **options: object):
    return run(RunConfig(**wanted), quiet=True, **options)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_process(folder: Path, wanted: dict) -> subprocess.Popen:
    """A run by the command, in a process of its own; its configuration is written into `folder`."""
    path = folder / f"{Path(wanted['output_dir']).name}.yaml"
    path.write_text(json.dumps(wanted))
    command = [sys.executable, "-m", "dude_peft", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_a_checkpoint(out: Path, running: subprocess.Popen) -> None:
    """Until there is one of step 3 or later, or the process has ended."""
    while not list((out / "checkpoints").glob("step-*[3-9]")) and running.poll() is None:
        time.sleep(0.005)


def result(out: Path) -> dict:
    """Everything that has to be the same, hashed: adapter, last checkpoint, lines without times, scores."""
    last = max((out / "checkpoints").glob("step-*"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    state = json.loads((last / "state.json").read_text())
    state["loop"] = {key: value for key, value in state["loop"].items() if key not in ("seconds", "metrics_bytes")}
    report = json.loads((out / "report.json").read_text())
    return {
        "adapter": digest(out / "adapter/adapter_model.safetensors"),
        "last": last.name,
        "checkpoint": {name: digest(last / name) for name in ("optimizer.safetensors", "random.safetensors")},
        "trained": digest(last / "adapter/adapter_model.safetensors"),
        "state": state,
        "trainer": json.loads((last / "trainer_state.json").read_text()),
        "lines": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "scores": [report["before"], report["after"], report["best_step"]],
    }


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    """matplotlib takes a quarter of such a short run."""
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


@pytest.fixture(scope="module")
def whole(places) -> dict:
    """The run without any interruption."""
    out = places / "whole"
    start(settings(places, out))
    return result(out)


class _CutError(Exception):
    pass


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends as a kill would end it, right behind the checkpoint of `step`."""
    original = trainer_module.RunTrainer._save_checkpoint

    def save(self, *args):
        original(self, *args)
        if self.state.global_step == step:
            raise _CutError

    monkeypatch.setattr(trainer_module.RunTrainer, "_save_checkpoint", save)


# --- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", some_by_day(range(1, STEPS + 1), [1, 4, 14, 23]))
def test_resuming_at_every_step_changes_no_bit(places, whole, tmp_path, monkeypatch, step):
    wanted = settings(places, tmp_path / "out")
    with monkeypatch.context() as patch:
        cut_at(step, patch)
        with pytest.raises(_CutError):
            start(wanted)
    torch.manual_seed(999)  # another process begins with other random numbers
    start(wanted)
    assert result(tmp_path / "out") == whole


@pytest.mark.parametrize("seed", some_by_day(range(3), [0]))
def test_a_chain_of_interruptions_changes_no_bit(places, whole, tmp_path, monkeypatch, seed):
    wanted = settings(places, tmp_path / "out")
    for step in sorted(random.Random(seed).sample(range(1, STEPS), 5)):
        with monkeypatch.context() as patch:
            cut_at(step, patch)
            with pytest.raises(_CutError):
                start(wanted)
    start(wanted)
    assert result(tmp_path / "out") == whole


OTHER_SETTINGS = [
    {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear"},
    {"optim": "adafactor"},
    {"optim": "adamw_8bit"},
    {"optim": "sgd", "train_sampling_strategy": "group_by_length"},
    {"loraplus_lr_ratio": 4.0, "magnitude_lr_ratio": 0.5, "max_steps": None, "num_train_epochs": 2.5},
    {"bf16": True, "gradient_checkpointing": True},
    {"trainer": "trl"},
    {"packing": True},
    {"packing": True, "trainer": "trl"},
    {"neftune_noise_alpha": 5.0},
    {"optim": "adagrad"},
    {"optim": "rmsprop"},
    {"optim": "ademamix"},
    {"optim": "lion_32bit"},
    {"optim": "paged_adamw_32bit"},
]


@pytest.mark.parametrize("train", some_by_day(OTHER_SETTINGS, [OTHER_SETTINGS[4], OTHER_SETTINGS[6]]), ids=str)
def test_other_settings_resume_as_well(places, tmp_path, monkeypatch, train):
    if train.get("optim", "").endswith(("bit", "mix")):
        pytest.importorskip("bitsandbytes", reason="these optimizers are bitsandbytes'")
    train = dict(train)
    data = {"packing": True, "max_length": 40} if train.pop("packing", False) else {}

    def configured(name: str) -> dict:
        made = settings(places, tmp_path / name, **train)
        return made | {"data": made["data"] | data}

    start(configured("whole"))
    wanted = configured("out")
    with monkeypatch.context() as patch:
        cut_at(6, patch)
        with pytest.raises(_CutError):
            start(wanted)
    start(wanted)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_bfloat16_run_that_is_cut_behind_its_last_step_measures_the_same(places, tmp_path, monkeypatch):
    """Training puts autocast around the model; a run with nothing left to train measures under it, too."""

    def configured(name: str) -> dict:
        return settings(places, tmp_path / name, bf16=True, max_steps=2)

    start(configured("whole"))
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(_CutError):
            start(configured("out"))
    start(configured("out"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_run_with_a_chat_template_of_its_own_resumes_from_the_same_file_alone(places, tmp_path, monkeypatch):
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
                   "{% if add_generation_prompt %}assistant: {% endif %}", encoding="utf-8")  # fmt: skip

    def configured(name: str) -> dict:
        made = settings(places, tmp_path / name, max_steps=4)
        return made | {"data": made["data"] | {"template": "chat", "chat_template": str(own)}}

    start(configured("whole"))
    wanted = configured("out")
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(_CutError):
            start(wanted)
    text = own.read_text(encoding="utf-8")
    own.write_text(f"{text}{{# changed #}}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.chat_template: another text \(sha256 .* -> "):
        start(wanted)
    own.write_text(text, encoding="utf-8")
    start(wanted)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.parametrize("optim", some_by_day(["adamw_8bit", "lion_8bit", "ademamix_8bit"], ["adamw_8bit"]))
def test_states_in_8_bits_resume_where_they_share_a_table(places, tmp_path, monkeypatch, optim):
    """From 4,096 numbers on a tensor's states are 8-bit, and all of them name the same tensors as their tables."""
    pytest.importorskip("bitsandbytes", reason="8-bit optimizers are bitsandbytes'")

    def configured(name: str) -> dict:
        made = settings(places, tmp_path / name, optim=optim, max_steps=4)
        return made | {"adapter": made["adapter"] | {"r": 40}}

    start(configured("whole"))
    tables = load_file(max((tmp_path / "whole/checkpoints").glob("step-*")) / "optimizer.safetensors")
    assert any(name.endswith("qmap1") for name in tables)
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(_CutError):
            start(configured("out"))
    start(configured("out"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_finished_run_is_told_of_and_left_alone(places, whole, tmp_path):
    shutil.copytree(places / "whole", tmp_path / "out")
    wanted = settings(places, tmp_path / "out")
    before = {path: digest(path) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    report = start(wanted)
    assert report.steps == STEPS
    assert report == start(settings(places, places / "whole"))
    assert {path: digest(path) for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_nothing_in_a_checkpoint_is_a_pickle(places, whole):
    names = {path.suffix for path in (places / "whole").rglob("*") if path.is_file()}
    assert names <= {".json", ".jsonl", ".safetensors", ".yaml", ".png", ".md", ".jinja"}


# --- what must not be resumed -------------------------------------------------------------------------------------


@pytest.fixture
def halfway(places, tmp_path, monkeypatch) -> dict:
    """Settings of a run that was interrupted at step 9."""
    wanted = settings(places, tmp_path / "out")
    with monkeypatch.context() as patch:
        cut_at(9, patch)
        with pytest.raises(_CutError):
            start(wanted)
    return wanted


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "learning_rate", 0.02),
        ("train", "per_device_train_batch_size", 3),
        ("train", "seed", 1),
        ("train", "max_steps", 30),
        ("adapter", "r", 3),
        ("adapter", "target_modules", ["q_proj"]),
        ("adapter", "lora_dropout", 0.1),
        ("data", "max_length", 100),
        ("evaluation", "eval_steps", 8),
    ],
)
def test_another_configuration_is_refused_with_the_difference(halfway, section, key, value):
    changed = halfway | {section: halfway[section] | {key: value}}
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: .* -> ") as caught:
        start(changed)
    assert "\n" not in str(caught.value)


def test_what_changes_no_number_may_change(halfway, whole, tmp_path):
    start(halfway | {"train": halfway["train"] | {"save_steps": 50, "save_total_limit": 3}})
    found = result(tmp_path / "out")
    assert found["adapter"] == whole["adapter"]
    assert found["lines"] == whole["lines"]


@pytest.mark.parametrize("how", ["one letter", "another order", "one row less"])
def test_other_data_are_refused(halfway, places, tmp_path, how):
    lines = (places / "train.jsonl").read_text().splitlines()
    if how == "one letter":
        lines[3] = lines[3].replace("say 3", "say 4")
    elif how == "another order":
        lines[0], lines[1] = lines[1], lines[0]
    else:
        lines.pop()
    original = (places / "train.jsonl").read_text()
    try:
        (places / "train.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(DataError, match=r"data\.train: the rows differ from those"):
            start(halfway)
    finally:
        (places / "train.jsonl").write_text(original)


def test_another_base_model_is_refused(halfway, places, tmp_path):
    from safetensors.torch import save_file

    kept = (places / "model/model.safetensors").read_bytes()
    tensors = load_file(places / "model/model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] += 1e-4
    try:
        save_file(tensors, places / "model/model.safetensors", metadata={"format": "pt"})
        expected = r"1 of 4 differ .*layers\.1\.self_attn\.q_proj.*--overwrite"
        with pytest.raises(ArtifactError, match=expected) as refused:
            start(halfway)
        assert "allow_base_mismatch" not in str(refused.value)
    finally:
        (places / "model/model.safetensors").write_bytes(kept)


def test_another_environment_is_warned_of(halfway, tmp_path):
    path = tmp_path / "out/run.json"
    identity = unsealed(json.loads(path.read_text()))
    identity["environment"]["versions"]["torch"] = "2.0.0"
    identity["environment"]["hardware"]["threads"] = 77
    path.write_text(json.dumps(sealed(identity)))
    report = start(halfway)
    told = [warning for warning in report.warnings if "started in another environment" in warning]
    assert len(told) == 1
    assert "versions.torch" in told[0]
    assert "hardware.threads 77" in told[0]


FILES = (
    "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "optimizer.safetensors", "random.safetensors",
    "state.json", "trainer_state.json", "manifest.json",
)  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "name"),
    some_by_day(
        itertools.product(["missing", "one bit", "cut", "link"], FILES),
        [("one bit", FILES[2]), ("missing", FILES[0]), ("cut", FILES[6]), ("link", FILES[4])],
    ),
)
def test_a_damaged_checkpoint_is_skipped_and_named(halfway, whole, tmp_path, name, damage):
    out = tmp_path / "out"
    newest = max((out / "checkpoints").glob("step-*")) / name
    data = bytearray(newest.read_bytes())
    newest.unlink()
    if damage == "one bit":
        data[len(data) // 2] ^= 4
        newest.write_bytes(data)
    elif damage == "cut":
        newest.write_bytes(data[:-3])
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        newest.symlink_to(tmp_path / "elsewhere")
        if name == "manifest.json":
            return  # a link to the same manifest says the same
    report = start(halfway)
    assert any("checkpoint skipped: " in warning and newest.name in warning for warning in report.warnings)
    found = result(out)
    assert found == whole


@pytest.mark.parametrize(
    ("name", "damage"),
    [("trained.safetensors", "one bit"), ("manifest.json", "missing"), ("trained.safetensors", "another run's")],
)
def test_a_damaged_best_adapter_is_not_gone_on_with(places, whole, tmp_path, monkeypatch, name, damage):
    """Cut right behind the checkpoint that it goes with: the one before has none yet, and finds it again."""
    wanted = settings(places, tmp_path / "out")
    with monkeypatch.context() as patch:
        cut_at(7, patch)
        with pytest.raises(_CutError):
            start(wanted)
    best = tmp_path / "out/checkpoints/best-00000007"
    if damage == "another run's":
        tensors = load_file(best / "trained.safetensors")
        Checkpoints(tmp_path / "other").save_best(
            7, lambda folder: shutil.copytree(best / "adapter", folder), {n: t + 1 for n, t in tensors.items()}
        )
        shutil.rmtree(best)
        (tmp_path / "other/best-00000007").rename(best)
    elif damage == "missing":
        (best / name).unlink()
    else:
        data = bytearray((best / name).read_bytes())
        data[len(data) // 2] ^= 4
        (best / name).write_bytes(data)
    report = start(wanted)
    assert any("checkpoint skipped: " in told and "best-00000007" in told for told in report.warnings)
    assert result(tmp_path / "out") == whole


def test_a_run_whose_best_adapter_is_lost_says_so_before_it_trains(halfway, tmp_path):
    path = tmp_path / "out/checkpoints/best-00000007/trained.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"best-00000007/trained\.safetensors is damaged"):
        start(halfway)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter/adapter_model.safetensors"])
def test_a_checkpoint_with_nan_is_passed_over(halfway, whole, tmp_path, name):
    """As an earlier version may have left one: every hash agrees, and a number is none."""
    newest = max((tmp_path / "out/checkpoints").glob("step-*"))
    tensors = load_file(newest / name)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, newest / name)
    facts, _ = folder_facts(newest)
    seal_folder(newest, facts)
    report = start(halfway)
    assert any(
        "checkpoint skipped: " in told and f"{name} has NaN or Inf" in told and "resuming from step-00000008" in told
        for told in report.warnings
    )
    assert result(tmp_path / "out") == whole


def test_of_adapters_alone_the_newest_sound_one_is_taken(halfway, tmp_path):
    folder = tmp_path / "out/checkpoints"
    for path in folder.glob("step-*"):
        (path / "random.safetensors").unlink()
    weights = max(folder.glob("step-*")) / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    report = start(halfway, weights_only=True)
    assert any("adapter skipped: " in told for told in report.warnings)
    assert any("only the adapter of step-00000008" in told for told in report.warnings)


def test_without_a_whole_checkpoint_the_file_is_named_and_the_adapter_can_be_saved(halfway, tmp_path):
    out = tmp_path / "out"
    for path in (out / "checkpoints").glob("step-*"):
        (path / "optimizer.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"optimizer\.safetensors is missing; add --weights-only"):
        start(halfway)
    trained = load_file(max((out / "checkpoints").glob("step-*")) / "adapter/adapter_model.safetensors")
    report = start(halfway, weights_only=True)
    assert any("only the adapter of step-00000009" in warning for warning in report.warnings)
    assert report.steps == STEPS
    recovered = load_file(out / "recovered/adapter_model.safetensors")
    assert all(trained[name].equal(recovered[name]) for name in trained)


def test_a_checkpoint_of_another_format_and_a_renamed_one_are_refused(halfway, tmp_path):
    folder = tmp_path / "out/checkpoints"
    for path in folder.glob("step-*"):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ArtifactError, match="checkpoint format 99"):
        start(halfway)
    for path in folder.glob("step-*"):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": FORMAT_VERSION}))
    newest = max(folder.glob("step-*"))
    newest.rename(folder / "step-00000020")  # as if it were further on
    report = start(halfway)
    assert any("step-00000020 holds step 9; it was renamed" in warning for warning in report.warnings)


def test_times_of_files_do_not_count(halfway, whole, tmp_path):
    for age, path in enumerate(sorted((tmp_path / "out/checkpoints").glob("step-*"))):
        os.utime(path, (1e9 - age, 1e9 - age))
    start(halfway)
    assert result(tmp_path / "out") == whole


def test_foreign_files_stay_and_ours_are_swept(halfway, tmp_path):
    folder = tmp_path / "out/checkpoints"
    (folder / "notes.txt").write_text("mine")
    (folder / ".dude-notes").mkdir()
    (folder / ".dude-step-00000010").mkdir()
    (folder / ".dude-step-00000010/half").write_text("of a save")
    start(halfway)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / ".dude-notes").is_dir()
    assert not (folder / ".dude-step-00000010").exists()
    assert len(list(folder.glob("step-*"))) == 2


def test_overwriting_starts_anew(halfway, whole, tmp_path):
    start(halfway, overwrite=True)
    assert result(tmp_path / "out") == whole


def test_a_damaged_record_of_the_run_is_refused(halfway, tmp_path):
    for text in ("", "{}", "[]", '{"format_version": 99}', '{"format_version": 1}'):
        (tmp_path / "out/run.json").write_text(text)
        with pytest.raises(ArtifactError, match="--overwrite"):
            start(halfway)


# --- one run in a folder ------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_with_the_owner(places, tmp_path):
    (tmp_path / "out").mkdir()
    lock = RunLock(tmp_path / "out")
    try:
        with pytest.raises(BusyError, match=rf"in use by process {os.getpid()} on "):
            start(settings(places, tmp_path / "out"))
    finally:
        lock.release()
    assert not list((tmp_path / "out").iterdir())


def test_a_planted_lock_is_not_followed(places, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out/.dude-lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ResourceError):
        start(settings(places, tmp_path / "out"))
    assert (tmp_path / "victim").read_text() == "mine"


# --- kills, signals, disks: in processes of their own --------------------------------------------------------------


class Server:
    """run_once.py, asked for one run at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("run_once.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout.readline() == "ready\n"

    def send(self, wanted: dict, **request: object) -> None:
        self._process.stdin.write(json.dumps({"settings": wanted, **request}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict:
        return json.loads(self._process.stdout.readline())

    def run(self, wanted: dict, **request: object) -> dict:
        self.send(wanted, **request)
        return self.answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def server():
    served = Server()
    yield served
    served.close()


def newest_step(out: Path) -> int:
    names = [path.name for path in (out / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


@pytest.mark.slow
@more_by_night
@pytest.mark.timeout(3600)
def test_kills_at_random_times_lose_no_step_and_change_no_bit(places, whole, tmp_path, server):
    kills, runs = int(os.environ.get("DUDE_KILLS", "4")), 0
    chance = random.Random(0)
    killed = 0
    began = time.perf_counter()
    assert server.run(settings(places, tmp_path / "measure"))["code"] == 0
    longest = time.perf_counter() - began
    while killed < kills:
        out = tmp_path / f"out{runs}"
        wanted = settings(places, out)
        runs += 1
        acknowledged = 0
        while True:
            answer = server.run(wanted, kill_after=chance.uniform(0.05, longest))
            step = newest_step(out)
            assert step >= acknowledged
            acknowledged = step
            if answer["code"] == 0:
                break
            assert answer["code"] == -9, answer
            killed += 1
        assert result(out) == whole
        assert not list(out.rglob(".dude-*"))
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_kill_before_every_call_to_the_disk(places, whole, tmp_path, server):
    """Not at random: right before each fsync, rename, mkdir, unlink and truncation of a whole run."""
    wanted = settings(places, tmp_path / "count", save_steps=12)
    total = server.run(wanted)["calls"]
    assert total > 40
    for number in range(1, total + 1):
        out = tmp_path / f"out{number}"
        wanted = settings(places, out, save_steps=12)
        assert server.run(wanted, kill_call=number)["code"] == -9
        answer = server.run(wanted)
        assert answer["code"] == 0, answer
        found = result(out)
        assert (found["adapter"], found["lines"]) == (whole["adapter"], whole["lines"]), number
        assert not list(out.rglob(".dude-*")), number
        shutil.rmtree(out)


@more_by_night
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("number", "code"), some_by_day([(15, 143), (2, 130)], [(15, 143)]))
def test_a_signal_ends_behind_the_step_and_the_run_goes_on(places, whole, tmp_path, server, number, code):
    chance = random.Random(number)
    asked = int(os.environ.get("DUDE_SIGNALS", "2"))
    began = time.perf_counter()
    assert server.run(settings(places, tmp_path / "measure", save_steps=50))["code"] == 0
    longest = time.perf_counter() - began
    stopped = 0
    attempt = 0
    while stopped < asked:
        out = tmp_path / f"out{attempt}"
        attempt += 1
        wanted = settings(places, out, save_steps=50)  # what is saved, the signal saves
        answer = server.run(wanted, signals=[number], signal_after=chance.uniform(0.05, longest))
        if answer["code"] != 0:
            if answer["code"] == -number:  # before the run listens or after its end; a shell calls that 143 too
                assert not (out / "metrics.jsonl").exists() or (out / "report.json").exists()
            else:
                assert answer["code"] == code, answer
            stopped += 1
            if "which is saved" in answer["message"]:
                assert f"after step {newest_step(out)} of {STEPS}" in answer["message"]
            assert server.run(wanted)["code"] == 0
        found = result(out)
        assert (found["adapter"], found["lines"]) == (whole["adapter"], whole["lines"])
        shutil.rmtree(out)


def test_ctrl_c_in_the_last_step_ends_behind_it_and_the_run_goes_on(places, whole, tmp_path, monkeypatch):
    from dude_peft.training.loop import Loop

    wanted, end_of_step = settings(places, tmp_path / "out", save_steps=50), Loop.on_step_end

    def interrupted(self, args, state, *rest, **more):
        if state.global_step == STEPS:
            signal.raise_signal(signal.SIGINT)
        end_of_step(self, args, state, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "on_step_end", interrupted)
        with pytest.raises(StoppedError, match=f"after step {STEPS} of {STEPS}, which is saved"):
            start(wanted)
    assert not (tmp_path / "out/adapter").exists()
    with pytest.raises(ConfigError, match="is the folder of a run that has not ended; run its dude train again"):
        open_adapter(str(tmp_path / "out"))
    start(wanted)
    found = result(tmp_path / "out")
    assert (found["adapter"], found["lines"]) == (whole["adapter"], whole["lines"])


def test_a_stop_that_a_library_caught_is_still_a_stop():
    def read() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except Exception as error:  # as transformers does with whatever comes while a file is read
            raise OSError("the file cannot be read") from error

    with pytest.raises(StoppedError, match="stopped by Ctrl-C before training"), Stop(print).listening():
        read()
    stop = Stop(print)
    with stop.listening():
        with contextlib.suppress(Exception):
            signal.raise_signal(signal.SIGTERM)
        assert stop.wanted()
    with pytest.raises(OSError, match="another"), Stop(print).listening():
        raise OSError("another")


@more_by_night
@pytest.mark.timeout(3600)
def test_a_second_signal_ends_at_once_and_harms_nothing(places, whole, tmp_path, server):
    chance = random.Random(7)
    for attempt in range(int(os.environ.get("DUDE_SIGNALS", "2"))):
        out = tmp_path / f"out{attempt}"
        wanted = settings(places, out)
        # The second comes 0 to 50 ms behind the first.
        answer = server.run(wanted, signals=[2, 2], signal_after=chance.uniform(0, 0.05) + 0.2 * (attempt % 5))
        assert answer["code"] in (130, 0), answer
        assert server.run(wanted)["code"] == 0
        assert result(out) == whole


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_there(places, whole, tmp_path, server):
    """Files may not grow beyond a limit, swept from nothing to the largest: exit 6, the last checkpoint whole."""
    out = tmp_path / "first"
    start(settings(places, out, save_steps=8))
    largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
    sweep = 40 if NIGHT else 4
    failed = 0
    for number in range(sweep):
        out = tmp_path / f"out{number}"
        wanted = settings(places, out, save_steps=8)
        answer = server.run(wanted, limit=int(largest * 1.02 * number / (sweep - 1)))
        if answer["code"] != 0:
            failed += 1
            assert answer["code"] == 6, (number, answer)
            assert "\n" not in answer["message"]
            assert not list(out.rglob(".dude-*")), number
            answer = server.run(wanted)
        assert answer["code"] == 0, (number, answer)
        found = result(out)
        assert (found["adapter"], found["lines"]) == (whole["adapter"], whole["lines"]), number
        shutil.rmtree(out)
    assert failed >= sweep - max(1, sweep // 10)


@pytest.mark.slow
def test_of_two_starts_one_wins(places, tmp_path, server):
    other = Server()
    try:
        for number in range(20 if NIGHT else 2):
            wanted = settings(places, tmp_path / f"out{number}", max_steps=4)
            server.send(wanted)
            other.send(wanted)
            answers = [server.answer(), other.answer()]
            codes = sorted(answer["code"] for answer in answers)
            # Where the second came when the first was done, it was told so.
            assert codes in ([0, 75], [0, 0]), answers
            if codes == [0, 75]:
                loser = max(answers, key=lambda answer: answer["code"])
                assert "in use by process" in loser["message"]
    finally:
        other.close()
