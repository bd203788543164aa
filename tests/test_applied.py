"""An adapter is applied wherever its layer's weight has a part in the output, also where nobody calls the layer.

Every case is compared, in every mode, with the same model whose weights are the effective ones.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from method_rows import each_kind_with_an_open_norm
from models import perturb
from peft import get_peft_model
from torch import nn
from torch.nn import functional

from dude_peft import DudeConfig
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.weight import _Readable

_SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(10, 7)

    def forward(self, x):
        return self.lin(x)


class Read(Called):
    def forward(self, x):
        return functional.linear(x, self.lin.weight, self.lin.bias)


class _Product(torch.autograd.Function):
    """As fused kernels are: autograd sees the weight go in, and nothing of what is done with it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, outer):
        x, weight = ctx.saved_tensors
        return outer @ weight, outer.t() @ x


class Fused(Called):
    def forward(self, x):
        return _Product.apply(x, self.lin.weight) + self.lin.bias


class InParts(Called):
    def forward(self, x):
        first, rest = self.lin.weight.split([3, 4])
        return torch.cat([x @ first.T, x @ rest.T], dim=-1) + self.lin.bias


def _encoder(norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def _wavlm():
    config = hf.WavLMConfig(**_SMALL, conv_dim=(16,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
        num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=4, hidden_dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, layerdrop=0.0, feat_proj_dropout=0.0, apply_spec_augment=False)  # fmt: skip
    return hf.WavLMModel(config)


def _deberta():
    config = hf.DebertaConfig(**_SMALL, vocab_size=50, relative_attention=True, pos_att_type=["c2p", "p2c"],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32)  # fmt: skip
    return hf.DebertaModel(config)


def _mobilebert():
    config = hf.MobileBertConfig(**_SMALL, vocab_size=50, embedding_size=16, intra_bottleneck_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, tie_word_embeddings=False)  # fmt: skip
    return hf.MobileBertForMaskedLM(config)


def _mamba():
    return hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4, time_step_rank=8)
    )


def _t5():
    config = hf.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0)
    return hf.T5EncoderModel(config)


def _falcon():
    config = hf.FalconConfig(
        **_SMALL, vocab_size=50, alibi=False, parallel_attn=False, hidden_dropout=0.0, attention_dropout=0.0
    )
    return hf.FalconForCausalLM(config)


def _reformer():
    config = hf.ReformerConfig(attn_layers=["lsh"], hidden_size=32, feed_forward_size=48, num_attention_heads=4,
        attention_head_size=8, vocab_size=50, axial_pos_shape=[4, 4], axial_pos_embds_dim=[16, 16], num_hashes=1,
        lsh_attn_chunk_length=4, num_buckets=2, hash_seed=0, is_decoder=True, lsh_attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0, max_position_embeddings=16)  # fmt: skip
    return hf.ReformerModel(config)


ROWS = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
VECTORS = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
SOUND = torch.randn(2, 60, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 50, (2, 16), generator=torch.Generator().manual_seed(1))

KINDS = {
    "called": (Called, ["lin"], ROWS),
    "read": (Read, ["lin"], ROWS),
    "fused": (Fused, ["lin"], ROWS),
    "in parts": (InParts, ["lin"], ROWS),
    "TransformerEncoder": (lambda: _encoder(False), ["linear1", "linear2"], VECTORS),
    "TransformerEncoder, norm first": (lambda: _encoder(True), ["linear1", "linear2"], VECTORS),
    "TransformerEncoder, one of two": (lambda: _encoder(False), ["linear2"], VECTORS),
    "WavLM": (_wavlm, ["q_proj", "k_proj", "v_proj", "out_proj"], SOUND),
    "DeBERTa": (_deberta, ["in_proj", "pos_proj", "dense"], IDS),
    "MobileBERT": (_mobilebert, ["dense"], IDS),
    "Mamba": (_mamba, ["in_proj", "x_proj", "dt_proj", "out_proj"], IDS),
    "T5": (_t5, ["q", "wi", "wo"], IDS),
    "Falcon": (_falcon, "all-linear", IDS),
    "Reformer": (_reformer, ["query_key", "value", "output.dense"], IDS),
}


def output(model, x):
    torch.manual_seed(7)  # Reformer hashes at random
    found = model(x)
    if isinstance(found, torch.Tensor):
        return found
    return found.logits if "logits" in found else found.last_hidden_state


