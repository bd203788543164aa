"""A model that was never trained on its end token is told before it trains."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny import save_tiny, tiny_llama, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import dude_peft
from dude_peft.training.end_token import end_token_warning

EXAMPLES = [{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]}]


class Tokenizer:
    """As much as is asked."""

    all_special_ids = (1, 2)

    def get_added_vocab(self):
        return {"</s>": 2}

    def convert_ids_to_tokens(self, token):
        return "</s>" if token == 2 else str(token)


@pytest.fixture
def model():
    model = tiny_llama()
    model.requires_grad_(False)
    return model


def forget(model, tokens, scale=1.0):
    with torch.no_grad():
        model.get_output_embeddings().weight[tokens] = scale * model.get_output_embeddings().weight[tokens[0]]


def test_rows_of_their_own_need_no_word(model):
    assert end_token_warning(model, EXAMPLES, Tokenizer()) is None


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_the_row_of_other_tokens_is_told(model, scale):
    forget(model, [2, 9, 10, 11], scale)
    warning = end_token_warning(model, EXAMPLES, Tokenizer())
    assert "never trained on </s>" in warning
    assert "equals those of 3 other tokens" in warning


def test_other_tokens_rows_are_not_asked_for(model):
    forget(model, [9, 10, 11])
    assert end_token_warning(model, EXAMPLES, Tokenizer()) is None


def test_an_answer_that_ends_in_an_ordinary_token(model):
    forget(model, [7, 8])
    plain = [{"input_ids": [5, 7], "labels": [-100, 7]}, {"input_ids": [5], "labels": [-100]}]
    assert end_token_warning(model, plain, Tokenizer()) is None


def test_an_output_layer_that_learns_may_learn_it(model):
    forget(model, [2, 9])
    adapted = peft.get_peft_model(model, dude_peft.DudeConfig(r=2, target_modules=["lm_head"]))
    assert end_token_warning(adapted, EXAMPLES, Tokenizer()) is None


def test_a_run_says_so(tmp_path):
    save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    end = AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id
    forget(model, [end, end + 1])
    model.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 8)
    run = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "adapter": {"r": 2},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "train": {"max_steps": 1},
        "evaluation": {"enabled": False},
        "output_dir": str(tmp_path / "out"),
    }
    assert any("answers may not end" in text for text in dude_peft.train(run).warnings)
