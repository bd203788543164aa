"""Adapted nn.MultiheadAttention: the effective matrices inside torch's own attention, fused or not.

The textbook is the module itself with the effective weights of `core/reference.py`, in float64.
"""

from __future__ import annotations

import copy
import functools
import io
import json

import peft
import pytest
import torch
import transformers as hf
from method_rows import KINDS, RANKED
from models import optimizer_of, perturb
from torch import nn
from torch.utils.checkpoint import checkpoint

import dude_peft
from dude_peft import DudeConfig, load_adapter
from dude_peft.core.reference import reference_direction
from dude_peft.core.weight_rounding import round_weight
from dude_peft.errors import ArtifactError, ConfigError, NumericsError
from dude_peft.methods import METHODS
from dude_peft.tuner.attention import DudeAttention
from dude_peft.tuner.layer import DudeLinear

slow = pytest.mark.slow
each_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in KINDS else slow) for name in RANKED]
)
two_methods = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in ("dude", "lora") else slow) for name in RANKED]
)


class Net(nn.Module):
    """An attention called as it is, and one inside a layer that hands its weights to a fused kernel."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(20, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(20, 4, 30, dropout=0.0, batch_first=True)
        self.head = nn.Linear(20, 7)

    def forward(self, x):
        return self.head(self.block(self.attn(x, x, x)[0]))


NAMES = ["attn", "self_attn"]


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(std=0.5)
    # torch's own products have other bits where a weight wants a gradient.
    return model.to(dtype).eval().requires_grad_(False)


def inputs(dtype=torch.float32):
    return torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(method="dude", dtype=torch.float32, moved=True, **settings):
    defaults = {"r": 3, "lora_alpha": 4, "target_modules": NAMES}
    model = peft.get_peft_model(net(dtype), DudeConfig(method=method, **{**defaults, **settings}))
    if moved:
        perturb(model)
    return model.eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, DudeLinear)]


def outputs(model, dtype=torch.float32):
    with torch.no_grad():
        return model(inputs(dtype))


def textbook(layer, gradient):
    """The effective weight (out, in) as autograd follows it, and what is trained."""
    state, scaling = layer.tensors("default"), layer.scaling["default"]
    W0 = layer.effective_weight([]).double()
    A = state.dA if state.A0 is None else state.A0 + state.dA
    B = state.dB if state.B0 is None else state.B0 + state.dB
    V = reference_direction(W0, A, B, scaling, state.A0, state.B0)
    if state.m0 is None:
        return V, state.learned
    m = state.m0 if state.dm is None else state.m0 + state.dm
    n = V.norm(dim=1) if gradient == "exact" else V.norm(dim=1).detach()
    return (m / n)[:, None] * V, state.learned


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_model_bit_by_bit(method, dtype):
    """Fused in evaluation, unfused in training."""
    base = net(dtype)
    expected, in_training = outputs(base, dtype), outputs(base.train(), dtype)
    model = adapted(method, dtype, moved=False)
    assert [layer.layer_name for layer in layers(model)] == [
        "attn", "attn.base_layer.out_proj", "block.self_attn", "block.self_attn.base_layer.out_proj"
    ]  # fmt: skip
    assert torch.equal(outputs(model, dtype), expected)
    assert torch.equal(outputs(model.train(), dtype), in_training)
    perturb(model)
    assert not torch.equal(outputs(model.eval(), dtype), expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model, dtype), expected)
    plain = model.base_model.unload()
    assert not layers(plain)
    assert torch.equal(outputs(plain, dtype), expected)


@each_method
def test_it_computes_the_textbook(method):
    """torch's functional attention with the effective weights: outputs, and the gradients of all that is trained."""
    if METHODS[method].delta is not None:
        pytest.skip("its L and R are compared in test_delta_methods.py")
    model = adapted(method, torch.float64)
    attn = model.base_model.model.attn
    assert isinstance(attn, DudeAttention)
    assert (attn.shape, attn.out_projection.shape) == ((60, 20), (20, 20))
    x = inputs(torch.float64).requires_grad_()
    weights, learned = zip(*(textbook(layer, METHODS[method].norm_gradient) for layer in layers(attn)), strict=True)
    leaves = [x, *(tensor for tensors in learned for tensor in tensors)]
    twin = copy.deepcopy(net(torch.float64).attn)
    del twin.in_proj_weight, twin.out_proj.weight
    twin.in_proj_weight, twin.out_proj.weight = weights
    mask = torch.tensor([[False] * 4 + [True]] * 3)
    for arguments in ({}, {"key_padding_mask": mask}, {"need_weights": False}):
        found, expected = (module(x, x, x, **arguments)[0] for module in (attn, twin))
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
        dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        pairs = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (found, expected))
        for one, other in zip(*pairs, strict=True):
            assert (one - other).norm() <= 1e-9 * other.norm()


