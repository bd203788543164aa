"""Adapters of stacks of experts (`target_parameters`): every expert is a weight of its own, in either layout.

By day one family of each layout and the methods of each kind; the rest runs at night.
"""

from __future__ import annotations

import copy
import io
import json

import peft
import pytest
import torch
from accelerate import cpu_offload
from method_rows import KINDS
from models import STACKED, logits, optimizer_of, perturb, step, tokens
from models import make_stacked as make
from torch import nn

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.stacks import experts_of, to_disk
from dude_peft.core.reference import reference_direction, reference_weight
from dude_peft.core.weight_rounding import round_weight
from dude_peft.errors import ArtifactError, ConfigError, NumericsError
from dude_peft.methods import METHODS
from dude_peft.tuner.experts import DudeExperts
from dude_peft.tuner.stacks import stack_of

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
STACKABLE = [name for name, method in METHODS.items() if method.stackable]
slow = pytest.mark.slow

each_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in KINDS else slow) for name in STACKABLE]
)
two_methods = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in ("dude", "lora") else slow) for name in STACKABLE]
)
# (experts, out, in) of a family without biases; (experts, in, out) of one with them.
each_layout = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("qwen3-moe", "gpt-oss") else slow) for name in STACKED]
)


def config(method="dude", **settings):
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": BOTH}
    return DudeConfig(method=method, **{**defaults, **settings})


def adapted(method="dude", family="qwen3-moe", dtype=torch.float32, moved=True, **settings):
    model = peft.get_peft_model(make(family, dtype), config(method, **settings))
    if moved:
        perturb(model)
    return model.eval()


def stacks(model):
    return [module for module in model.modules() if isinstance(module, DudeExperts)]


def textbook(layer, gradient="detached"):
    """The effective stack as the papers write it, expert by expert, (experts, out, in) float64, and what is trained."""
    state, scaling = layer.tensors("default"), layer.scaling["default"]
    weights = []
    for W0, expert in zip(layer.target().plain_weight, experts_of(state), strict=True):
        A = expert.dA if expert.A0 is None else expert.A0 + expert.dA
        B = expert.dB if expert.B0 is None else expert.B0 + expert.dB
        V = reference_direction(W0, A, B, scaling, expert.A0, expert.B0)
        m = None if expert.m0 is None else expert.m0 if expert.dm is None else expert.m0 + expert.dm
        if m is None:
            weights.append(V)
            continue
        n = V.norm(dim=1)
        n = n if gradient == "exact" else n.detach()
        weights.append((m.double() / n)[:, None] * V)
        assert torch.allclose(weights[-1], reference_weight(W0, V, m), rtol=1e-12)
    return torch.stack(weights), state.learned


@each_method
@each_layout
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow), pytest.param(torch.float16, marks=slow)]
)
def test_the_start_is_the_base_model_bit_by_bit(method, family, dtype):
    base = make(family, dtype)
    expected, in_training = logits(base), logits(base.train())
    model = adapted(method, family, dtype, moved=False)
    assert len(stacks(model)) == 4
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.train()), in_training)
    perturb(model)
    assert not torch.equal(logits(model.eval()), expected)
    with torch.inference_mode():
        assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.base_model.unload()), expected)


@each_method
@each_layout
def test_every_expert_computes_the_textbook(method, family):
    """The effective stack, and the gradients of everything that is trained."""
    model = adapted(method, family, torch.float64)
    gradient = METHODS[method].norm_gradient or "detached"
    for layer in stacks(model)[:2]:
        expected, learned = textbook(layer, gradient)
        found = layer.in_use()
        found = found.mT if layer.target().transposed else found
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
        G = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        for one, other in zip(
            torch.autograd.grad(found, learned, G), torch.autograd.grad(expected, learned, G), strict=True
        ):
            assert (one - other).norm() <= 1e-11 * other.norm()


@each_layout
def test_a_magnitude_belongs_to_an_output_feature_of_one_expert(family):
    """Doubling one magnitude doubles one feature of what one expert makes of its rows, in the family's own code."""
    model = adapted(family=family, moved=False)
    outer = stacks(model)[0]
    assert outer.parameter_name == "down_proj"  # its rows are what the experts put out
    x = torch.randn(12, 48, generator=torch.Generator().manual_seed(0))
    arguments = (x,) if family == "llama4" else (x, torch.tensor([[1]] * 12), torch.ones(12, 1))
    with torch.no_grad():
        bias = getattr(outer, "down_proj_bias", None)
        before = outer(*arguments)
        outer.lora_dm["default"].weight[1, 5] = outer.lora_m0["default"][1, 5]
        after = outer(*arguments)
    rows = slice(3, 6) if family == "llama4" else slice(0, 12)  # Llama 4 gives each expert its own rows, in order
    own = torch.zeros_like(before)
    own[rows, 5] = before[rows, 5] - (0 if bias is None else bias[1, 5])
    assert torch.allclose(after, before + own, rtol=1e-5, atol=1e-6)
    assert own.abs().max() > 1e-3


