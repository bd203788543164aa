"""What half precision delivers, in a whole forward and token by token: the same bits, wherever a row stands."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from models import tokens
from peft import get_peft_model
from torch import nn

from dude_peft import DudeConfig

GAIN = 1.0015  # trained magnitudes differ from 1 by this much
TOKENS = 2048


def layer(dtype, gain=GAIN):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(64, 256, bias=False)).to(dtype), DudeConfig(r=4, target_modules=["0"])
    ).eval()
    adapted = model.base_model.model[0]
    with torch.no_grad():
        adapted.lora_dm["default"].weight.copy_(adapted.lora_m0["default"] * (gain - 1))
    return adapted


def delivered(y, base):
    """Gain - 1 of every output feature, (out,), by least squares over the tokens."""
    y, base = y.double(), base.double()
    return (y * base).sum(0) / base.square().sum(0) - 1


@pytest.mark.parametrize("gain", [1 + 1e-4, GAIN, 1 + 5e-3, 1 + 1e-2])
def test_decoding_delivers_a_gain_feature_by_feature(gain):
    adapted = layer(torch.bfloat16, gain)
    x = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with torch.no_grad():
        base = adapted.base_layer(x)
        found = delivered(torch.cat([adapted(row[None]) for row in x]), base)
        whole = torch.stack([delivered(adapted(part), adapted.base_layer(part)) for part in x.split(256)])
    assert abs(float(found.mean()) / (gain - 1) - 1) <= 0.05
    assert found.std() <= whole.std(dim=1).mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_has_the_same_bits_wherever_it_stands(dtype):
    adapted = layer(dtype)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        y, moved = adapted(x), adapted(x.roll(7, dims=0)).roll(-7, dims=0)
    assert torch.equal(y, moved)
    assert not torch.equal(y, adapted.base_layer(x))


def language_model():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    base = hf.LlamaForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(base, DudeConfig(r=8, target_modules="all-linear")).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_dm" in name:
                m0 = model.get_submodule(name.split(".lora_dm")[0]).lora_m0["default"]
                p.copy_(m0 * 0.0015 * torch.randn(p.shape, generator=g))
            elif ".lora_d" in name:
                p.add_(0.002 * torch.randn(p.shape, generator=g))
    return model


def test_a_prompt_gives_the_same_bits_whatever_its_place_in_the_batch():
    model = language_model()
    ids = tokens(5, 12)
    with torch.no_grad():
        one = model(input_ids=ids).logits
        other = model(input_ids=ids.flip(0)).logits.flip(0)
    assert torch.equal(one, other)


def test_token_by_token_is_as_exact_as_a_whole_forward():
    model, ids = language_model(), tokens(1, 128)
    with torch.no_grad():
        want = copy.deepcopy(model).float()(input_ids=ids).logits[0].double()
        whole = model(input_ids=ids).logits[0].double()
        cache, steps = None, []
        for position in range(ids.shape[1]):
            step = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits[0, -1].double())
    error = {name: float((y - want).norm() / want.norm()) for name, y in (("w", whole), ("t", torch.stack(steps)))}
    assert error["t"] <= 1.1 * error["w"]  # 1.2 times as much when every token had the first row's thresholds
