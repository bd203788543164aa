"""The loss of labelled answers (KTO): against float64 by hand, and TRL's own with a separate reference model."""

from __future__ import annotations

import math

import pytest
import torch
from models import perturb
from peft import get_peft_model
from tiny import tiny_llama, tiny_tokenizer

from dude_peft import DudeConfig
from dude_peft.config.schema import KtoSection
from dude_peft.data.batches import pad_right
from dude_peft.data.mismatched import mismatched
from dude_peft.training.label_losses import kl_of, losses
from dude_peft.training.labelled import LabelledLoss

SECTIONS = [
    KtoSection(beta=0.3),
    KtoSection(beta=0.2, desirable_weight=1.5, undesirable_weight=0.4),
    KtoSection(beta=0.3, loss_type="apo_zero_unpaired", undesirable_weight=2.0),
]


def by_hand(settings: KtoSection, ratio: float, wanted: bool, kl: float) -> float:
    kl = kl if settings.loss_type == "kto" else 0.0
    value = 1 / (1 + math.exp(-settings.beta * (ratio - kl if wanted else kl - ratio)))
    return (settings.desirable_weight if wanted else settings.undesirable_weight) * (1 - value)


@pytest.mark.parametrize("settings", SECTIONS, ids=repr)
def test_the_loss_and_its_gradient_are_the_formula_away_from_neutral(settings):
    ratios = torch.tensor([2.5, -3.5, -1.25, 4.0], dtype=torch.float64, requires_grad=True)
    wanted, kl = [True, True, False, False], 0.75
    found = losses(ratios, torch.tensor(wanted), torch.tensor(kl, dtype=torch.float64), settings)
    each = [by_hand(settings, float(ratio), label, kl) for ratio, label in zip(ratios.detach(), wanted, strict=True)]
    assert found.tolist() == pytest.approx(each, rel=1e-12)
    assert len({round(value, 6) for value in each}) == 4
    (slope,) = torch.autograd.grad(found.sum(), ratios)
    step = 1e-5
    for place, label in enumerate(wanted):
        at = float(ratios[place].detach())
        rise = by_hand(settings, at + step, label, kl) - by_hand(settings, at - step, label, kl)
        assert float(slope[place]) == pytest.approx(rise / (2 * step), rel=1e-7)


def test_the_estimate_of_kl_is_never_below_0():
    assert float(kl_of(torch.tensor([1.0, -0.5]))) == 0.25
    assert float(kl_of(torch.tensor([1.0, -1.5]))) == 0.0


def test_a_question_gets_the_answer_of_another_row_cut_at_the_end():
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9]},
    ]
    assert mismatched(rows, rows[::-1], 5) == [
        {"input_ids": [1, 2, 6, 7, 8], "labels": [-100, -100, 6, 7, -100]},
        {"input_ids": [5, 3, 4], "labels": [-100, 3, 4]},
    ]


@pytest.mark.parametrize("settings", SECTIONS, ids=repr)
def test_loss_gradients_and_metrics_are_trls_with_a_separate_reference_model(tmp_path, settings):
    datasets = pytest.importorskip("datasets", reason="the trainers read datasets; install dude-peft[train]")
    trl = pytest.importorskip("trl", reason="TRL is not here: pip install 'dude-peft[trl]'")
    if not hasattr(trl, "KTOTrainer"):
        pytest.skip("this TRL has no KTOTrainer")
    model = get_peft_model(tiny_llama(), DudeConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    perturb(model)
    rows = {
        "prompt": [f"say {n} " for n in range(4)],
        "completion": ["yes", "never, no", "it is", "no"],
        "label": [True, False, True, True],
    }
    trainer = trl.KTOTrainer(
        model=model, ref_model=tiny_llama(), processing_class=tiny_tokenizer(),
        train_dataset=datasets.Dataset.from_dict(rows),
        args=trl.KTOConfig(
            **settings.model_dump(), output_dir=str(tmp_path), per_device_train_batch_size=4, bf16=False,
            gradient_checkpointing=False, use_cpu=True, report_to=[], dataloader_pin_memory=False,
        ),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    theirs = trainer.compute_loss(model, dict(batch))
    slopes = torch.autograd.grad(theirs, trained)
    measured = {name: values[0] for name, values in trainer._metrics["train"].items()}

    ids = [row[:size].tolist() for row, size in zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)]
    masks = batch["completion_mask"].tolist()
    each = [
        {"input_ids": row, "labels": [t if m else -100 for t, m in zip(row, mask, strict=False)]}
        for row, mask in zip(ids, masks, strict=True)
    ]
    inputs = {**pad_right(each, 257), "label": torch.tensor(rows["label"])}
    if settings.loss_type == "kto":
        inputs["mismatched"] = pad_right(mismatched(each, [each[-1], *each[:-1]], 1024), 257)
        assert torch.equal(inputs["mismatched"]["attention_mask"], batch["KL_attention_mask"])
    ours = LabelledLoss(settings)
    ours.look(model, inputs)
    labels = inputs.pop("labels")
    loss = ours(model(**inputs, use_cache=False), labels)
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for mine, its in zip(torch.autograd.grad(loss, trained), slopes, strict=True):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-5 * float(its.abs().max()) + 1e-9)
    found = ours.means()
    assert found == pytest.approx({name: measured[name] for name in found}, rel=1e-4, abs=1e-5)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"} <= found.keys()
    assert ("kl" in found) == (settings.loss_type == "kto")
    assert ours.sums() == [0.0] * 8
