"""Gains computed together: the same bits as alone, of layers that are there, of one model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import logits, make, perturb
from peft import get_peft_model

from dude_peft import DudeConfig
from dude_peft.core.reference import reference_gain
from dude_peft.methods import METHODS
from dude_peft.tuner import together
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.together import Together

WITH_MAGNITUDE = [name for name, method in METHODS.items() if method.normalised]


def adapted(dtype=torch.float32, architecture="mistral-gqa", **settings):
    settings = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear", **settings}
    model = get_peft_model(make(architecture, dtype), DudeConfig(**settings))
    perturb(model)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DudeLinear)]


def gains(model):
    return [layer._gain_and_slope("default", layer.tensors("default")) for layer in layers_of(model)]


def out_of_date(model):
    return sum(layer.stale("default") is not None for layer in layers_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", WITH_MAGNITUDE)
@pytest.mark.parametrize("at_once", [1 << 18, 1100])
def test_a_gain_has_the_same_bits_alone_and_among_others(method, dtype, at_once, monkeypatch):
    monkeypatch.setattr(together, "_AT_ONCE_ON_CPU", at_once)
    model = adapted(dtype, method=method)
    many = gains(model)
    for layer in layers_of(model):
        layer.join(Together())
        layer.refresh()
    for one, other in zip(many, gains(model), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert not torch.equal(one[0], torch.ones_like(one[0]))


@pytest.mark.parametrize("architecture", ["mistral-gqa", "gpt2-conv1d"])
def test_gains_of_many_are_those_of_the_reference(architecture):
    model = adapted(architecture=architecture)
    gains(model)
    for layer in layers_of(model):
        t = layer.tensors("default")
        W0 = layer.effective_weight([]).double()
        s, A = layer.scaling["default"], t.A0.double() + t.dA.double()
        V = W0 + s * (t.dB.double() @ A + t.B0.double() @ t.dA.double())
        want = reference_gain(W0, V, W0.norm(dim=1) + t.dm)
        assert torch.allclose(layer.gain("default").double(), want, rtol=0, atol=1e-6)


def test_the_first_layer_that_notices_computes_for_its_equals():
    model = adapted()
    count = len(layers_of(model))
    assert out_of_date(model) == count
    first = layers_of(model)[0]
    equals = [layer for layer in layers_of(model) if layer.out_features == first.out_features]
    first.gain("default")
    assert out_of_date(model) == count - len(equals)
    equals[-1].tensors("default").dB.data.mul_(1.5)
    assert out_of_date(model) == count - len(equals) + 1
    assert not torch.equal(equals[-1].gain("default"), first.gain("default"))


def test_another_scaling_is_another_gain():
    model = adapted()
    one, other = layers_of(model)[:2]
    other.set_scale("default", 3.0)
    one.gain("default")
    want = other.gain("default")
    other.join(Together())
    other.refresh()
    assert torch.equal(other.gain("default"), want)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_has_gains_of_its_own(way):
    model = adapted()
    before = logits(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    model.get_submodule("base_model.model.lm_head")  # the model itself lives on
    layers_of(model)[0].refresh()
    perturb(twin, seed=3)
    assert not torch.equal(logits(twin), before)
    assert out_of_date(model) == 1
    assert layers_of(twin)[0]._together is layers_of(twin)[-1]._together is not layers_of(model)[0]._together
    assert torch.equal(logits(model), before)


def test_a_replica_computes_for_itself_alone():
    model = adapted()
    layer = layers_of(model)[0]
    replica = layer._replicate_for_data_parallel()  # what torch's DataParallel makes for each device
    replica._gains = {}
    assert replica._gain_and_slope("default", layer.tensors("default"))[0].shape == (layer.out_features,)
    assert out_of_date(model) == len(layers_of(model))


def test_a_layer_whose_memory_is_not_there_waits():
    model = adapted()
    first, second, third = layers_of(model)[:3]
    for weight, size in ((second.get_base_layer().weight, 0), (third.tensors("default").dB, 0)):
        weight.untyped_storage().resize_(size)  # as FSDP gives the memory of a layer back
    first.gain("default")
    assert "default" not in second._gains
    assert "default" not in third._gains


@pytest.mark.parametrize("left", [0, 7])
@pytest.mark.parametrize("method", ["dude", "edora"])
def test_a_layer_of_which_only_a_share_is_here_waits(method, left):
    model = adapted(method=method)
    first, second = layers_of(model)[:2]
    want = first.gain("default")
    first.refresh()
    frozen = second.get_base_layer().weight
    for tensor in (frozen, *second.tensors("default").learned):  # FSDP1 with use_orig_params, outside of its unit
        tensor.data = tensor.data.flatten()[:left]
    assert torch.equal(first.gain("default"), want)
    assert "default" not in second._gains
