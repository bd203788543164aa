"""Bases that are not a plain nn.Linear of their own: quantised, opaque, transposed, shared and tied layers."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from models import logits, make, perturb, tokens
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import Tensor, nn
from torch.nn.functional import linear

from dude_peft import DudeConfig, load_adapter
from dude_peft.core.reference import reference_direction, reference_gain, reference_linear, reference_weight
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.tuner import DudeLinear

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- layers whose weight cannot be read, only applied ---


class Int8Linear(nn.Linear):
    """A stand-in for a quantised layer: int8 and one scale a row, any input dtype."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None)
        weight = dense.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        if dense.bias is not None:
            self.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, (self.weight * self.scale).to(x.dtype), bias)


class ScaledLinear(nn.Linear):
    """A subclass of nn.Linear whose weight is a plain float matrix, but not the one that it applies."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None)
        self.load_state_dict(dense.state_dict())
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, -3 * self.weight, self.bias)


class PackedLinear(nn.Module):
    """No subclass of nn.Linear, no tensor called weight, and strict about the dtype of its input."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        weight = dense.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-6) / 127
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.packed.to(self.scale.dtype) * self.scale).T
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Format:
    """How a model is quantised, and what its layers' weights then are."""

    name: str
    quantise: Callable[[nn.Module], nn.Module]
    weight: Callable[[nn.Module], Tensor]
    needs: str | None = None
    dtype: torch.dtype = torch.float32


