"""A linear layer is what behaves like one, whatever its class; asked of layers with weights and without."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
import transformers as hf
from models import perturb, tokens
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.utils import parametrize, prune
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

from dude_peft import DudeConfig, load_adapter
from dude_peft.errors import ConfigError
from dude_peft.exporting.run import merge
from dude_peft.init.run import initialise
from dude_peft.tuner import frozen


class Einsum(nn.Module):
    """Not even a subclass."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class EinsumLinear(Einsum):
    pass


class Strict(nn.Linear):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.width = in_features

    def forward(self, x):
        assert x.shape[-1] == self.width
        return functional.linear(x, self.weight, self.bias)


class Optional(nn.Linear):
    def forward(self, x, scale=None):
        y = super().forward(x)
        return y if scale is None else y * scale


class Twice(Conv1D):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Linear):
    def forward(self, x):
        return functional.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).to(x.dtype)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1e-2 * torch.randn(self.out_features)


class Normed(nn.Linear):
    def forward(self, x):
        return super().forward(functional.layer_norm(x, x.shape[-1:]))


class Scaling(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


def _parametrized():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = nn.Linear(10, 6)
    parametrize.register_parametrization(layer, "weight", Double())
    return layer


_ROUTER = hf.Llama4TextConfig(hidden_size=10, num_local_experts=6, num_experts_per_tok=2)

PLAIN = {
    "nn.Linear": lambda: nn.Linear(10, 6),
    "Conv1D": lambda: Conv1D(6, 10),
    "a subclass of Conv1D": lambda: Twice(6, 10),
    "Falcon": lambda: FalconLinear(10, 6),
    "Falcon, no bias": lambda: FalconLinear(10, 6, bias=False),
    "ESMFold": lambda: EsmFoldLinear(10, 6),
    "Idefics": lambda: IdeficsDecoupledLinear(10, 6, 0),
    "no subclass": lambda: EinsumLinear(10, 6),
    "its own size alone": lambda: Strict(10, 6),
    "an argument more": lambda: Optional(10, 6),
}
OPAQUE = {
    "scaled": lambda: Scaled(10, 6, bias=False),
    "rounded": lambda: Halved(10, 6),
    "parametrized": _parametrized,
    "pruned": lambda: prune.l1_unstructured(nn.Linear(10, 6), "weight", 0.3),
}


def _grouped():
    """Newer than the lowest transformers."""
    return pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4").DeepseekV4GroupedLinear


REFUSED = {
    "scaled with its bias": lambda: Scaled(10, 6),
    "noisy": lambda: Noisy(10, 6),
    "normed": lambda: Normed(10, 6),
    "an argument too many": lambda: Scaling(10, 6),
    "a pair": lambda: Pair(10, 6),
    "grouped": lambda: _grouped()(10, 6, 2),
    "a router": lambda: Llama4Router(_ROUTER),
    "more columns": lambda: IdeficsDecoupledLinear(10, 6, 2),
    "no name": lambda: Einsum(10, 6),
}


@pytest.mark.parametrize("kind", [*PLAIN, *OPAQUE, *REFUSED])
def test_the_same_is_found_with_and_without_weights(kind):
    make = (PLAIN | OPAQUE | REFUSED)[kind]
    state = torch.get_rng_state()
    layers = [make()]
    with torch.device("meta"):
        layers.append(make())
    with FakeTensorMode():
        layers.append(make())
    torch.set_rng_state(state)
    for layer in layers:
        assert frozen.is_supported(layer) is (kind not in REFUSED)
        if kind not in REFUSED:
            assert (frozen.plain_weight(layer) is not None) is (kind in PLAIN)
    assert torch.equal(torch.get_rng_state(), state)  # noise is drawn from a generator of its own


def test_hooks_and_a_forward_put_on_the_layer_are_not_asked():
    layer = FalconLinear(10, 6)
    layer.register_forward_hook(lambda *_: pytest.fail("called"))
    layer.forward = lambda x: pytest.fail("called")
    assert frozen.plain_weight(layer) is not None


def test_a_layer_is_asked_once(monkeypatch):
    layer, asked = FalconLinear(10, 6), []
    real = FalconLinear.forward
    monkeypatch.setattr(FalconLinear, "forward", lambda self, x: asked.append(x) or real(self, x))
    frozen.plain_weight(layer)
    count = len(asked)
    assert count
    frozen.plain_weight(layer)
    frozen.product(layer, torch.ones(1, 10))
    assert len(asked) == count


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_does_not_map_rows_is_refused_by_name(kind):
    with pytest.raises(ConfigError, match=r"target 'lin' is an? ") as caught:
        get_peft_model(nn.ModuleDict({"lin": REFUSED[kind]()}), DudeConfig(r=3, target_modules=["lin"]))
    assert "\n" not in str(caught.value)
    assert "not a linear layer" in str(caught.value) or "not a linear map of 10 input features" in str(caught.value)


@pytest.mark.parametrize("kind", [*PLAIN, "scaled", "rounded", "parametrized"])
def test_the_adapted_layer_is_the_textbooks(kind):
    torch.manual_seed(0)
    layer = (PLAIN | OPAQUE)[kind]()
    alone = copy.deepcopy(layer)
    x = torch.randn(7, 10)
    model = get_peft_model(nn.Sequential(OrderedDict(lin=layer)), DudeConfig(r=3, lora_alpha=5, target_modules=["lin"]))
    assert torch.equal(model(x), alone(x))
    perturb(model)
    bias = alone(torch.zeros_like(x))
    wanted = x @ model.base_model.model.lin.effective_weight().T + bias
    rounding = 1e-2 if kind == "rounded" else 1e-5
    assert (model(x) - wanted).abs().max() <= rounding * wanted.abs().max()
    assert (model(x) - alone(x)).abs().max() > 5 * rounding * wanted.abs().max()
    if kind in PLAIN:
        merged = model.merge_and_unload()
        assert (merged(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    else:
        with pytest.raises(ConfigError, match="cannot be merged into"):
            model.merge_adapter()


def test_falcon_through_every_door(tmp_path):
    torch.manual_seed(0)
    base = hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=96,
            hidden_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            bias=True,
            parallel_attn=False,
            alibi=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    base.save_pretrained(tmp_path / "base")
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
    initialise(str(tmp_path / "base"), tmp_path / "streamed", settings, workers=1, quiet=True)
    model = get_peft_model(base, DudeConfig(**settings, task_type="CAUSAL_LM")).eval()
    model.base_model.model.config.name_or_path = model.peft_config["default"].base_model_name_or_path = str(
        tmp_path / "base"
    )
    model.save_pretrained(tmp_path / "memory")
    streamed, memory = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("streamed", "memory")
    )
    assert streamed.keys() == memory.keys()
    assert all(torch.equal(streamed[name], memory[name]) for name in streamed)

    perturb(model)
    with torch.no_grad():
        wanted = model(input_ids=tokens()).logits
        plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert (wanted - plain(input_ids=tokens()).logits).abs().max() > 1e-2
        model.save_pretrained(tmp_path / "trained")
        merge([tmp_path / "trained"], tmp_path / "merged", verify=False, quiet=True)
        loaded = load_adapter(plain, tmp_path / "trained").eval()
        for found in (
            loaded,
            hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(),
            loaded.merge_and_unload(),
        ):
            assert (found(input_ids=tokens()).logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()