@two_methods
@each_layout
def test_merge_is_the_adapter_and_unmerge_restores_every_bit(method, family):
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(method, family, dtype)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected, base = logits(model), logits(make(family, dtype))
        model.merge_adapter()
        for layer in stacks(model):
            merged = layer.effective_weight(["default"])
            wanted = torch.stack([round_weight(W, dtype, e * W.shape[0]) for e, W in enumerate(merged)])
            assert torch.equal(layer.target().plain_weight, wanted)
        if dtype == torch.float32:
            assert (logits(model) - expected).norm() <= 2e-6 * expected.norm()
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        if dtype == torch.float32:
            plain = model.merge_and_unload()
            assert not stacks(plain)
            assert plain.state_dict().keys() == make(family).state_dict().keys()
            assert (logits(plain) - expected).norm() <= 2e-6 * expected.norm()


@two_methods
@each_layout
def test_save_and_load_are_bit_equal(method, family, tmp_path):
    settings = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 9}}
    model = adapted(method, family, **settings)
    assert {layer.r["default"] for layer in stacks(model)} == {2, 4}
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make(family), tmp_path)), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "DUDE"  # which stock PEFT has no idea of
    with pytest.raises(ArtifactError, match=r"experts\.down_proj"):
        load_adapter(make(family, seed=1), tmp_path)


@pytest.mark.parametrize("mode", ["detached", pytest.param("exact", marks=slow)])
def test_training_goes_on_from_a_file_bit_by_bit(mode, tmp_path):
    model = peft.get_peft_model(make("qwen3-moe"), config(norm_gradient=mode))
    optimizer = optimizer_of(model)
    losses = [step(model, optimizer) for _ in range(3)]
    model.save_pretrained(tmp_path)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    uninterrupted = [step(model, optimizer) for _ in range(3)]
    assert uninterrupted[-1] < losses[0] - 0.3
    resumed = load_adapter(make("qwen3-moe"), tmp_path, is_trainable=True)
    optimizer = optimizer_of(resumed)
    state.seek(0)
    optimizer.load_state_dict(torch.load(state))
    assert [step(resumed, optimizer) for _ in range(3)] == uninterrupted
    for (name, ours), (_, theirs) in zip(resumed.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_training_moves_only_adapter_parameters():
    model = peft.get_peft_model(make("gpt-oss"), config())
    base = {name: p.clone() for name, p in model.named_parameters() if ".lora_" not in name}
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer)
    after = dict(model.named_parameters())
    assert all(torch.equal(base[name], after[name]) for name in base)
    for layer in stacks(model):
        assert all(bool(tensor.abs().amax() > 0) for tensor in layer.tensors("default").learned)


def test_peft_computes_the_same_with_the_same_factors():
    """PEFT's own LoRA of target_parameters, given our factors, is the same function with the same gradients."""
    for family in ("qwen3-moe", "gpt-oss"):
        settings = {"r": 4, "lora_alpha": 6, "target_modules": [], "target_parameters": BOTH}
        theirs = peft.get_peft_model(make(family), peft.LoraConfig(**settings)).eval()
        ours = peft.get_peft_model(make(family), DudeConfig(method="lora", **settings)).eval()
        perturb(ours)
        wrappers = [module for module in theirs.modules() if type(module).__name__ == "ParamWrapper"]
        assert [each.parameter_name for each in wrappers] == [each.parameter_name for each in stacks(ours)]
        for layer, wrapper in zip(stacks(ours), wrappers, strict=True):
            tensors = to_disk(layer.tensors("default"), layer.scaling["default"])
            wrapper.lora_A["default"].weight.data.copy_(tensors["lora_A.weight"])
            wrapper.lora_B["default"].weight.data.copy_(tensors["lora_B.weight"])
        expected = logits(theirs)
        assert (logits(ours) - expected).norm() <= 2e-6 * expected.norm()
        for model in (ours, theirs):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        for layer, wrapper in zip(stacks(ours), wrappers, strict=True):
            wanted = wrapper.lora_A["default"].weight.grad.view(4, 4, -1)
            assert (layer.lora_dA["default"].weight.grad - wanted).norm() <= 1e-4 * wanted.norm()


