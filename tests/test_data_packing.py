"""Packing: every example once, no pack too long, the loss of the unpacked rows, and models that mix rows are found."""

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, make

from dude_peft.data.batches import flat, pad_right
from dude_peft.data.labels import IGNORE
from dude_peft.data.packing import pack, packs_apart
from dude_peft.errors import ConfigError

PACKABLE = ["llama", "mistral-gqa", "qwen3", "gemma3-tied", "gpt2-conv1d", "qwen3-moe"]


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), seed=st.integers(0, 2**32 - 1))
def test_every_example_once_and_no_pack_too_long(lengths, seed):
    packs = pack(lengths, 50, seed)
    assert sorted(example for each in packs for example in each) == list(range(len(lengths)))
    assert all(0 < sum(lengths[example] for example in each) <= 50 for each in packs)
    assert packs == pack(lengths, 50, seed)
    # best fit: no two packs could be one
    used = sorted(sum(lengths[example] for example in each) for each in packs)
    assert len(used) < 2 or used[0] + used[1] > 50


def test_packs_are_full_and_follow_the_seed():
    lengths = [10 + (7 * i) % 90 for i in range(5000)]
    packs = pack(lengths, 128, 0)
    assert sum(lengths) / (128 * len(packs)) > 0.97
    assert packs != pack(lengths, 128, 1)
    assert pack([3, 3, 2], 5, 0) == PINNED  # the same on every machine
    with pytest.raises(ConfigError, match="an example of 6 tokens does not fit into a pack of 5"):
        pack([1, 6], 5, 0)


PINNED = [[1], [0, 2]]


def examples() -> list[dict[str, list[int]]]:
    rows = []
    for seed, length in enumerate((5, 9, 3, 12)):
        ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE] * (length // 2) + ids[length // 2 :]})
    rows[2]["labels"] = rows[2]["input_ids"]  # trained from the first token on, as with train_on: all
    return rows


def test_positions_begin_again_and_no_example_predicts_the_next():
    batch = flat(examples()[1:3])
    assert batch.keys() == {"input_ids", "position_ids", "labels"}
    assert batch["position_ids"].tolist() == [[*range(9), *range(3)]]
    assert batch["labels"][0, 9] == IGNORE
    assert batch["labels"][0, 10:].tolist() == examples()[2]["labels"][1:]
    assert batch["input_ids"].shape == (1, 12)


def test_padding_needs_no_mask_and_hides_no_token():
    batch = pad_right([{"input_ids": [7, 0, 0], "labels": [7, 0, 0]}, {"input_ids": [5], "labels": [5]}], pad_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 0, 0], [IGNORE, IGNORE, IGNORE]]  # nothing predicts a first token


@pytest.mark.parametrize("name", PACKABLE)
def test_the_packed_loss_is_the_unpacked_one(name):
    model, rows = make(name), examples()
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    assert packs_apart(model)
    assert model.training
    gradients, losses = [], []
    for batch in (pad_right(rows, pad_id=0), flat(rows)):
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("name", PACKABLE[:4])
def test_half_precision_is_no_obstacle(name):
    assert packs_apart(make(name, torch.bfloat16))


SMALL = {"vocab_size": 96, "hidden_size": 48}
MIXING = {
    # a recurrent state; a convolution in every second layer; positions counted by the model itself; no positions at all
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL, num_hidden_layers=2, state_size=8)),
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(
            **SMALL, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        )
    ),
    "opt": lambda: make("opt-bias"),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**SMALL, n_layer=2, n_head=4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_rows_are_found(name):
    torch.manual_seed(0)
    model = MIXING[name]().eval()
    assert not packs_apart(model)
    assert not model.training


def test_a_mask_that_is_ignored_is_found():
    model = make("llama")
    model.config._attn_implementation = "eager"
    assert packs_apart(model)
    forward = model.forward
    model.forward = lambda input_ids, position_ids, use_cache: forward(
        input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids), use_cache=use_cache
    )
    assert not packs_apart(model)
    model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids)
    assert not packs_apart(model)
