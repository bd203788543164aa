"""`model.device_map`: a base whose weights are read from the disk layer by layer, trained, resumed, merged and refused.

There is no GPU here: what is spread is spread over memory and disk. `accelerate.cpu_offload` stands for GPU and CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from models import logits, make, tokens
from safetensors.torch import load_file, save_file
from served import dude
from test_train_resume import _CutError, cut_at
from tiny import save_tiny, write_rows

from dude_peft import DudeConfig, load_adapter
from dude_peft.answer.fingerprint import model_fingerprint
from dude_peft.config.reading import load_config
from dude_peft.config.schema import ModelSection, RunConfig
from dude_peft.errors import ArtifactError, BusyError, ConfigError, DudeError, ResourceError
from dude_peft.model.load import load_model
from dude_peft.training import run as run_module
from dude_peft.training.run import run
from dude_peft.tuner.offloaded import is_offloaded, offloaded_layers

WEIGHTS = "adapter/adapter_model.safetensors"
SPREAD = {"device_map": "auto", "max_memory": {"cpu": 400_000}}
"""Of 430,000 bytes: the embeddings and a part of the layers stay in memory."""


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("placed")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 16)
    write_rows(folder / "test.jsonl", 4, start=100)
    return folder


def settings(place: Path, out: Path, model: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": {"name_or_path": str(place / "model"), **model},
        "adapter": {"r": 4, "lora_dropout": 0.1},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl")},
        "train": {
            "learning_rate": 0.01,
            "max_steps": 6,
            "save_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": True,
        },
        "evaluation": {"rows": 2, "max_new_tokens": 3},
        "output_dir": str(out),
    }
    for section, changes in sections.items():
        found[section] = found[section] | changes
    return found


def start(*arguments: Any, **sections: Any) -> Any:
    return run(RunConfig(**settings(*arguments, **sections)), quiet=True)


def finished(place: Path, out: Path, model: dict[str, Any]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "loss_curve", lambda *_: b"")
        start(place, out, model)
    return out


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Path:
    """A run on one device."""
    return finished(place, tmp_path_factory.mktemp("whole") / "out", {})


@pytest.fixture(scope="module")
def spread(place, tmp_path_factory) -> Path:
    """The same over memory and disk."""
    return finished(place, tmp_path_factory.mktemp("spread") / "out", SPREAD)


def losses(out: Path) -> list[float]:
    """On held-out rows, before and after."""
    report = json.loads((out / "report.json").read_text())
    return [report["before"]["loss"], report["after"]["loss"]]


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_spread_run_resumes_bit_by_bit(place, whole, spread, tmp_path, monkeypatch):
    out, file = tmp_path / "out", tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(place, out, SPREAD)))
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(_CutError):
            start(place, out, SPREAD)
    done = dude("train", file)
    assert done.returncode == 0, done.stderr
    assert "resuming from the checkpoint of step 3" in done.stdout
    assert "on cpu" in done.stdout
    assert "on disk" in done.stdout
    assert "train.gradient_checkpointing" not in done.stdout
    assert (out / WEIGHTS).read_bytes() == (spread / WEIGHTS).read_bytes()
    assert losses(out) == pytest.approx(losses(whole), rel=1e-4)
    assert load_config(out / "config.yaml", []).model.max_memory == {"cpu": 400_000}


@pytest.mark.slow
def test_the_files_of_a_spread_run_merge_and_verify(spread, tmp_path):
    merged = dude("merge", spread / "adapter", "-o", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.endswith(f"next:\n  dude chat {tmp_path / 'merged'}\n")
    verified = dude("verify", spread / "adapter")
    assert verified.returncode == 0, verified.stderr


@pytest.mark.parametrize("model", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
def test_a_model_that_is_placed_whole_is_the_model(place, whole, tmp_path, model):
    start(place, tmp_path / "out", model)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_another_map_is_another_place_not_another_run(place, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(_CutError):
            start(place, out, SPREAD)
    run(RunConfig(**settings(place, out, {})))
    told = capsys.readouterr().out
    assert "the run started in another environment (device_map" in told
    assert losses(out) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_a_base_that_changes_on_the_disk_is_noticed(tmp_path, monkeypatch, name):
    save_tiny(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 16)
    write_rows(tmp_path / "test.jsonl", 4, start=100)
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(_CutError):
            start(tmp_path, tmp_path / "out", SPREAD)
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name] * 1.5
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match="restore the base model that this run started with"):
        start(tmp_path, tmp_path / "out", SPREAD)


# --- layers ---------------------------------------------------------------------------------------------------------


def on_disk(folder: Path, name: str) -> Any:
    """A model with all but its embeddings on the disk."""
    made = make(name)
    made.save_pretrained(folder)
    where = {
        part: "disk" for part, module in made.named_modules() if not [*module.children()] and [*module.parameters()]
    }
    embedding = next(part for part, module in made.named_modules() if module is made.get_input_embeddings())
    tied = {
        part
        for part, module in made.named_modules()
        if getattr(module, "weight", None) is made.get_input_embeddings().weight
    }
    where |= dict.fromkeys({embedding, *tied}, "cpu")
    buffers = {
        part: "cpu" for part, module in made.named_modules() if not [*module.parameters()] and [*module.buffers()]
    }
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=where | buffers).eval()


def beside(folder: Path, name: str) -> Any:
    """A model with all weights outside of the device that computes."""
    return accelerate.cpu_offload(make(name), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("spread", [on_disk, beside])
@pytest.mark.parametrize("name", ["opt-bias", "gpt2-conv1d"])
def test_layers_read_what_they_need_where_it_is(tmp_path, spread, name):
    here, away = make(name), spread(tmp_path / "model", name)
    base = logits(here)
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    here, away = (peft.get_peft_model(model, DudeConfig(**config)) for model in (here, away))
    assert any(is_offloaded(module) for module in away.modules())
    assert torch.equal(logits(away), base)
    states = []
    for model in (here, away):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-1)
        for _ in range(2):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append({key: p.detach() for key, p in model.named_parameters() if p.requires_grad})
        assert all(tensor.device.type == "cpu" for tensor in states[-1].values())
    # Weights of a file lie at other addresses, by which a matrix product may round otherwise.
    near: dict[str, float] = {"rtol": 1e-4, "atol": 1e-6} if spread is on_disk else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(*states, **near)
    torch.testing.assert_close(logits(away), logits(here), **near)
    layers = [[m for m in model.modules() if hasattr(m, "effective_weight")] for model in (here, away)]
    for one, two in zip(*layers, strict=True):
        torch.testing.assert_close(one.effective_weight(), two.effective_weight(), **near)
        torch.testing.assert_close(one.weight + 0, two.weight + 0, **near)
    with away.disable_adapter():
        assert torch.equal(logits(away), base)
    with pytest.raises(ConfigError, match=r"is offloaded, .*dude merge"):
        away.merge_adapter()
    away.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(spread(tmp_path / "again", name), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(away))
    assert any(is_offloaded(module) for module in loaded.modules())


# --- the other commands ---------------------------------------------------------------------------------------------

WORDS = ("--device-map", "auto", "--max-memory", "cpu=400000")


@pytest.mark.slow
def test_a_spread_adapter_answers_as_it_does_on_one_device(spread, place, tmp_path):
    asked = ("--file", place / "test.jsonl", "--max-new-tokens", "4", "--base-too")
    whole, away = (dude("generate", spread / "adapter", *asked, *words) for words in ((), WORDS))
    assert away.returncode == 0, away.stderr
    assert away.stdout == whole.stdout != ""
    chat = [sys.executable, "-m", "dude_peft", "chat", str(spread / "adapter"), "--max-new-tokens", "4", *WORDS]
    talked = subprocess.run(chat, input="say 1\n", capture_output=True, text=True, timeout=300, check=False)
    assert talked.returncode == 0, talked.stderr
    (tmp_path / "text.txt").write_text("Some general text. " * 40)
    losses = []
    for name, words in (("whole", ()), ("away", WORDS)):
        found = dude("eval", spread / "adapter", "--text", tmp_path / "text.txt", "-o", tmp_path / name, *words)
        assert found.returncode == 0, found.stderr
        assert f"next:\n  dude report {tmp_path / name} -o {tmp_path / name}.html" in found.stdout
        losses.append(json.loads((tmp_path / name / "results.json").read_text())["text"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_model_is_placed_for_answers(spread, place):
    from dude_peft.answer.speaker import open_speaker
    from dude_peft.terminal.display import Display

    how: dict[str, Any] = {"base": None, "gguf_file": None, "notes": Display(quiet=True)}
    speaker = open_speaker(str(spread / "adapter"), device_map="auto", max_memory=["cpu=400000"], **how)
    assert offloaded_layers(speaker.model)
    ids = torch.tensor([[1, 2, 3]])
    whole = open_speaker(str(spread / "adapter"), **how)
    with torch.inference_mode():
        assert torch.allclose(speaker.model(input_ids=ids).logits, whole.model(input_ids=ids).logits, atol=1e-5)
    for device_map, max_memory, told in (
        (None, ["cpu=1"], "--max-memory counts with --device-map"),
        ("auto", ["cpu"], "write DEVICE=SIZE"),
        ("auto", ["cpu=10000"], "the input embeddings are offloaded"),
    ):
        with pytest.raises(DudeError, match=told):
            open_speaker(str(spread / "adapter"), device_map=device_map, max_memory=max_memory, **how)


def test_what_comes_next_places_the_model_as_the_run_did(place, tmp_path):
    from dude_peft.training.next_commands import next_commands

    config = RunConfig(**settings(place, tmp_path, SPREAD))
    report: Any = type("Report", (), {"after": None})()
    chat, *_, last = next_commands(config, tmp_path, report)
    assert chat == ["chat", str(tmp_path / "adapter"), *WORDS]
    assert last[0] == "export"
    assert "--device-map" not in last


def test_a_plan_tells_what_is_where(place, tmp_path):
    from dude_peft.planning.run import plan

    how = settings(place, tmp_path / "out", SPREAD)
    away = plan(RunConfig(**how), quiet=True)
    whole = plan(RunConfig(**settings(place, tmp_path / "out", {})), quiet=True)
    weights = away.as_dict()["placement"]
    assert set(weights) == {"cpu", "disk"}
    model = load_model(ModelSection(name_or_path=str(place / "model"), **SPREAD), str(place / "model"))
    assert weights["disk"] == sum(parameter.nbytes for name, parameter in model.named_parameters() if parameter.is_meta)
    assert away.cost.bill.weights == whole.cost.bill.weights - weights["disk"]
    kept = plan(
        RunConfig(**settings(place, tmp_path / "out", SPREAD, train={"gradient_checkpointing": False})), quiet=True
    )
    assert kept.cost.bill.weights == whole.cost.bill.weights  # they stay until the backward
    named = {"device_map": {"": "cpu", "model.layer.1": "disk"}}
    with pytest.raises(ConfigError, match=r"no module 'model\.layer\.1'"):
        plan(RunConfig(**settings(place, tmp_path / "out", named)), quiet=True)


def test_two_runs_in_one_offload_folder_are_told(place, tmp_path):
    from dude_peft.folder.lock import locked_folder

    model = {**SPREAD, "offload_folder": str(tmp_path / "away")}
    told = pytest.raises(BusyError, match=r"model\.offload_folder: .* is in use by process")
    with locked_folder(str(tmp_path / "away"), "model.offload_folder"), told:
        start(place, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="one folder"):
        RunConfig(**settings(place, tmp_path / "away", model))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"torch_compile": True, "gradient_checkpointing": False}}, "train.torch_compile"),
        ({"train": {"trainer": "trl"}}, "train.trainer: trl"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "adapter.modules_to_save"),
        ({"adapter": {"bias": "all"}}, "adapter.bias"),
        (
            {"adapter": {"target_parameters": ["mlp.experts.down_proj"], "lora_dropout": 0.0}},
            "adapter.target_parameters",
        ),
    ],
)
def test_what_does_not_work_is_told_before_the_model_is_loaded(place, tmp_path, monkeypatch, sections, told):
    monkeypatch.setattr("dude_peft.training.loading.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=rf"model\.device_map: {told}") as caught:
        start(place, tmp_path / "out", SPREAD, **sections)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("{max_memory: {cpu: 1GiB}}", "'model.max_memory' has no effect without model.device_map"),
        ("{device_map: cpu, max_memory: {cpu: 1GiB}}", "'model.max_memory' counts with model.device_map: auto"),
        ("{device_map: auto, quantization: nf4}", "a quantised base is on one device"),
        ("{device_map: {'': -1}}", "model.device_map"),
    ],
)
def test_a_map_that_says_nothing_is_refused_when_it_is_read(place, tmp_path, model, told):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {model}\n")
    with pytest.raises(DudeError, match=told):
        load_config(
            path,
            [
                f"model.name_or_path={place / 'model'}",
                "data.train=builtin:word-problems",
                "data.test=0.1",
                f"output_dir={tmp_path / 'out'}",
            ],
        )


def test_what_measurements_are_kept_under_is_the_same_wherever_the_weights_are(place):
    """Pass rates and references of a spread base; reading its weights where they are not would end in a traceback."""
    models = [
        load_model(ModelSection(name_or_path=str(place / "model"), **how), str(place / "model")) for how in ({}, SPREAD)
    ]
    assert offloaded_layers(models[1])
    assert model_fingerprint(models[0]) == model_fingerprint(models[1])


def test_a_head_on_the_disk_is_refused(place, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 2)
    rows, small = {"train": str(pairs), "test": str(pairs)}, {"device_map": "auto", "max_memory": {"cpu": 300_000}}
    with pytest.raises(ResourceError, match=r"model\.device_map: the head 'score' is offloaded"):
        start(place, tmp_path / "out", small, data=rows, train={"objective": "reward"}, evaluation={"enabled": False})


def test_a_map_of_a_module_that_the_model_has_not_is_refused(place, tmp_path):
    for device in ("cpu", "disk"):
        model = {"device_map": {"": "cpu", "model.layer.1": device}}
        with pytest.raises(ConfigError, match=r"no module 'model\.layer\.1'; closest: 'model\.layers\.1'"):
            start(place, tmp_path / "out", model)


def test_embeddings_on_the_disk_are_refused(place, tmp_path):
    with pytest.raises(ResourceError, match=r"model\.device_map: the input embeddings are offloaded"):
        start(place, tmp_path / "out", {"device_map": {"model": "disk", "lm_head": "cpu"}})