def test_several_adapters_of_different_stacks(tmp_path):
    model = adapted(target_parameters=["experts.down_proj"])
    first, base = logits(model), logits(make("qwen3-moe"))
    model.add_adapter("second", config("lora", r=3, target_parameters=BOTH))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), base)
    perturb(model, seed=5)
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(both, first)
    model.merge_adapter(["default"])
    assert torch.allclose(logits(model), both, atol=1e-5)
    model.merge_adapter(["second"])
    assert torch.allclose(logits(model), both, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, first), (tmp_path / "second", second)):
        assert torch.equal(logits(load_adapter(make("qwen3-moe"), folder)), expected)
    with pytest.raises(ConfigError, match="add_weighted_adapter cannot combine"):
        model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)


@pytest.mark.parametrize("use_reentrant", [pytest.param(True, marks=slow), False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = adapted().train()
        if checkpointed:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_small_gain_arrives_in_bfloat16():
    """Rounded to the nearest, a magnitude that moved by 0.1 % would do nothing to a weight of eight bits."""
    model = adapted(dtype=torch.bfloat16, moved=False)
    layer = stacks(model)[0]
    W0 = layer.target().plain_weight.double()
    for eps in (1e-4, 1e-3, 1e-2):
        layer.lora_dm["default"].weight.data.copy_(eps * layer.lora_m0["default"])
        delivered = ((layer.in_use().double() - W0) * W0).sum() / W0.square().sum() / eps
        assert 0.9 <= delivered <= 1.1, eps


@slow
def test_a_compiled_model_computes_the_adapter_as_it_is():
    model = adapted()
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled), expected, atol=1e-6)
    perturb(model, seed=9)  # and never an earlier one
    after = logits(model)
    assert not torch.allclose(after, expected, atol=1e-3)
    assert torch.allclose(logits(compiled), after, atol=1e-6)


def test_a_hooked_module_computes_the_adapter():
    model = adapted()
    expected = logits(model)
    inner = stacks(model)[-1].get_base_layer()
    own, seen = inner.forward, []

    def hooked(*args, **kwargs):  # as accelerate's hooks do, it knows the module and not its twin
        seen.append(type(inner).__name__)
        return own(*args, **kwargs)

    before = inner.down_proj
    inner.forward = hooked
    assert torch.equal(logits(model), expected)
    assert len(seen) == 1
    assert inner.down_proj is before


def test_code_that_reads_a_stack_finds_the_effective_one():
    model = adapted()
    outer = stacks(model)[0]
    for name in ("gate_up_proj", "down_proj"):
        layer = next(one for one in stacks(model) if one.parameter_name == name)
        assert torch.equal(getattr(outer, name), layer.in_use())
    assert outer.num_experts == 4
    with model.disable_adapter():
        assert outer.gate_up_proj is outer.get_base_layer().gate_up_proj
    with pytest.raises(AttributeError, match="no_such"):
        outer.no_such  # noqa: B018


def test_other_methods_of_the_module_compute_the_adapter():
    model = adapted()
    outer, x = stacks(model)[0], torch.ones(1, 48)
    inner = outer
    while isinstance(inner, DudeExperts):
        inner = inner.base_layer

    class Own(type(inner)):
        def first(self, x):
            return x @ self.gate_up_proj[0].T

    inner.__class__ = Own
    assert torch.equal(outer.first(x), x @ outer.gate_up_proj[0].T)
    assert not torch.equal(outer.first(x), inner.first(x))
    with model.disable_adapter():
        assert torch.equal(outer.first(x), inner.first(x))


