"""PEFT's own pissa + use_dora is the same formula, written by others: in float32 it has to agree with ours.

It overwrites the base weight with W_res = W0 - s B0 A0 and trains A and B themselves; ours keeps W0 and trains the
deviations. Both are moved to the same point, then outputs and every gradient are compared.
"""

from __future__ import annotations

import pytest
import torch
from models import make, tokens
from peft import LoraConfig, get_peft_model

from dude_peft import DudeConfig
from dude_peft.tuner.layer import DudeLinear

BOUND = 1e-5


def pair(architecture, stock_settings, method, dtype=torch.float32):
    """Ours and PEFT's model at the same perturbed point, with their layers by name."""
    settings = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"}
    ours = get_peft_model(make(architecture, dtype), DudeConfig(method=method, svd_tol=0, **settings))
    theirs = get_peft_model(make(architecture, dtype), LoraConfig(**settings, **stock_settings))
    names = {name: module for name, module in ours.named_modules() if isinstance(module, DudeLinear)}
    twins = {name: theirs.get_submodule(name) for name in names}
    generator = torch.Generator().manual_seed(4)

    def noise(t):
        return 0.05 * torch.randn(t.shape, generator=generator)

    with torch.no_grad():
        for name, layer in names.items():
            twin = twins[name]
            state = layer.tensors("default")
            A, B = twin.lora_A["default"].weight, twin.lora_B["default"].weight
            if state.A0 is None:
                A.copy_(state.dA)
            else:
                # Their SVD may have chosen other signs: the product and all that follows from it is the same.
                A.copy_(state.A0)
                B.copy_(state.B0)
            for deviation, factor in ((state.dA, A), (state.dB, B)):
                change = noise(deviation)
                deviation.add_(change)
                factor.add_(change)
            if state.dm is not None:
                change = noise(state.dm)
                state.dm.add_(change)
                twin.lora_magnitude_vector["default"].weight.add_(change)
    return ours, theirs, names, twins


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


def values(layer, x, dy):
    """Output of one layer, then the gradients of its input and of its trained tensors, ours or PEFT's."""
    x = x.clone().requires_grad_()
    y = layer(x)
    if isinstance(layer, DudeLinear):
        trained = [layer.lora_dA, layer.lora_dB, *([layer.lora_dm] if layer.lora_dm else [])]
        leaves = [x, *(group["default"].weight for group in trained)]
    else:
        leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        leaves += [m.weight for m in layer.lora_magnitude_vector.values()]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


METHODS_OF_PEFT = pytest.mark.parametrize(
    ("method", "stock_settings"),
    [
        ("dude", {"use_dora": True, "init_lora_weights": "pissa"}),
        ("pissa", {"init_lora_weights": "pissa"}),
        ("dora", {"use_dora": True}),
        ("lora", {}),
        ("rslora", {"use_rslora": True}),
        ("olora", {"init_lora_weights": "olora"}),
    ],
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["mistral-gqa", "opt-bias", "gpt2-conv1d", "qwen3"])
@METHODS_OF_PEFT
def test_layers_agree_with_stock_peft_in_float32(architecture, method, stock_settings):
    if (method, architecture) == ("olora", "gpt2-conv1d"):
        pytest.skip("PEFT's olora takes a Conv1D's (in, out) weight for (out, in), and makes factors of wrong shapes")
    ours, theirs, names, twins = pair(architecture, stock_settings, method)
    logits = [model(input_ids=tokens()).logits.detach() for model in (ours, theirs)]
    assert relative_error(*logits) <= BOUND
    generator = torch.Generator().manual_seed(8)
    for name, layer in names.items():
        x = torch.randn(2, 5, layer.in_features, generator=generator)
        dy = torch.randn(2, 5, layer.out_features, generator=generator)
        for value, expected in zip(values(layer, x, dy), values(twins[name], x, dy), strict=True):
            assert relative_error(value, expected) <= BOUND, name


@pytest.mark.filterwarnings("ignore")
@METHODS_OF_PEFT
def test_gradients_through_a_whole_model_agree_in_float64(method, stock_settings):
    # PEFT refuses its SVD start in float64; factors and residual are set below anyway.
    stock_settings = {key: value for key, value in stock_settings.items() if key != "init_lora_weights"}
    ours, theirs, names, _ = pair("opt-bias", stock_settings, method, torch.float64)
    for name in names:
        # The same point in PEFT's form: the exact residual as the base, the factors themselves as parameters.
        layer, twin = ours.get_submodule(name), theirs.get_submodule(name)
        state = layer.tensors("default")
        weight = layer.get_base_layer().weight.detach().clone()
        if state.A0 is not None:
            weight -= layer.scaling["default"] * (state.B0 @ state.A0)
        twin.get_base_layer().weight = torch.nn.Parameter(weight, requires_grad=False)
        with torch.no_grad():
            A = state.dA if state.A0 is None else state.A0 + state.dA
            B = state.dB if state.B0 is None else state.B0 + state.dB
            twin.lora_A["default"].weight.copy_(A)
            twin.lora_B["default"].weight.copy_(B)
            if state.dm is not None:
                twin.lora_magnitude_vector["default"].weight.copy_(state.m0 + state.dm)
    for model in (ours, theirs):
        logits = model(input_ids=tokens()).logits
        target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        (logits * target).sum().backward()
    for name in names:
        layer, twin = ours.get_submodule(name), theirs.get_submodule(name)
        pairs = [(layer.lora_dA["default"].weight, twin.lora_A["default"].weight)]
        pairs += [(layer.lora_dB["default"].weight, twin.lora_B["default"].weight)]
        if layer.lora_dm:
            pairs += [(layer.lora_dm["default"].weight, twin.lora_magnitude_vector["default"].weight)]
        for mine, other in pairs:
            assert relative_error(mine.grad, other.grad) <= 1e-10, name