def test_a_magnitude_belongs_to_one_row_of_q_k_or_v():
    model = adapted(moved=False)
    attn, x = model.base_model.model.attn, inputs()
    base = net().attn
    for row in (3, 27, 55):  # of q, k and v
        with torch.no_grad():
            attn.lora_dm["default"].weight.zero_()
            attn.lora_dm["default"].weight[row] = attn.lora_m0["default"][row]
            base.load_state_dict(net().attn.state_dict())
            base.in_proj_weight[row] *= 2
            assert torch.allclose(attn(x, x, x)[0], base(x, x, x)[0], rtol=1e-4, atol=1e-6)


@each_method
def test_fused_and_unfused_are_one_function(method):
    """In evaluation torch hands the weights of the encoder layer to one kernel, which sees no layer of ours."""
    model = adapted(method)
    fused = outputs(model)
    assert not torch.allclose(fused, outputs(net()), atol=1e-3)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert torch.allclose(outputs(model), fused, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(model(inputs()), fused, atol=1e-5)  # with a gradient to come
    with torch.inference_mode():
        assert torch.equal(model(inputs()), fused)
    encoder = nn.TransformerEncoder(model.base_model.model.block, 1).eval()  # which asks for the weights too
    mask = torch.tensor([[False] * 4 + [True]] * 3)
    with torch.no_grad():
        padded = encoder(inputs(), src_key_padding_mask=mask)[:, :4]
        alone = encoder(inputs()[:, :4])
    assert torch.allclose(padded, alone, atol=1e-5)


@two_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_adapter_and_unmerge_restores_every_bit(method, dtype):
    model = adapted(method, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = outputs(model, dtype)
    model.merge_adapter()
    for layer in layers(model):
        assert torch.equal(layer.target().weight, round_weight(layer.effective_weight(["default"]), dtype))
    assert (outputs(model, dtype) - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()
    with model.disable_adapter():
        assert torch.equal(outputs(model, dtype), outputs(net(dtype), dtype))
    model.unmerge_adapter()
    assert torch.equal(outputs(model, dtype), expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = model.merge_and_unload()
    assert type(plain.attn) is nn.MultiheadAttention
    assert plain.state_dict().keys() == net().state_dict().keys()
    assert (outputs(plain, dtype) - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


@two_methods
def test_save_and_load_are_bit_equal(method, tmp_path):
    model = adapted(method, rank_pattern={"attn": 2, "self_attn": 4}, alpha_pattern={r".*self_attn": 9})
    assert [layer.r["default"] for layer in layers(model)] == [2, 2, 4, 4]
    assert {layer.lora_alpha["default"] for layer in layers(model)} == {4, 9}
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(net(), tmp_path)
    assert torch.equal(outputs(loaded), expected)
    assert torch.equal(outputs(load_adapter(net(), tmp_path, low_cpu_mem_usage=True)), expected)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    # PEFT 0.21 adds the change of the output projection twice (its PR 3774): it must not take the file for a LoRA.
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DUDE"
    found = dude_peft.verify(tmp_path)
    assert found.layers == 4
    assert "stock PEFT refuses an adapter of nn.MultiheadAttention" in found.stock_refusal
    for changed in ("attn.in_proj_weight", "attn.out_proj.weight", "attn.in_proj_bias"):
        other = net()
        other.get_parameter(changed).add_(0.01)
        with pytest.raises(ArtifactError, match=r"different base weights|which differs here"):
            load_adapter(other, tmp_path)
    assert not layers(other)


@slow
def test_stock_peft_adds_the_output_projections_change_twice():
    """Once it does not, a file without a magnitude can be a stock one."""
    model = peft.get_peft_model(net(), peft.LoraConfig(r=3, target_modules=["attn"])).eval()
    inside = model.base_model.model.attn.base_layer.out_proj
    with torch.no_grad():
        inside.lora_B["default"].weight.normal_()
    twice = net()
    twice.attn.out_proj.weight += 2 * inside.get_delta_weight("default").detach()
    assert torch.allclose(outputs(model), outputs(twice), atol=1e-4)


@pytest.mark.parametrize("mode", ["detached", pytest.param("exact", marks=slow)])
def test_training_goes_on_from_a_file_bit_by_bit(mode, tmp_path):
    def step(model, optimizer):
        loss = (model(inputs()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model = adapted(norm_gradient=mode, moved=False).train()
    base = {name: p.clone() for name, p in model.named_parameters() if ".lora_" not in name}
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    optimizer = optimizer_of(model)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters() if name in base)
    assert all(bool(tensor.abs().amax() > 0) for layer in layers(model) for tensor in layer.tensors("default").learned)
    model.save_pretrained(tmp_path)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    uninterrupted = [step(model, optimizer) for _ in range(3)]
    resumed = load_adapter(net(), tmp_path, is_trainable=True).train()
    optimizer = optimizer_of(resumed)
    state.seek(0)
    optimizer.load_state_dict(torch.load(state))
    assert [step(resumed, optimizer) for _ in range(3)] == uninterrupted


def test_several_adapters(tmp_path):
    model = adapted(target_modules=["attn"])
    first, base = outputs(model), outputs(net())
    model.add_adapter("second", DudeConfig(method="lora", r=2, target_modules=NAMES))
    assert torch.equal(outputs(model), first)
    model.set_adapter("second")
    assert torch.equal(outputs(model), base)
    perturb(model, seed=5)
    second = outputs(model)
    model.base_model.set_adapter(["default", "second"])
    both = outputs(model)
    model.merge_adapter(["default"])
    assert torch.allclose(outputs(model), both, atol=1e-5)
    model.merge_adapter(["second"])
    assert torch.allclose(outputs(model), both, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(model), both)
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "linear")
    model.set_adapter("sum")
    assert torch.allclose(outputs(model), both, atol=1e-4)
    model.delete_adapter("sum")
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, first), (tmp_path / "second", second)):
        assert torch.equal(outputs(load_adapter(net(), folder)), expected)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(outputs(model), second)


@pytest.mark.parametrize("use_reentrant", [pytest.param(True, marks=slow), False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model, x = adapted().train(), inputs().requires_grad_()
        y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    same = torch.equal
    if use_reentrant:  # its forward is without gradients, for which torch's attention has another kernel
        same = functools.partial(torch.allclose, rtol=1e-4, atol=1e-5)
    assert all(same(a, b) for a, b in zip(*gradients, strict=True))


def test_a_small_gain_arrives_in_bfloat16():
    large = nn.Sequential(nn.MultiheadAttention(256, 4)).bfloat16()
    for layer in layers(peft.get_peft_model(large, DudeConfig(r=3, target_modules=["0"]))):
        W0 = layer.target().weight.double()
        for eps in (1e-4, 1e-3, 1e-2):
            layer.lora_dm["default"].weight.data.copy_(eps * layer.lora_m0["default"])
            delivered = ((layer.in_use().double() - W0) * W0).sum() / W0.square().sum() / eps
            assert 0.9 <= delivered <= 1.1, eps


@slow
def test_a_compiled_model_computes_the_adapter():
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    for seed in (3, 9):
        perturb(model, seed=seed)
        assert torch.allclose(outputs(compiled), outputs(model), atol=1e-5)


@slow
def test_a_transformers_model_with_such_attention(tmp_path):
    """BridgeTower's encoders and SigLIP's pooling head use torch's own attention."""
    config = hf.SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )

    def fresh():
        torch.manual_seed(0)
        return hf.SiglipVisionModel(config).eval().requires_grad_(False)

    def pooled(model):
        with torch.no_grad():
            return model(torch.ones(2, 3, 16, 16)).pooler_output

    model = peft.get_peft_model(fresh(), DudeConfig(r=4, target_modules=["attention"]))
    assert torch.equal(pooled(model), pooled(fresh()))
    perturb(model)
    expected = pooled(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(pooled(load_adapter(fresh(), tmp_path)), expected)
    assert torch.allclose(pooled(model.merge_and_unload()), expected, atol=1e-5)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (lambda: nn.MultiheadAttention(8, 2, kdim=4), {}, "'0' is a MultiheadAttention with kdim or vdim.*PEFT"),
        (lambda: nn.MultiheadAttention(8, 2), {"r": 9}, r"r=9 is more than layer '0' \(out 24, in 8\)"),
        (lambda: nn.MultiheadAttention(8, 2), {"method": "full"}, "which method 'full' does not adapt"),
        (lambda: nn.MultiheadAttention(8, 2), {"lora_dropout": 0.1}, "lora_dropout=0.1 has no meaning for '0'"),
        (lambda: nn.MultiheadAttention(8, 2), {"bias": "all"}, "bias='all' has no meaning for '0'"),
        (lambda: nn.MultiheadAttention(8, 2).to(torch.float8_e4m3fn), {}, "quantised or split weight"),
        (lambda: nn.MultiheadAttention(8, 2), {"target_modules": ["out_proj"]}, "name the attention itself"),
        (lambda: nn.MultiheadAttention(8, 2), {"target_modules": ["in_proj_weight"]}, "name the attention itself"),
        (
            lambda: nn.MultiheadAttention(8, 2),
            {"target_modules": [], "target_parameters": ["in_proj_weight"]},
            "no stack of experts",
        ),
    ],
)
def test_what_an_attention_cannot_have_is_refused_and_leaves_it_alone(make, settings, words):
    attention = make().requires_grad_(False)
    out = attention.out_proj
    with pytest.raises(ConfigError, match=words):
        peft.get_peft_model(nn.Sequential(attention), DudeConfig(**{"r": 2, "target_modules": ["0"], **settings}))
    assert attention.out_proj is out


def test_values_that_are_not_finite_are_named():
    model = net()
    model.attn.out_proj.weight[1, 2] = torch.nan
    with pytest.raises(NumericsError, match=r"'attn.base_layer.out_proj' holds nan at \[1, 2\]"):
        peft.get_peft_model(model, DudeConfig(r=2, target_modules=["attn"]))


def test_all_linear_says_how_to_adapt_it():
    with pytest.warns(UserWarning, match="part of an attention.*list the nn.MultiheadAttention itself"):
        model = peft.get_peft_model(net(), DudeConfig(r=2, target_modules="all-linear"))
    assert [layer.layer_name for layer in layers(model)] == ["block.linear1", "block.linear2", "head"]