def test_a_base_that_is_offloaded_is_told(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = cpu_offload(make("qwen3-moe"), execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"not in memory.*load the model without offloading"):
        load_adapter(base, tmp_path)


def test_other_dtypes_and_empty_models(tmp_path):
    model = adapted()
    expected = logits(model)
    assert (
        logits(copy.deepcopy(model).to(torch.bfloat16)).float() - expected
    ).abs().max() <= 0.2 * expected.abs().max()
    kept = {p.dtype for p in adapted(dtype=torch.bfloat16).parameters() if p.requires_grad}
    assert kept == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = load_adapter(make("qwen3-moe"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        base = logits(make("qwen3-moe"))
        assert torch.equal(logits(adapted(moved=False)), base)


def test_experts_of_some_layers_alone(tmp_path):
    model = adapted("lora", layers_to_transform=[1])
    assert {layer.layer_name for layer in stacks(model)} == {f"model.layers.1.mlp.{name}" for name in BOTH}
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make("qwen3-moe"), tmp_path)), expected)
    saved = DudeConfig.from_pretrained(str(tmp_path))
    assert set(saved.stock().target_parameters) == {f"model.layers.1.mlp.{name}" for name in BOTH}
    stock = peft.get_peft_model(make("qwen3-moe"), saved.stock())
    places = [name for name, module in stock.named_modules() if type(module).__name__ == "ParamWrapper"]
    assert len(places) == 2
    assert all("layers.1." in name for name in places)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    for name, tensor in make("qwen3-moe").named_parameters():
        changed = "layers.1" in name and ("experts" in name or "q_proj" in name)
        assert torch.equal(merged.get_parameter(name), tensor) != changed, name


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_parameters": ["experts.up_proj"]}, "'experts.up_proj' is not a parameter of Qwen3Moe.*closest"),
        ({"target_parameters": ["gate.weight"]}, r"'model.layers.0.mlp.gate.weight' of a.*shape \[4, 48\].*no stack"),
        ({"layers_to_transform": [7]}, r"layers_to_transform=\[7\] leaves no stack of target_parameters"),
        ({"r": 33}, "r=33 is more than layer 'model.layers.0.mlp.experts.down_proj'"),
        (
            {"modules_to_save": ["experts"]},
            "is in target_parameters, and its module, by its ending, in modules_to_save",
        ),
    ],
)
def test_what_a_model_cannot_have_is_refused_and_leaves_it_alone(settings, words):
    model = make("qwen3-moe")
    expected, modules = logits(model), [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=words):
        peft.get_peft_model(model, config(**settings))
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_parameters": "experts.down_proj"}, "must be a list of names"),
        ({"target_parameters": [3]}, "must be a list of names"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 has no meaning for experts"),
        ({"bias": "all"}, "bias='all' has no meaning for experts"),
        ({"method": "vera"}, "method 'vera' has no factors A and B for every expert; choose one of dude, "),
        ({"method": "full"}, "method 'full' has no factors"),
    ],
)
def test_settings_that_mean_nothing_for_experts_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        config(**settings)


class Experts(nn.Module):
    """One that does not say which side is which."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return torch.einsum("eoi,bi->bo", self.up_proj, x)


def model_of(experts):
    return nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"experts": experts})["experts"])


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda experts: None, ConfigError, "does not tell which of its sides is the output; set `is_transposed`"),
        (
            lambda experts: setattr(experts, "up_proj", nn.Parameter(torch.zeros(4, 8, 8).byte(), requires_grad=False)),
            ConfigError,
            r"is quantised \(uint8\); load the model unquantised",
        ),
        (
            lambda experts: (setattr(experts, "is_transposed", False), experts.up_proj.data[2, 3, 1].fill_(torch.nan)),
            NumericsError,
            r"'1.up_proj\[2\]' holds nan at \[3, 1\]",
        ),
        (lambda experts: setattr(experts, "_is_expert_parallel", True), ConfigError, "side"),
    ],
)
def test_stacks_that_cannot_be_adapted_are_refused_by_name(change, kind, words):
    experts = Experts()
    change(experts)
    model = model_of(experts)
    with pytest.raises(kind, match=words):
        peft.get_peft_model(model, DudeConfig(r=2, target_modules=[], target_parameters=["1.up_proj"]))
    assert model[1] is experts
    experts.is_transposed = False
    assert stack_of(model, "1.up_proj") is None or kind is not ConfigError or "side" in words


def test_a_zero_expert_starts_as_lora_and_learns():
    experts = Experts()
    experts.is_transposed = False
    experts.up_proj.data[1] = 0
    experts.up_proj.data[2, 3] = 0
    model = model_of(experts)
    x = torch.randn(5, 8)
    expected = model(x)
    adapted = peft.get_peft_model(model, DudeConfig(r=2, target_modules=[], target_parameters=["1.up_proj"]))
    assert torch.equal(adapted(x), expected)
    optimizer = optimizer_of(adapted)
    for _ in range(3):
        loss = adapted(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = adapted.base_model.model[1].in_use()
    assert bool(found.isfinite().all())
    assert bool((found[1] != 0).any())
