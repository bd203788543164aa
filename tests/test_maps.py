"""Adapted embeddings and convolutions: the linear layer's adapter on other linear maps.

The textbook is the map itself with the effective weight of `core/reference.py`, in float64; stock PEFT reads the files.
"""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import torch
import transformers as hf
from method_rows import KINDS, RANKED
from models import logits, make, perturb, tokens
from torch import nn
from torch.nn.functional import embedding, relu
from torch.utils.flop_counter import FlopCounterMode

from dude_peft import DudeConfig, load_adapter
from dude_peft.core.reference import reference_direction, reference_weight
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.methods import METHODS
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.mapped import DudeConv, DudeEmbedding

slow = pytest.mark.slow
each_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in KINDS else slow) for name in RANKED]
)
two_methods = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in ("dude", "lora") else slow) for name in RANKED]
)
# What PEFT computes with, and what it does not: its low-rank convolution has no dilation and other groups.
GEOMETRIES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "reflected": {"padding": "same", "padding_mode": "circular"},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "bias": False},
    "depthwise": {"groups": 6, "padding": 1},
}
each_geometry = pytest.mark.parametrize(
    ("dim", "geometry"),
    [
        pytest.param(dim, name, marks=() if dim == 2 or name == "plain" else slow)
        for dim, name in itertools.product((1, 2, 3), GEOMETRIES)
    ],
)


class Net(nn.Module):
    """A convolution, something behind it that writes in place, and a 1 x 1 convolution."""

    def __init__(self, dim, geometry):
        super().__init__()
        kind = getattr(nn, f"Conv{dim}d")
        self.conv = kind(6, 12, 3, **GEOMETRIES[geometry])
        self.act = nn.ReLU(inplace=True)
        self.last = kind(12, 5, 1)

    def forward(self, x):
        return self.last(self.act(self.conv(x)))


def net(dim=2, geometry="plain", dtype=torch.float32):
    torch.manual_seed(0)
    return Net(dim, geometry).to(dtype)


def images(dim=2, dtype=torch.float32):
    return torch.randn(2, 6, *[7] * dim, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(method="dude", dim=2, geometry="plain", dtype=torch.float32, moved=True, **settings):
    config = DudeConfig(method=method, r=3, lora_alpha=4, target_modules=["conv", "last"], **settings)
    model = peft.get_peft_model(net(dim, geometry, dtype), config)
    if moved:
        perturb(model)
    return model.eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, DudeLinear)]


def textbook(layer, gradient):
    """The effective weight (out, in), as autograd follows it, and what is trained."""
    state, scaling = layer.tensors("default"), layer.scaling["default"]
    W0 = layer.effective_weight([]).double()
    A = state.dA if state.A0 is None else state.A0 + state.dA
    B = state.dB if state.B0 is None else state.B0 + state.dB
    V = reference_direction(W0, A, B, scaling, state.A0, state.B0)
    if state.m0 is None:
        return V, state.learned
    m = state.m0 if state.dm is None else state.m0 + state.dm
    n = V.norm(dim=1) if gradient == "exact" else V.norm(dim=1).detach()
    assert torch.allclose((m / n)[:, None] * V, reference_weight(W0, V, m), rtol=1e-12)
    return (m / n)[:, None] * V, state.learned


def check_textbook(found, expected, leaves):
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pairs = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (found, expected))
    for one, other in zip(*pairs, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()


# --- convolutions --------------------------------------------------------------------------------------------------


@each_method
@each_geometry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_starts_as_the_base_bit_by_bit(method, dim, geometry, dtype):
    x = images(dim, dtype)
    expected = net(dim, geometry, dtype)(x)
    model = adapted(method, dim, geometry, dtype, moved=False, lora_dropout=0.1)
    assert torch.equal(model.train()(x), expected)
    assert torch.equal(model.eval()(x), expected)
    perturb(model)
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model.base_model.unload()(x), expected)


