"""Scoring: the loss against transformers' own, generation against one row at a time, intervals against known values."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from dude_peft.data.batches import pad_left, pad_right
from dude_peft.data.labels import IGNORE
from dude_peft.measure.intervals import wilson_interval
from dude_peft.measure.score import complete, end_of_turn_ids, held_out_loss


def example(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE] * len(prompt) + answer}


EXAMPLES = [example([5, 6, 7], [8, 256]), example([9] * 11, [1, 2, 3, 256]), example([4], [256])]


def test_padding_is_masked_and_not_learned():
    batch = pad_right(EXAMPLES, pad_id=257)
    assert batch["input_ids"].shape == (3, 15)
    assert batch["attention_mask"].sum(1).tolist() == [5, 15, 2]
    assert (batch["labels"] != IGNORE).sum(1).tolist() == [2, 4, 1]
    left = pad_left([[1, 2], [3]], pad_id=257)
    assert left["input_ids"].tolist() == [[1, 2], [257, 3]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_weighs_every_token_the_same(batch_size):
    model = tiny_llama()
    total = tokens = 0.0
    for row in EXAMPLES:
        learned = sum(label != IGNORE for label in row["labels"])
        batch = {name: torch.tensor([ids]) for name, ids in row.items()}
        with torch.no_grad():
            total += float(model(**batch).loss) * learned
        tokens += learned
    loss = held_out_loss(model, EXAMPLES, pad_id=257, batch_size=batch_size)
    assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_answers_do_not_depend_on_the_batch_and_come_in_order():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts = [[65, 66], [67] * 9, [68], [69, 70, 71]]
    settings = {"max_new_tokens": 7}
    together = complete(model, tokenizer, prompts, batch_size=3, **settings)
    alone = [complete(model, tokenizer, [prompt], batch_size=1, **settings)[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 1


def test_every_end_token_ends_an_answer():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = [256, 260]
    assert end_of_turn_ids(model, tokenizer) == {256, 260}
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely: greedy takes the first
    prompts = [[65, 66], [67]]
    assert complete(model, tokenizer, prompts, max_new_tokens=3, batch_size=2) == [tokenizer.decode([0] * 3)] * 2
    model.generation_config.eos_token_id = 0
    assert complete(model, tokenizer, prompts, max_new_tokens=3, batch_size=2) == ["", ""]


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (500, 1319, 0.3533, 0.4056), (0, 0, 0, 1)],
)
def test_wilson_interval(right, rows, low, high):
    assert wilson_interval(right, rows) == pytest.approx((low, high), abs=2e-4)


def test_a_checkpoint_s_own_penalties_and_sampling_do_not_count():
    from tiny import tiny_llama, tiny_tokenizer

    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts = [[1, 2, 3], [4, 5]]
    plain = complete(model, tokenizer, prompts, max_new_tokens=12, batch_size=2)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    kept = model.generation_config
    assert complete(model, tokenizer, prompts, max_new_tokens=12, batch_size=2) == plain
    assert model.generation_config is kept