def adapted(build, targets, **settings):
    torch.manual_seed(0)
    base = build()
    with torch.no_grad():
        for parameter in base.parameters():  # away from LayerNorm's ones and the biases' zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = DudeConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets} | settings)
    model = get_peft_model(copy.deepcopy(base), config)
    perturb(model, scale=0.1)
    effective = copy.deepcopy(base)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DudeLinear):
                effective.get_submodule(module.layer_name).weight.copy_(module.effective_weight())
    return base, model, effective


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_arrives_in_every_mode(kind):
    build, targets, x = KINDS[kind]
    base, model, effective = adapted(build, targets)

    def near(found, wanted):
        assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()

    for training in (True, False):
        for each in (base, model, effective):
            each.train(training)
        wanted, plain = output(effective, x).detach(), output(base, x).detach()
        assert (wanted - plain).abs().max() > 1e-3 * plain.abs().max()
        near(output(model, x), wanted)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                near(output(model, x), wanted)
        with torch.no_grad(), model.disable_adapter():
            near(output(model, x), plain)
        model.merge_adapter()
        with torch.no_grad():
            near(output(model, x), wanted)
        model.unmerge_adapter()
    with torch.no_grad():
        near(output(model, x), wanted)


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
@each_kind_with_an_open_norm
def test_who_reads_the_weight_trains_it_as_who_calls_the_layer(method, norm_gradient):
    gradients = []
    for build in (Called, Read, Fused, InParts):
        _, model, _ = adapted(build, ["lin"], method=method, norm_gradient=norm_gradient)
        x = ROWS.clone().requires_grad_()
        (model(x) ** 2).sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None and gradient.any() for gradient in trained.values())
        gradients.append({**trained, "x": x.grad})
    for found in gradients[1:]:
        for name, wanted in gradients[0].items():
            assert (found[name] - wanted).abs().max() <= 5e-6 * wanted.abs().max(), name


def test_at_the_start_the_weight_that_is_read_is_the_base_models():
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(Read().to(dtype), DudeConfig(r=3, lora_alpha=5, target_modules=["lin"]))
        layer = model.base_model.model.lin
        assert torch.equal(layer.weight.clone(), layer.base_layer.weight)
        assert layer.weight.dtype == dtype


def test_several_adapters_are_read_together():
    model = get_peft_model(Read(), DudeConfig(r=3, lora_alpha=5, target_modules=["lin"]))
    model.add_adapter("other", DudeConfig(method="lora", r=2, lora_alpha=3, target_modules=["lin"]))
    model.base_model.set_adapter(["default", "other"])
    perturb(model)
    layer = model.base_model.model.lin
    wanted = functional.linear(ROWS, layer.effective_weight(), layer.bias)
    assert (model(ROWS) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert (model(ROWS) - layer(ROWS)).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_question_of_dtype_computes_no_weight(monkeypatch):
    """T5 asks it twice in every forward."""
    _, model, _ = adapted(_t5, ["wo"])
    computed = []
    real = _Readable.values
    monkeypatch.setattr(_Readable, "values", lambda self: computed.append(self) or real(self))
    output(model, IDS)
    layer = next(module for module in model.modules() if isinstance(module, DudeLinear))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device.type) == ((32, 48), torch.float32, "cpu")
    assert weight.requires_grad
    assert not computed
    assert weight.sum() == layer.weight.clone().sum()
    assert computed


def test_heads_of_an_attention_of_torch_are_refused_by_name():
    from dude_peft.errors import ConfigError

    with pytest.raises(
        ConfigError,
        match=r"part of an nn\.Multihead.* name the attention itself, 'layers\.0\.self_attn'",
    ):
        get_peft_model(_encoder(False), DudeConfig(r=3, target_modules=["out_proj"]))


def writes():
    yield lambda w: w.mul_(2)
    yield lambda w: w.data.mul_(2)
    yield lambda w: w.data.__setitem__(0, 1.0)
    yield lambda w: w.__setitem__(slice(-2, None), 0.0)
    yield lambda w: setattr(w, "data", torch.zeros(3))
    yield lambda w: nn.init.normal_(w)
    yield lambda w: w.requires_grad_(True)
    yield lambda w: w.__iadd__(1)


@pytest.mark.parametrize("write", writes())
def test_a_write_to_what_stands_for_the_weight_is_refused_not_lost(write):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), DudeConfig(r=2, target_modules=["0"]))
    weight = model.base_model.model[0].weight
    with torch.no_grad(), pytest.raises(RuntimeError, match="get_base_layer"):
        write(weight)
    assert weight.requires_grad_(False) is weight
