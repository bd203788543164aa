"""Wrong settings and wrong models: one clear line each, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from models import logits, make, perturb
from night import by_night
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dude_peft import DudeConfig, load_adapter
from dude_peft.errors import ArtifactError, ConfigError, NumericsError
from dude_peft.tuner.layer import DudeLinear


def refused(error, *parts):
    """The error is one line and says all of these."""
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"r": 0}, ("r=0", "at least 1")),
        ({"r": -3}, ("r=-3",)),
        ({"r": 2.5}, ("r=2.5",)),
        ({"r": True}, ("r=True",)),
        ({"r": "8"}, ("r='8'",)),
        ({"lora_alpha": 0}, ("lora_alpha=0", "above 0")),
        ({"lora_alpha": -1}, ("lora_alpha=-1",)),
        ({"lora_alpha": float("nan")}, ("lora_alpha=nan",)),
        ({"lora_alpha": float("inf")}, ("lora_alpha=inf",)),
        ({"lora_dropout": 1.0}, ("lora_dropout=1.0", "below 1")),
        ({"lora_dropout": -0.1}, ("lora_dropout=-0.1",)),
        ({"method": "dud"}, ("method='dud'", "'dude'")),
        ({"norm_gradient": "yes"}, ("norm_gradient='yes'", "'exact'")),
        ({"bias": "some"}, ("bias='some'", "'lora_only'")),
        ({"svd_tol": 1.5}, ("svd_tol=1.5", "1e-3")),
        ({"svd_tol": -1}, ("svd_tol=-1",)),
        ({"svd_seed": 1.5}, ("svd_seed=1.5",)),
        ({"svd_seed": -1}, ("svd_seed=-1", "from 0")),
        ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern['q_proj']=0",)),
        ({"alpha_pattern": {"q_proj": 0}}, ("alpha_pattern['q_proj']=0",)),
        ({"lora_alpah": 3}, ("lora_alpah", "'lora_alpha'")),
        ({"use_dora": True}, ("use_dora",)),
        ({"layers_pattern": "h"}, ("layers_pattern", "layers_to_transform")),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, ("layers_to_transform", "regular expression")),
    ],
)
def test_a_wrong_setting_is_refused_when_the_config_is_made(settings, parts):
    with pytest.raises(ConfigError) as error:
        DudeConfig(**settings)
    refused(error, *parts)


@pytest.mark.parametrize(
    ("architecture", "settings", "parts"),
    [
        ("llama", {"target_modules": ["q_porj"]}, ("'q_porj'", "'q_proj'", "LlamaForCausalLM")),
        ("llama", {"target_modules": ["q_proj", "vproj"]}, ("'vproj'", "'v_proj'")),
        ("llama", {"target_modules": r".*nothing"}, ("matches no layer", "all-linear")),
        ("llama", {"target_modules": r"(q_proj"}, ("not a valid regular expression",)),
        ("llama", {"exclude_modules": r"(q_proj"}, ("exclude_modules", "not a valid regular expression")),
        ("llama", {"target_modules": []}, ("is left to adapt",)),
        ("llama", {"target_modules": "q_proj"}, ("regular expression", "write ['q_proj']")),
        ("llama", {"target_modules": "all-linear", "exclude_modules": ".*"}, ("is left to adapt",)),
        ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ("matches no layer",)),
        (
            "llama",
            {"target_modules": ["q_proj"], "layers_to_transform": [9]},
            ("no layer 9", "0 to 1"),
        ),
        ("llama", {"target_modules": ["lm_head"], "ensure_weight_tying": True}, ("ensure_weight_tying",)),
        ("llama", {"target_modules": ["norm"]}, ("LlamaRMSNorm",)),
        ("llama", {"target_modules": ["mlp"]}, ("LlamaMLP",)),
        (
            "mistral-gqa",
            {"r": 30, "target_modules": ["q_proj", "k_proj"]},
            ("k_proj", "r=30", "r <= 24", "rank_pattern"),
        ),
        ("llama", {"r": 60}, ("r=60", "r <= 48")),  # of all-linear, nothing would be left
    ],
)
def test_a_wrong_target_is_refused_before_anything_is_changed(architecture, settings, parts):
    model = make(architecture)
    expected = logits(model)
    with pytest.raises(ConfigError) as error:
        get_peft_model(model, DudeConfig(**{"r": 4, "target_modules": "all-linear", **settings}))
    refused(error, *parts)
    assert not any(isinstance(module, DudeLinear) for module in model.modules())
    assert torch.equal(logits(model), expected)


def test_other_layer_types_are_named():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.ConvTranspose2d(3, 4, 2)
            self.fc = nn.Linear(4, 4)

    with pytest.raises(ConfigError) as error:
        get_peft_model(Vision(), DudeConfig(r=2, target_modules=["conv", "fc"]))
    refused(error, "'conv'", "ConvTranspose2d")


def test_expert_tensors_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 6))

    class Moe(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()
            self.q_proj = nn.Linear(6, 6)

    with pytest.raises(ConfigError) as error:
        get_peft_model(Moe(), DudeConfig(r=2, target_modules=["q_proj", "gate_up_proj"]))
    refused(error, "'experts.gate_up_proj'", "Experts", "target_parameters")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["dude", "lora"])
def test_a_base_weight_that_is_not_finite_is_refused(value, method):
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(NumericsError) as error:
        get_peft_model(model, DudeConfig(method=method, r=4, target_modules="all-linear"))
    refused(error, "model.layers.1.mlp.up_proj", "[3, 5]", str(value))
    assert not any(isinstance(module, DudeLinear) for module in model.modules())


def test_zero_rows_and_an_all_zero_weight_train():
    model = make("llama")
    model.model.layers[0].mlp.up_proj.weight.data[[0, 7]] = 0
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    expected = logits(model)
    adapted = get_peft_model(model, DudeConfig(r=4, target_modules="all-linear"))
    assert torch.equal(logits(adapted), expected)
    perturb(adapted)
    out = adapted(input_ids=torch.arange(3, 20)[None]).logits
    out.square().sum().backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name
            unused = "layers.1.mlp.up_proj.lora_dm" in name  # a zero row is adapted as LoRA adapts it, without m
            assert parameter.grad.any() or unused, name


def test_zero_rows_load_right_in_stock_peft(tmp_path):
    def base():
        model = make("llama")
        model.model.layers[0].mlp.up_proj.weight.data[[0, 7]] = 0
        return model

    model = get_peft_model(base(), DudeConfig(r=4, target_modules="all-linear"))
    perturb(model)
    with torch.no_grad():  # one zero row whose change is zero as well, one with a change
        for layer in model.modules():
            if isinstance(layer, DudeLinear) and layer.layer_name == "model.layers.0.mlp.up_proj":
                layer.lora_dB["default"].weight[7] = 0
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    stock = logits(PeftModel.from_pretrained(base(), tmp_path))
    assert torch.isfinite(stock).all()
    assert (stock - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(logits(load_adapter(base(), tmp_path)), expected)


def test_a_merge_that_overflows_changes_nothing():
    model = get_peft_model(make("llama", torch.float16), DudeConfig(r=4, target_modules=["q_proj"]))
    expected = logits(model)
    layer = next(module for module in model.modules() if isinstance(module, DudeLinear))
    dm = layer.lora_dm["default"].weight
    with torch.no_grad():
        dm.fill_(7e5)
    with pytest.raises(NumericsError) as error:
        layer.merge()
    refused(error, "q_proj", "float16", "float32")
    with torch.no_grad():
        dm.zero_()
    assert torch.equal(logits(model), expected)


def test_a_different_adapter_for_every_row_is_refused():
    model = get_peft_model(make("llama"), DudeConfig(r=4, target_modules=["q_proj"])).eval()
    with pytest.raises(ConfigError) as error:
        model(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["default", "__base__"])
    refused(error, "adapter_names", "set_adapter")


def test_names_and_kinds_of_adapters(tmp_path):
    model = get_peft_model(make("llama"), DudeConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_adapter(model, tmp_path)
    refused(error, "'default'")
    other = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError) as error:
        load_adapter(other, tmp_path, "second")
    refused(error, "another kind")


def test_an_adapter_that_fails_to_be_added_leaves_the_first_alone():
    model = get_peft_model(make("llama"), DudeConfig(r=4, target_modules=["q_proj"]))
    perturb(model)
    expected = logits(model.eval())
    with pytest.raises(ConfigError):
        model.add_adapter("second", DudeConfig(r=400, target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_a_base_of_another_size_is_refused(tmp_path):
    model = get_peft_model(make("llama"), DudeConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError) as error:
        load_adapter(make("mistral-gqa"), tmp_path)
    refused(error, "k_proj", "in training")
    with pytest.raises(ArtifactError) as error:
        load_adapter(make("gpt2-conv1d"), tmp_path)
    refused(error, "GPT2LMHeadModel does not have")


def test_all_linear_leaves_out_what_cannot_be_adapted():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.fc = nn.Linear(8, 8)

    model = get_peft_model(Vision(), DudeConfig(r=2, target_modules="all-linear"))
    assert [m.layer_name for m in model.modules() if isinstance(m, DudeLinear)] == ["fc"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": "(([a-z0-9_]+[.]?)+)+X"}, "target_modules='(([a-z0-9_]+[.]?)+)+X' takes longer than 2 s"),
        *by_night(
            ({"exclude_modules": "((.*)*)*Q"}, "exclude_modules='((.*)*)*Q' takes longer than 2 s"),
            ({"rank_pattern": {"((.*)*)*Q": 2}}, "rank_pattern='((.*)*)*Q' takes longer than 2 s"),
            ({"modules_to_save": ["(.*.*)*x"]}, "modules_to_save='(.*.*)*x' takes longer than 2 s"),
        ),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head'; it must be a list of names"),
        ({"modules_to_save": [None]}, "it must be a list of names"),
        ({"layers_to_transform": "\x1b[31m"}, "it is the number of a layer"),
        ({"layers_to_transform": [1.5]}, "it is the number of a layer"),
        ({"rank_pattern": {7: 1}}, "it maps patterns of layer names to numbers"),
        ({"alpha_pattern": ("q_proj",)}, "it maps patterns of layer names to numbers"),
        ({"alpha_pattern": {"(q_proj": 2}}, "alpha_pattern='(q_proj' is not a valid regular expression"),
    ],
)
def test_a_pattern_that_never_ends_or_is_none_is_refused(changes, words):
    import time

    from tiny import tiny_llama

    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        get_peft_model(tiny_llama(), DudeConfig(**{"r": 2, "target_modules": "all-linear", **changes}))
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert time.perf_counter() - start < 20


def test_a_misspelt_option_of_load_adapter_is_refused():
    with pytest.raises(ConfigError, match="closest: 'is_trainable'"):
        load_adapter(make("llama"), "nowhere", is_trainabel=True)


def test_a_bias_that_no_layer_has_is_told(recwarn):
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "lora_only"}
    with pytest.warns(UserWarning, match="lora_only trains nothing"):
        get_peft_model(make("llama"), DudeConfig(**config))
    recwarn.clear()
    get_peft_model(make("opt-bias"), DudeConfig(**config))
    assert not [warning for warning in recwarn if "trains nothing" in str(warning.message)]
