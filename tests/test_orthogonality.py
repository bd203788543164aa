"""PEGO's penalty: its value and gradient against whole matrices, and a run in which it is one part of every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from models import make, perturb
from night import some_by_day
from peft import get_peft_model
from safetensors.torch import load_file
from served import dude
from tiny import save_tiny, write_rows

import dude_peft
from dude_peft import DudeConfig
from dude_peft.config.reading import load_config
from dude_peft.core.orthogonality import orthogonality
from dude_peft.core.reference import reference_orthogonality
from dude_peft.errors import ConfigError
from dude_peft.folder.checkpoint import Checkpoints
from dude_peft.machine import processes
from dude_peft.methods import METHODS
from dude_peft.training.orthogonality import Orthogonality
from dude_peft.training.run import run
from dude_peft.tuner import DudeLinear

PAIRED = [name for name, method in METHODS.items() if method.delta is None]
SGD = {"optim": "sgd", "learning_rate": 0.1, "orthogonality": 1.0}
WEIGHTS = "adapter/adapter_model.safetensors"


def changes(layer: DudeLinear, groups: int, trained: list[torch.Tensor]) -> list[torch.Tensor]:
    """The scaled delta weight of every group, as whole matrices in float64."""
    dA, dB = (tensor.double() for tensor in trained)
    A0, B0 = layer.tensors("default").A0, layer.tensors("default").B0
    found = []
    for pairs in torch.arange(len(dA)).tensor_split(groups):
        if A0 is None or B0 is None:
            D = dB[:, pairs] @ dA[pairs]
        else:
            start_A, start_B = A0[pairs].double(), B0[:, pairs].double()
            D = (start_B + dB[:, pairs]) @ (start_A + dA[pairs]) - start_B @ start_A
        found.append(layer.scaling["default"] * D)
    return found


def whole_weight(layer: DudeLinear) -> torch.Tensor:
    weight = layer.get_base_layer().weight.detach()
    return weight.T if type(layer.get_base_layer()).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("architecture", ["mistral-gqa", "gpt2-conv1d"])
@pytest.mark.parametrize("groups", [1, 2, 3, 7])
@pytest.mark.parametrize("method", PAIRED)
def test_value_and_gradient_are_the_textbooks(method, groups, architecture):
    """Also groups of unequal size, and more groups than pairs; away from the start, out != in, s != 1."""
    config = DudeConfig(method=method, r=5, lora_alpha=3, target_modules="all-linear")
    model = get_peft_model(make(architecture, torch.float64), config)
    perturb(model)
    for layer in (module for module in model.modules() if isinstance(module, DudeLinear)):
        trained = [layer.lora_dA["default"].weight, layer.lora_dB["default"].weight]
        wanted = reference_orthogonality(whole_weight(layer), changes(layer, groups, trained))
        found = layer.orthogonality("default", groups)
        for mine, textbook in zip(found, wanted, strict=True):
            assert float(mine.detach()) == pytest.approx(float(textbook.detach()), rel=1e-9)
        slopes, own = (torch.autograd.grad(2 * pair[0] + 3 * pair[1], trained) for pair in (wanted, found))
        for slope, mine in zip(slopes, own, strict=True):
            assert torch.allclose(mine, slope, rtol=1e-8, atol=1e-12)


def test_the_papers_sum_is_bounded():
    """out times the root of ours is at least the sum of absolute values, for each term."""
    torch.manual_seed(0)
    W0, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((9, 6), (2, 6), (9, 2)))
    base, between = orthogonality(W0 @ A.T, None, A, B, None, None, 0.5, 2)
    D = [0.5 * B[:, i : i + 1] @ A[i : i + 1] for i in range(2)]
    assert 9 * (2 * base).sqrt() >= sum((W0 @ each.T).abs().sum() for each in D)
    assert 9 * between.sqrt() >= (D[0] @ D[1].T).abs().sum()


def test_nothing_of_the_weights_size_squared_is_made():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dude_peft.planning.live_bytes import LiveBytes

    with FakeTensorMode():
        out, in_, r = 8192, 4096, 16
        dA, dB = torch.empty(r, in_, requires_grad=True), torch.empty(out, r, requires_grad=True)
        A0, B0 = torch.empty(r, in_), torch.empty(out, r)
        with LiveBytes([]) as live:
            W0_dA = torch.empty(out, r)
            base, between = orthogonality(W0_dA, torch.empty(out, r), dA, dB, A0, B0, 1.0, 4)
            torch.autograd.grad(base + between, (dA, dB))
            assert live.stretch().peak < 16 * 4 * r * (out + in_)


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("orthogonality")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 24)
    return folder


def settings(places: Path, out: Path, *, method: str = "dude", groups: int = 2, **train: object) -> dict:
    return {
        "model": {"name_or_path": str(places / "model")},
        "adapter": {"method": method, "r": 4, "lora_alpha": 6, "groups": groups},
        "data": {"train": str(places / "train.jsonl"), "template": "plain"},
        "train": {
            "learning_rate": 0.01,
            "max_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "orthogonality": 0.01,
            "save_steps": 1,
            **train,
        },
        "evaluation": {"enabled": False},
        "output_dir": str(out),
    }


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, two: Path, atol: float = 0.0) -> bool:
    mine, other = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    assert mine.keys() == other.keys()
    return all(torch.allclose(mine[name], other[name], rtol=0, atol=atol) for name in mine)


@pytest.mark.parametrize(
    "train",
    some_by_day(
        [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {"bf16": True},
         {"gradient_checkpointing": True}, {"trainer": "trl"}, {"max_grad_norm": 0.0}],
        [{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {"bf16": True}],
    ),
    ids=str,
)  # fmt: skip
def test_every_step_has_the_penaltys_gradient_once(places, tmp_path, monkeypatch, train):
    """What is added, against the textbook's gradient of whole matrices, in the step's last micro-batch alone."""
    if train.get("trainer") == "trl":
        pytest.importorskip("trl")
    added = []
    pull = Orthogonality.pull

    def watched(self):
        layers = self._layers
        trained = [[g["default"].weight for g in (layer.lora_dA, layer.lora_dB)] for layer in layers]
        before = [[parameter.grad.clone() for parameter in pair] for pair in trained]
        sums = pull(self)
        totals = [0.0, 0.0]
        for layer, pair, grads in zip(layers, trained, before, strict=True):
            wanted = reference_orthogonality(whole_weight(layer), changes(layer, 2, pair))
            totals = [total + float(value.detach()) for total, value in zip(totals, wanted, strict=True)]
            slopes = torch.autograd.grad(0.01 * sum(wanted), pair)
            for parameter, grad, slope in zip(pair, grads, slopes, strict=True):
                assert torch.allclose(parameter.grad - grad, slope, rtol=1e-4, atol=1e-7)
        found = [float(sums["orthogonality_base"]), float(sums["orthogonality_groups"])]
        assert found == pytest.approx(totals, rel=1e-4, abs=1e-12)
        added.append(found)
        return sums

    monkeypatch.setattr(Orthogonality, "pull", watched)
    dude_peft.train(settings(places, tmp_path / "out", **train))
    logged = [[line["orthogonality_base"], line["orthogonality_groups"]] for line in lines(tmp_path / "out")]
    assert logged == added
    assert len(logged) == 4
    assert logged[0] == [0.0, 0.0]  # the start is the base model
    assert all(value > 0 for value in logged[3])


def test_accumulating_changes_nothing_and_the_penalty_pulls(places, tmp_path):
    dude_peft.train(settings(places, tmp_path / "one", **SGD))
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    dude_peft.train(settings(places, tmp_path / "two", **SGD, **halves))
    assert same(tmp_path / "one", tmp_path / "two", atol=1e-6)
    dude_peft.train(settings(places, tmp_path / "weak", **SGD | {"orthogonality": 1e-9}))
    assert not same(tmp_path / "one", tmp_path / "weak", atol=1e-4)  # so twice the penalty would be seen
    values = [lines(tmp_path / name)[-1]["orthogonality_base"] for name in ("one", "weak")]
    assert 0 < values[0] < values[1]


def test_a_resumed_run_has_the_same_bits_and_lines(places, tmp_path, monkeypatch):
    dude_peft.train(settings(places, tmp_path / "whole", method="lora"))
    wanted, save = settings(places, tmp_path / "cut", method="lora"), Checkpoints.save

    class CutError(Exception):
        pass

    def then_cut(self, step, *args):
        save(self, step, *args)
        if step == 2:
            raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", then_cut)
        with pytest.raises(CutError):
            dude_peft.train(wanted)
    dude_peft.train(wanted)
    assert same(tmp_path / "whole", tmp_path / "cut")
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "memory_bytes")} for line in found]
        for found in (lines(tmp_path / "whole"), lines(tmp_path / "cut"))
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_two_processes_add_it_once(places, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(settings(places, tmp_path / "two", per_device_train_batch_size=2, **SGD)))
    dude_peft.train(settings(places, tmp_path / "one", **SGD))
    done = dude("train", path, "--launch", "ddp", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "one", tmp_path / "two", atol=1e-6)
    for mine, other in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert mine["orthogonality_base"] == pytest.approx(other["orthogonality_base"], rel=1e-4, abs=1e-12)


def test_a_bad_penalty_stops_before_the_step(places, tmp_path):
    wanted = settings(places, tmp_path / "out", orthogonality=1e38, learning_rate=1.0)
    with pytest.raises(dude_peft.errors.NumericsError, match="no step was taken with it"):
        dude_peft.train(wanted)


def test_without_it_there_is_nothing_of_it(places, tmp_path):
    dude_peft.train(settings(places, tmp_path / "out", groups=1, orthogonality=0.0))
    assert not any("orthogonality_base" in line for line in lines(tmp_path / "out"))


@pytest.mark.parametrize(
    ("adapter", "train", "told"),
    [
        ({"groups": 2}, {}, r"adapter\.groups' counts with train\.orthogonality alone"),
        ({"groups": 5, "r": 4}, {"orthogonality": 1}, r"adapter\.groups': 5 groups need a rank of at least 5"),
        ({"groups": 0}, {}, r"adapter\.groups': expected a number >= 1"),
        ({"method": "vera"}, {"orthogonality": 1}, "'vera' trains no factors A and B"),
        ({"method": "edora"}, {"orthogonality": 1}, "'edora' trains no factors A and B"),
        ({}, {"orthogonality": -1}, r"train\.orthogonality': expected a number >= 0"),
    ],
)
def test_what_means_nothing_is_refused(adapter, train, told):
    values = {"model": {"name_or_path": "m"}, "data": {"train": "a.jsonl", "test": "b.jsonl"}, "output_dir": "o"}
    with pytest.raises(ConfigError, match=told) as caught:
        load_config({**values, "adapter": adapter, "train": train}).resolved()
    assert "\n" not in str(caught.value)


def test_split_weights_are_refused(places, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ConfigError, match=r"train\.orthogonality: it needs whole weights, and fsdp2 splits them"):
        run(load_config(settings(places, tmp_path / "out")), strategy="fsdp2", quiet=True)