@each_method
@each_geometry
def test_a_convolution_computes_the_textbook(method, dim, geometry):
    if METHODS[method].delta is not None:
        pytest.skip("its L and R are compared in test_delta_methods.py")
    model = adapted(method, dim, geometry, torch.float64)
    layer = model.base_model.model.conv
    assert isinstance(layer, DudeConv)
    weight, learned = textbook(layer, METHODS[method].norm_gradient)
    base = layer.get_base_layer()
    x = images(dim, torch.float64).requires_grad_()
    expected = base._conv_forward(x, weight.view(base.weight.shape), base.bias)
    check_textbook(layer(x), expected, [x, *learned])
    behind = relu(layer(x), inplace=True)  # as residual networks do
    wanted = relu(expected)
    check_textbook(behind, wanted, [x, *learned])


@two_methods
@each_geometry
def test_a_convolution_merges_and_comes_back(method, dim, geometry):
    x = images(dim)
    model = adapted(method, dim, geometry)
    expected = model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert (model(x) - expected).norm() <= 1e-5 * expected.norm()
    with model.disable_adapter():
        assert torch.equal(model(x), net(dim, geometry)(x))
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plain = model.merge_and_unload()
    assert (plain(x) - expected).norm() <= 1e-5 * expected.norm()
    assert plain.state_dict().keys() == net(dim, geometry).state_dict().keys()


@two_methods
@each_geometry
def test_stock_peft_computes_a_saved_convolution_or_refuses_it(method, dim, geometry, tmp_path):
    x = images(dim)
    model = adapted(method, dim, geometry)
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(net(dim, geometry), tmp_path)(x), expected)
    if geometry in ("plain", "strided"):
        stock = peft.PeftModel.from_pretrained(net(dim, geometry), tmp_path)
        assert not layers(stock)
        assert (stock(x) - expected).norm() <= 1e-5 * expected.norm()
    else:
        with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|divisible by groups"):
            peft.PeftModel.from_pretrained(net(dim, geometry), tmp_path)