def _is_target(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def _replace(model: nn.Module, build: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if _is_target(module, name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, build(module).train(module.training))
    return model


def _bnb_4bit(compute_dtype: torch.dtype | None, quant_type: str = "nf4", nested: bool = True, packs: bool = False):
    def build(dense: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=nested,
            quant_type=quant_type,
        )
        layer.load_state_dict(dense.state_dict())
        if dense.bias is not None:
            layer.bias = nn.Parameter(dense.bias.detach().clone())
        if not packs:
            layer.support_avx512bf16_for_cpu = False
        return layer.to("cpu").requires_grad_(False)

    return lambda model: _replace(model, build)


def _bnb_8bit(model: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    def build(dense: nn.Linear) -> nn.Module:
        layer = Linear8bitLt(
            dense.in_features, dense.out_features, bias=dense.bias is not None, has_fp16_weights=False, threshold=6.0
        )
        layer.load_state_dict(dense.state_dict())
        return layer.to("cpu").requires_grad_(False)

    return _replace(model, build)


def _weight_4bit(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _weight_8bit(layer: nn.Module) -> Tensor:
    CB = layer.weight.data if layer.state.CB is None else layer.state.CB
    SCB = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return CB.double() * SCB.double()[:, None] / 127


def _torchao(make_config: Callable[[], object]):
    def quantise(model: nn.Module) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(model, make_config(), filter_fn=_is_target)
        return model

    return quantise


def _int8_weight_only():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4_in_int8():
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def _int4_weight_only():
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=32)


BF16 = torch.bfloat16
FORMATS = [
    Format("int8", lambda m: _replace(m, Int8Linear), lambda layer: layer.weight.double() * layer.scale.double()),
    Format("scaled", lambda m: _replace(m, ScaledLinear), lambda layer: -3 * layer.weight),
    Format(
        "packed-bf16",
        lambda m: _replace(m, PackedLinear),
        lambda layer: layer.packed.to(layer.scale.dtype) * layer.scale,
        dtype=BF16,
    ),
    Format("bnb-nf4", _bnb_4bit(torch.float32), _weight_4bit, "bitsandbytes"),
    Format("bnb-nf4-bf16", _bnb_4bit(BF16), _weight_4bit, "bitsandbytes", BF16),
    Format("bnb-fp4-bf16-unset", _bnb_4bit(None, "fp4", False), _weight_4bit, "bitsandbytes", BF16),
    Format("bnb-int8", _bnb_8bit, _weight_8bit, "bitsandbytes"),
    Format("torchao-int8", _torchao(_int8_weight_only), lambda layer: layer.weight.dequantize(), "torchao"),
    Format("torchao-int8-bf16", _torchao(_int8_weight_only), lambda layer: layer.weight.dequantize(), "torchao", BF16),
    Format("torchao-intx4", _torchao(_int4_in_int8), lambda layer: layer.weight.dequantize(), "torchao"),
    Format("torchao-int4-bf16", _torchao(_int4_weight_only), lambda layer: layer.weight.dequantize(), "torchao", BF16),
]


# On CPUs with AVX512-BF16, bitsandbytes packs a 4-bit weight in its first forward in eval mode: the scales are rounded
# to bfloat16, and there is no backward any more. FORMATS have that switched off, to be the same on every CPU.
PACKING = Format("bnb-nf4-packing", _bnb_4bit(torch.float32, packs=True), _weight_4bit, "bitsandbytes")


@pytest.fixture(params=FORMATS, ids=lambda f: f.name)
def quantised(request) -> Format:
    """A format whose library is here and whose layers run on this CPU."""
    return _runnable(request.param)


@pytest.fixture(params=[*FORMATS, PACKING], ids=lambda f: f.name)
def quantised_or_packing(request) -> Format:
    return _runnable(request.param)


def _runnable(form: Format) -> Format:
    if form.needs:
        pytest.importorskip(form.needs, reason=f"{form.needs} is not installed; install dude-peft[quant]")
    try:
        logits(form.quantise(_dense(form)).train())
    except (ImportError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"{form.name} does not run on this CPU: {str(error).splitlines()[0]}")
    return form


def _dense(form: Format, seed: int = 0) -> nn.Module:
    model = tiny_llama(attention_bias=True, mlp_bias=True, dtype=form.dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def _base(form: Format, seed: int = 0) -> nn.Module:
    return form.quantise(_dense(form, seed))


def _config(**changes) -> DudeConfig:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return DudeConfig(**{"r": 4, "lora_alpha": 12, "target_modules": targets, **changes})


def _layers(model: nn.Module) -> list[DudeLinear]:
    return [module for module in model.modules() if isinstance(module, DudeLinear)]


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Every stored tensor of the base, those inside tensor subclasses too, under the base model's names."""
    found: dict[str, Tensor] = {}

    def collect(name: str, tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for part in tensor.__tensor_flatten__()[0]:
                collect(f"{name}.{part}", getattr(tensor, part))
        else:
            found[name] = tensor.detach().clone()

    for name, tensor in model.state_dict().items():
        if ".lora_" not in name and isinstance(tensor, Tensor):
            collect(name.replace("base_model.model.", "").replace(".base_layer", ""), tensor)
    return found


def _assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert not [n for n in want if got[n].dtype != want[n].dtype or not torch.equal(got[n], want[n])]


def _input(layer: DudeLinear, dtype: torch.dtype, seed: int = 4) -> Tensor:
    return torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def _own_error(layer: nn.Module, W0: Tensor, x: Tensor) -> float:
    """What the quantised layer's arithmetic loses by itself against float64, and never less than its dtype does."""
    with torch.no_grad():
        y = layer(x)
        want = reference_linear(x, W0, layer.bias, W0.double(), None)
    return max(_relative(y, want), torch.finfo(y.dtype).eps)


@pytest.mark.parametrize("wrapped_in", ["eval", "train"])
def test_the_start_is_the_quantised_base_bit_by_bit(quantised_or_packing, wrapped_in):
    base = _base(quantised_or_packing).train(wrapped_in == "train")
    untouched, stored = copy.deepcopy(base), _stored(base)
    model = get_peft_model(base, _config(lora_dropout=0.3))
    assert len(_layers(model)) == 14
    _assert_same(_stored(model), stored)
    assert torch.equal(logits(model.train()), logits(untouched.train()))
    assert torch.equal(logits(model.eval()), logits(untouched.eval()))
    perturb(model)
    assert not torch.equal(logits(model.eval()), logits(untouched.eval()))
    with model.disable_adapter():
        assert torch.equal(logits(model.eval()), logits(untouched.eval()))


def test_the_start_is_made_from_the_weight_that_the_layer_applies(quantised):
    model = get_peft_model(_base(quantised), _config()).train()
    eps = torch.finfo(quantised.dtype).eps
    for layer in _layers(model):
        base, t, scaling = layer.get_base_layer(), layer.tensors("default"), layer.scaling["default"]
        W0 = quantised.weight(base).double()
        applied = reference_linear(torch.eye(layer.in_features), W0, base.bias, W0, None)
        with torch.no_grad():
            own = base(torch.eye(layer.in_features, dtype=quantised.dtype))
        assert _relative(own, applied) < 4 * eps + 1e-4  # or the test has the wrong weight
        assert _relative(t.m0, W0.norm(dim=1)) < 2 * eps + 1e-5
        S = torch.linalg.svdvals(W0)
        left = (W0 - scaling * (t.B0.double() @ t.A0.double())).norm()
        assert left / S[4:].norm() < 1 + 2e-3  # nothing of rank 4 takes out more
        assert left / W0.norm() < 0.97


@pytest.mark.parametrize("settings", [{}, {"norm_gradient": "exact"}, {"method": "frozen-m"}], ids=str)
def test_outputs_and_gradients_are_the_formula_of_the_dequantised_weight(quantised, settings):
    model = get_peft_model(_base(quantised).train(), _config(**settings)).train()
    perturb(model)
    for layer in _layers(model)[7:]:
        base, t, scaling = layer.get_base_layer(), layer.tensors("default"), layer.scaling["default"]
        W0 = quantised.weight(base)
        x = _input(layer, quantised.dtype)
        bound = 4 * _own_error(base, W0, x)
        x.requires_grad_()
        y = layer(x)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
        (y.double() * weights).sum().backward()

        found = [v for v in (x, t.dA, t.dB, t.dm) if v is not None]
        wanted = [v.detach().double().requires_grad_() for v in found]
        x64, dA, dB, *dm = wanted
        V = reference_direction(W0, t.A0.double() + dA, t.B0.double() + dB, scaling, t.A0, t.B0)
        m = sum(dm, W0.double().norm(dim=1))
        want = reference_linear(x64, W0, base.bias, V, m, model.peft_config["default"].norm_gradient)
        (want * weights).sum().backward()

        assert y.dtype == quantised.dtype
        assert _relative(y.detach(), want.detach()) < bound
        with torch.no_grad():
            moved = _relative(base(x), want)
        assert moved > 10 * bound
        for got, reference in zip(found, wanted, strict=True):
            assert _relative(got.grad, reference.grad) < 3 * bound


def test_gradients_reach_only_the_adapter_and_a_step_leaves_the_base(quantised):
    model = get_peft_model(_base(quantised).train(), _config()).train()
    stored = _stored(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids = tokens()
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
        assert all(p.grad.abs().max() > 0 for p in trained.values())
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    _assert_same(_stored(model), stored)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_save_and_load_on_the_same_base_bit_by_bit(quantised, tmp_path, is_trainable):
    model = get_peft_model(_base(quantised).train(), _config()).train()
    logits(model)  # a layer that keeps something of its first forward keeps it from training
    perturb(model)
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert all(".lora_" in name for name in load_file(tmp_path / WEIGHTS))
    loaded = load_adapter(_base(quantised), tmp_path, is_trainable=is_trainable)
    assert torch.equal(logits(loaded.train()), want)
    # A model that was never in train mode: what it computes depends on the files alone.
    again = load_adapter(_base(quantised), tmp_path)
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_saving_after_an_evaluation_still_names_the_base(quantised_or_packing, tmp_path):
    model = get_peft_model(_base(quantised_or_packing).train(), _config()).train()
    perturb(model)
    want = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = load_adapter(_base(quantised_or_packing), tmp_path)
    # Packing rounds the scales anew every time the weight is unpacked to be saved.
    atol = 2e-3 if quantised_or_packing is PACKING else 0
    torch.testing.assert_close(logits(loaded.eval()), want, rtol=0, atol=atol)


def test_another_base_is_refused(quantised, tmp_path):
    model = get_peft_model(_base(quantised).train(), _config())
    model.save_pretrained(tmp_path)
    for other in (_base(quantised, seed=7), _dense(quantised)):
        with pytest.raises(ArtifactError, match="different base weights: 14 of 14") as caught:
            load_adapter(other, tmp_path)
        assert "\n" not in str(caught.value)


def test_a_merge_is_refused_in_one_line(quantised):
    model = get_peft_model(_base(quantised).train(), _config()).train()
    perturb(model)
    stored, want = _stored(model), logits(model)
    layer = _layers(model)[3]
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(ConfigError, match="cannot be merged into; load the base model unquantised") as caught:
            merge()
        assert "\n" not in str(caught.value)
        assert type(layer.get_base_layer()).__name__ in str(caught.value)
        assert not layer.merged
    _assert_same(_stored(model), stored)
    assert torch.equal(logits(model), want)
    bare = model.unload()
    assert not _layers(bare)
    assert torch.equal(logits(bare.train()), logits(_base(quantised).train()))


def test_a_gain_leaves_the_frozen_layer_to_other_threads(quantised):
    """Its product is taken without the bias and as in training; another thread's forward may be in the same layer."""
    model = get_peft_model(_base(quantised), _config())
    perturb(model)
    layers, seen = _layers(model.eval()), []
    placed = [layer.get_base_layer() for layer in layers]
    expected, biases = logits(model), [layer.bias for layer in placed]

    def look(*_) -> None:
        seen.append(all(a.bias is b and not a.training for a, b in zip(placed, biases, strict=True)))

    for layer in placed:
        layer.register_forward_hook(look)
    for layer in layers:
        layer.refresh()
        layer.gain("default")
    assert len(seen) >= len(layers)
    assert all(seen)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("bias", [1.0, 30.0])
def test_a_large_bias_does_not_reach_the_start_or_the_gain(quantised, bias):
    # Qwen2's key biases are in the hundreds; a bfloat16 layer that adds them has lost the product.
    torch.manual_seed(0)
    dense = nn.Linear(64, 32, dtype=quantised.dtype)
    nn.init.normal_(dense.weight, std=0.05)
    nn.init.normal_(dense.bias, std=bias)
    model = get_peft_model(quantised.quantise(nn.Sequential(dense)).train(), _config(target_modules=["0"])).train()
    perturb(model, scale=0.01)
    (layer,) = _layers(model)
    t, scaling = layer.tensors("default"), layer.scaling["default"]
    W0 = quantised.weight(layer.get_base_layer()).double()
    V = reference_direction(W0, t.A0.double() + t.dA, t.B0.double() + t.dB, scaling, t.A0, t.B0)
    want = reference_gain(W0, V, W0.norm(dim=1) + t.dm)
    with torch.no_grad():
        assert _relative(t.m0, W0.norm(dim=1)) < 4 * torch.finfo(quantised.dtype).eps + 1e-5
        error = (layer.gain("default").double() - want).abs().max() / (want - 1).abs().max()
    assert error < 4 * torch.finfo(quantised.dtype).eps + 1e-3


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_qlora_as_transformers_loads_it(tmp_path, how):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; install dude-peft[quant]")
    options = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }[how]
    tiny_llama().save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        return hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            quantization_config=hf.BitsAndBytesConfig(**options),
            dtype=torch.float32,
            device_map="cpu",
        )

    want = logits(load().train())
    base = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, _config(lora_dropout=0.2)).train()
    assert torch.equal(logits(model), want)
    stored, ids = _stored(model), tokens()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad.abs().max() > 0 for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    _assert_same(_stored(model), stored)
    model.save_pretrained(tmp_path / "adapter")
    loaded = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    loaded = load_adapter(loaded, tmp_path / "adapter")
    with torch.no_grad():
        for own, other in zip(_layers(model), _layers(loaded), strict=True):
            x = _input(own, torch.float32)
            own.lora_dropout["default"].p = other.lora_dropout["default"].p = 0.0
            assert torch.equal(own.train()(x), other.train()(x))


# --- layers that are refused ---


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("targets", [["out_proj"], ["out_proj", "head"], r"attention\.out_proj"])
def test_the_projection_inside_multihead_attention_is_refused(targets):
    model = _Attention()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ConfigError, match=r"'attention\.out_proj' is a part of.* name the attention itself, 'attention'"
    ) as caught:
        get_peft_model(model, DudeConfig(r=2, target_modules=targets))
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_layers_beside_multihead_attention_can_be_adapted():
    model = get_peft_model(_Attention(), DudeConfig(r=2, target_modules=["head"]))
    assert [layer.layer_name for layer in _layers(model)] == ["head"]


# --- GPT-2's Conv1D keeps its weight as (in, out) ---


def test_conv1d_is_the_formula_of_its_transposed_weight(tmp_path):
    config = {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "lora_alpha": 12}
    base = make("gpt2-conv1d")
    assert base.transformer.h[0].attn.c_attn.weight.shape == (48, 144)
    model = get_peft_model(base, DudeConfig(**config, lora_dropout=0.3))
    assert len(_layers(model)) == 8
    assert torch.equal(logits(model.train()), logits(make("gpt2-conv1d").train()))
    perturb(model)
    model.eval()
    for layer in _layers(model):
        conv, t = layer.get_base_layer(), layer.tensors("default")
        W0 = conv.weight.T
        V = reference_direction(W0, t.A0 + t.dA, t.B0 + t.dB, layer.scaling["default"], t.A0, t.B0)
        m = W0.double().norm(dim=1) + t.dm
        x = _input(layer, torch.float32)
        with torch.no_grad():
            assert _relative(layer(x), reference_linear(x, W0, conv.bias, V, m)) < 1e-5
            assert _relative(layer.effective_weight(), reference_weight(W0, V, m)) < 1e-5
    want, weights = logits(model), {id(layer): layer.get_base_layer().weight for layer in _layers(model)}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make("gpt2-conv1d"), tmp_path).eval()), want)
    stock = PeftModel.from_pretrained(make("gpt2-conv1d"), tmp_path).eval()
    torch.testing.assert_close(logits(stock), want, rtol=0, atol=2e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=0, atol=2e-5)
    assert not torch.equal(logits(model), logits(make("gpt2-conv1d")))
    model.unmerge_adapter()
    assert all(layer.get_base_layer().weight is weights[id(layer)] for layer in _layers(model))
    assert torch.equal(logits(model), want)