def test_pefts_lora_of_a_convolution_has_the_same_effect():
    """The same factors in PEFT's LoRA: the same outputs, and the same gradients in its layout."""
    ours = adapted("lora")
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=3, lora_alpha=4, target_modules=["conv", "last"]))
    for name in ("conv", "last"):
        one, other = getattr(ours.base_model.model, name), getattr(theirs.base_model.model, name)
        for part, factor in (("lora_dA", "lora_A"), ("lora_dB", "lora_B")):
            weight = getattr(other, factor)["default"].weight
            weight.data.copy_(getattr(one, part)["default"].weight.view(weight.shape))
    assert torch.allclose(ours(images()), theirs(images()), atol=1e-5)
    for model in (ours, theirs):
        model(images()).square().sum().backward()
    found = ours.base_model.model.conv.lora_dA["default"].weight.grad
    wanted = theirs.base_model.model.conv.lora_A["default"].weight.grad.flatten(1)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_small_gain_of_a_channel_arrives_in_bfloat16():
    x = torch.randn(4, 6, 64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    model = adapted(dtype=torch.bfloat16, moved=False)
    layer = model.base_model.model.conv
    base = layer.get_base_layer()(x).double()
    bias = layer.get_base_layer().bias.double()[None, :, None, None]
    for eps in (1e-3, 1e-2):
        layer.lora_dm["default"].weight.data.copy_(eps * layer.lora_m0["default"])
        delivered = ((layer(x).double() - base) * (base - bias)).sum() / (base - bias).square().sum() / eps
        assert 0.9 <= delivered <= 1.1, eps


def test_many_groups_cost_no_multiple_of_the_base():
    """As in Mamba and conformers each channel is a group: r low-rank channels of each would be r times the layer."""
    conv = nn.Sequential(nn.Conv1d(256, 256, 4, groups=256))
    x = torch.randn(1, 256, 64)

    def operations(model):
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    base = operations(copy.deepcopy(conv))
    model = peft.get_peft_model(conv, DudeConfig(r=4, target_modules=["0"]))
    perturb(model)
    assert operations(model) <= 3 * base


@slow
def test_vision_models_train_their_convolutions(tmp_path):
    config = hf.ConvNextConfig(num_channels=3, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_labels=3)

    def fresh():
        torch.manual_seed(0)
        return hf.ConvNextForImageClassification(config).eval()

    settings = {
        "target_modules": r".*(patch_embeddings|dwconv|downsampling_layer\.1)",
        "modules_to_save": ["classifier"],
    }
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    model = peft.get_peft_model(fresh(), DudeConfig(r=4, **settings))
    assert torch.equal(model(x).logits, fresh()(x).logits)
    assert {type(layer) for layer in layers(model)} == {DudeConv}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(x, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(fresh(), tmp_path)(x).logits, model(x).logits)
    assert torch.equal(copy.deepcopy(model)(x).logits, model(x).logits)
    with pytest.raises(ArtifactError, match=r"different base weights|shape"):
        load_adapter(hf.ConvNextForImageClassification(config), tmp_path)


def test_a_model_may_ask_an_adapted_layer_for_its_geometry():
    """Whisper asks for the strides of its convolutions in every forward, FSMT for the width of its embedding."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8}
    ids = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = hf.WhisperModel(hf.WhisperConfig(**sizes, **ids, max_source_positions=10)).eval()
    x, said = torch.randn(1, 8, 20), torch.tensor([[1, 4]])
    expected = whisper(x, decoder_input_ids=said).last_hidden_state
    model = peft.get_peft_model(whisper, DudeConfig(r=4, target_modules=["conv1", "conv2"]))
    assert torch.equal(model(x, decoder_input_ids=said).last_hidden_state, expected)
    perturb(model)
    assert not torch.equal(model(x, decoder_input_ids=said).last_hidden_state, expected)
    layer = layers(embedded())[0]
    assert (layer.embedding_dim, layer.num_embeddings, layer.padding_idx) == (48, 96, 0)
    with pytest.raises(AttributeError, match="kernel_size"):
        layer.kernel_size  # noqa: B018


# --- embeddings ----------------------------------------------------------------------------------------------------


def embedded(method="dude", architecture="mistral-gqa", dtype=torch.float32, moved=True, **settings):
    config = DudeConfig(method=method, r=3, lora_alpha=4, target_modules=["embed_tokens", "q_proj"], **settings)
    model = peft.get_peft_model(make(architecture, dtype), config)
    if moved:
        perturb(model)
    return model.eval()


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_starts_as_the_base_bit_by_bit(method, dtype):
    expected = logits(make("mistral-gqa", dtype))
    model = embedded(method, dtype=dtype, moved=False, lora_dropout=0.1)
    assert sum(isinstance(layer, DudeEmbedding) for layer in layers(model)) == 1
    assert torch.equal(logits(model.train()), expected)
    perturb(model)
    assert not torch.equal(logits(model.eval()), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@each_method
def test_an_embedding_computes_the_textbook(method):
    """A look-up in the effective weight, one magnitude an embedding dimension; the padding token trains no column."""
    if METHODS[method].delta is not None:
        pytest.skip("its L and R are compared in test_delta_methods.py")
    model = embedded(method, dtype=torch.float64)
    layer = next(layer for layer in layers(model) if isinstance(layer, DudeEmbedding))
    assert layer.shape == (48, 96)
    if layer.lora_m0:
        assert layer.lora_m0["default"].shape == (48,)
        weight = layer.get_base_layer().weight
        assert torch.allclose(layer.lora_m0["default"], weight.norm(dim=0), rtol=1e-12)
    weight, learned = textbook(layer, METHODS[method].norm_gradient)
    ids = tokens()
    check_textbook(layer(ids), embedding(ids, weight.T), learned)
    layer(torch.tensor([[0, 5]])).sum().backward()  # 0 is the padding token
    gradient = layer.lora_dA["default"].weight.grad
    if METHODS[method].normalised and METHODS[method].norm_gradient == "exact":
        return  # through the norm every token counts
    assert not gradient[:, 0].any()
    assert gradient[:, 5].any()


@two_methods
def test_an_embedding_merges_and_is_a_stock_adapter(method, tmp_path):
    model = embedded(method)
    expected = logits(model)
    model.merge_adapter()
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make("mistral-gqa"), tmp_path)), expected)
    stock = peft.PeftModel.from_pretrained(make("mistral-gqa"), tmp_path)
    assert not layers(stock)
    assert (logits(stock) - expected).norm() <= 1e-5 * expected.norm()


@slow
def test_a_scaled_embedding_is_adapted_with_its_scale(tmp_path):
    config = hf.Gemma3TextConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=False, sliding_window=16, pad_token_id=0,
    )  # fmt: skip

    def fresh():
        torch.manual_seed(0)
        return hf.Gemma3ForCausalLM(config).eval()

    model = peft.get_peft_model(fresh(), DudeConfig(r=3, target_modules=["embed_tokens"]))
    assert torch.equal(logits(model), logits(fresh()))
    perturb(model)
    expected = logits(model)
    model.merge_adapter()
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(fresh(), tmp_path)), expected)


@pytest.mark.parametrize("use_reentrant", [pytest.param(True, marks=slow), False])
def test_gradient_checkpointing_changes_nothing_behind_an_embedding(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = embedded(lora_dropout=0.1).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_several_adapters_of_maps():
    model = adapted()
    first, x = model(images()), images()
    model.add_adapter("second", DudeConfig(method="lora", r=2, target_modules=["conv"]))
    assert torch.equal(model(x), first)
    model.set_adapter("second")
    assert torch.equal(model(x), net()(x))
    perturb(model, seed=5)
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    model.merge_adapter(["default"])
    assert torch.allclose(model(x), both, atol=1e-5)
    model.merge_adapter(["second"])
    assert torch.allclose(model(x), both, atol=1e-5)
    model.unmerge_adapter()
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "linear")
    model.set_adapter("sum")
    assert torch.allclose(model(x), net()(x) + (both - net()(x)), atol=1e-4)


@slow
def test_compiled_maps_compute_the_adapter():
    for model, call in ((adapted(), lambda m: m(images())), (embedded(), logits)):
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(call(compiled), call(model), atol=1e-5)
        perturb(model, seed=9)
        assert torch.allclose(call(compiled), call(model), atol=1e-5)


# --- refusals ------------------------------------------------------------------------------------------------------


def of(layer):
    return nn.Sequential(layer)


class Standardised(nn.Conv2d):
    """As those of BiT: its weight is changed on the way."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: nn.Embedding(9, 8, max_norm=1.0), "Embedding with max_norm, which writes into the frozen weight"),
        (lambda: nn.Embedding(9, 8, sparse=True), "Embedding with sparse gradients"),
        (lambda: Standardised(4, 8, 3), "Standardised, whose forward is not a convolution"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)),
            "more tensors than weight and bias|quantised",
        ),
        (lambda: nn.ConvTranspose2d(4, 8, 3), "ConvTranspose2d, which is not a linear layer"),
        (lambda: nn.EmbeddingBag(9, 8), "EmbeddingBag, which is not a linear layer"),
    ],
)
def test_what_is_no_plain_map_is_refused_by_name(layer, words):
    with pytest.raises(ConfigError, match=words):
        peft.get_peft_model(of(layer()), DudeConfig(r=2, target_modules=["0"]))


def test_a_rank_that_a_map_cannot_have_and_a_method_without_one():
    with pytest.raises(ConfigError, match=r"r=10 is more than layer 'conv' \(out 12, in 9\)"):
        peft.get_peft_model(net(geometry="depthwise"), DudeConfig(r=10, target_modules=["conv"]))
    with pytest.raises(ConfigError, match="'conv' is a Conv2d, which method 'full' does not adapt"):
        peft.get_peft_model(net(), DudeConfig(method="full", target_modules=["conv"]))