# --- one layer object, or one weight, in several places ---


class _Shared(nn.Module):
    """`second` is the very object `first`; `fourth` is a layer of its own over `third`'s weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 12)
        self.inner = nn.ModuleDict({"second": self.first})
        self.third, self.fourth = nn.Linear(12, 12), nn.Linear(12, 12)
        self.fourth.weight = self.third.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.inner["second"], self.third, self.fourth):
            x = torch.tanh(layer(x))
        return x


def _shared_model(targets: list[str]) -> tuple[_Shared, PeftModel, Tensor]:
    base = _Shared()
    model = get_peft_model(base, DudeConfig(r=3, lora_alpha=9, target_modules=targets, lora_dropout=0.2))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.train()(x), _Shared()(x))
    perturb(model)
    return base, model.eval(), x


def _load_in_silence(base: nn.Module, folder) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_adapter(base, folder)


@torch.no_grad()
def test_a_layer_object_in_two_places_is_adapted_in_both(tmp_path):
    base, model, x = _shared_model(["first"])
    layer = base.first
    assert isinstance(layer, DudeLinear)
    assert base.inner["second"] is layer
    t = layer.tensors("default")
    W0, bias = layer.get_base_layer().weight, layer.get_base_layer().bias
    V = reference_direction(W0, t.A0 + t.dA, t.B0 + t.dB, layer.scaling["default"], t.A0, t.B0)
    m = W0.double().norm(dim=1) + t.dm
    h = x.double()
    for _ in range(2):
        h = torch.tanh(reference_linear(h, W0, bias, V, m))
    want = torch.tanh(base.fourth.double()(torch.tanh(base.third.double()(h))))
    base.float()
    got = model(x)
    assert _relative(got, want) < 1e-5
    assert model.get_nb_trainable_parameters()[0] == 3 * 24 + 12

    model.save_pretrained(tmp_path)
    assert all(".first." in name for name in load_file(tmp_path / WEIGHTS))
    assert torch.equal(_load_in_silence(_Shared(), tmp_path)(x), got)
    model.merge_adapter()
    torch.testing.assert_close(model(x), got, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(model(x), got)
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear
    assert merged.inner["second"] is merged.first
    torch.testing.assert_close(merged(x), got, rtol=0, atol=1e-6)


@torch.no_grad()
def test_unloading_a_shared_layer_object_frees_both_places():
    _, model, x = _shared_model(["first"])
    bare = model.unload()
    assert type(bare.first) is nn.Linear
    assert bare.inner["second"] is bare.first
    assert torch.equal(bare(x), _Shared()(x))


@torch.no_grad()
@pytest.mark.parametrize("targets", [["third"], ["third", "fourth"]])
def test_two_layers_over_one_weight_keep_adapters_of_their_own(tmp_path, targets):
    base, model, x = _shared_model(targets)
    weight = base.third.get_base_layer().weight
    original = weight.clone()
    fourth = base.fourth.get_base_layer() if "fourth" in targets else base.fourth
    assert fourth.weight is weight
    want = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(_load_in_silence(_Shared(), tmp_path)(x), want)
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-6)
    assert torch.equal(weight, original)
    assert (fourth.weight is weight) == (targets == ["third"])
    model.unmerge_adapter()
    assert base.third.get_base_layer().weight is weight
    assert fourth.weight is weight
    assert torch.equal(model(x), want)
    torch.testing.assert_close(model.merge_and_unload()(x), want, rtol=0, atol=1e-6)


# --- tied embeddings, with the output layer targeted ---


def _tied() -> nn.Module:
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["dude", "lora"])
def test_a_tied_output_layer(tmp_path, method):
    base = _tied()
    embedding = base.model.embed_tokens
    weight, original = embedding.weight, embedding.weight.clone()
    config = DudeConfig(method=method, r=4, lora_alpha=12, target_modules=["lm_head", "q_proj"], lora_dropout=0.2)
    model = get_peft_model(base, config)
    assert [layer.layer_name for layer in _layers(model)][-1] == "lm_head"
    assert torch.equal(logits(model.train()), logits(_tied()))
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert weight.grad is None
    assert base.lm_head.tensors("default").dB.grad.abs().max() > 0
    perturb(model)
    want = logits(model.eval())
    assert (want - logits(_tied())).abs().max() > 0.1

    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert all(".lora_" in name for name in tensors)
    assert not any(tensor.shape == original.shape for tensor in tensors.values())
    assert torch.equal(logits(load_adapter(_tied(), tmp_path / "adapter").eval()), want)
    stock = PeftModel.from_pretrained(_tied(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(stock), want, rtol=0, atol=2e-5)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=0, atol=2e-5)
    assert embedding.weight is weight
    assert torch.equal(weight, original)
    model.unmerge_adapter()
    assert base.lm_head.get_base_layer().weight is weight
    assert torch.equal(logits(model), want)

    merged = model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, original)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(reloaded.model.embed_tokens.weight, original)
    torch.testing.assert_close(logits(reloaded), want, rtol=0, atol=2e-5)
    del stock, reloaded
    gc.collect()


def test_accelerates_hooks_on_every_layer_change_nothing():
    """`device_map` puts its own forward on the layers: they are called then, and are the same plain weights."""
    from accelerate.hooks import attach_execution_device_hook

    outputs, prints = [], []
    for hooked in (False, True):
        model = make("llama")
        if hooked:
            attach_execution_device_hook(model, "cpu")
        model = get_peft_model(model, DudeConfig(r=4, target_modules="all-linear"))
        perturb(model)
        outputs.append(logits(model))
        prints.append([m.base_fingerprint() for m in model.modules() if isinstance(m, DudeLinear)])
    assert torch.equal(*outputs)
    assert prints[0] == prints[1]
