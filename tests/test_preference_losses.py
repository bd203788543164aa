"""The losses of pairs: log-probabilities and formulas against float64 by hand, and against TRL's own."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from models import perturb
from peft import get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode

from dude_peft import DudeConfig
from dude_peft.config.schema import CpoSection, DpoSection, OrpoSection
from dude_peft.data.batches import pad_right
from dude_peft.measure import token_logps
from dude_peft.measure.token_logps import row_logps
from dude_peft.planning.live_bytes import LiveBytes
from dude_peft.training.pair_losses import DPO, Pairs, losses, rewards
from dude_peft.training.preference import NAMES, PreferenceLoss

LOSSES = [*DPO]
FREE = [
    OrpoSection(beta=0.3),
    CpoSection(beta=0.3),
    CpoSection(beta=0.3, label_smoothing=0.1, cpo_alpha=0.5),
    CpoSection(beta=0.3, loss_type="hinge"),
    CpoSection(beta=0.3, loss_type="ipo"),
    CpoSection(beta=2.0, loss_type="simpo", simpo_gamma=1.0, cpo_alpha=0.0),
    CpoSection(beta=2.0, loss_type="simpo"),
]
"""Objectives without a reference."""


def section(loss_type: str, beta: float = 0.3) -> DpoSection:
    smooth = {"robust": 0.1, "exo_pair": 0.02}.get(loss_type)
    return DpoSection(beta=beta, loss_type=loss_type, label_smoothing=smooth)


# --- log-probabilities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_logps_and_their_gradient_are_the_textbooks_in_any_chunks(monkeypatch, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 5, 11)).to(dtype).requires_grad_()
    labels = torch.tensor([[-100, -100, 4, 7, 1], [-100, 2, -100, 3, -100], [-100] * 5])
    slope = torch.tensor([0.7, -1.3, 5.0])
    rows = []
    for row in range(3):
        log_q = logits[row].double().log_softmax(-1)
        rows.append(sum((log_q[t - 1, labels[row, t]] for t in range(5) if labels[row, t] >= 0), torch.zeros(())))
    wanted = torch.stack([row.double() for row in rows])
    (gradient,) = torch.autograd.grad((wanted * slope).sum(), logits)
    for chunk in (1, 22, 2**24):
        monkeypatch.setattr(token_logps, "_CHUNK", chunk)
        found, counts = row_logps(logits, labels)
        (ours,) = torch.autograd.grad((found * slope).sum(), logits)
        assert counts.tolist() == [3, 2, 0]
        assert torch.allclose(found.double(), wanted, rtol=1e-12 if dtype is torch.float64 else 1e-6)
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
        assert torch.allclose(ours.double(), gradient.double(), atol=tolerance)


def test_memory_is_the_gradient_and_a_few_chunks():
    with FakeTensorMode():
        logits = torch.empty(8, 512, 128256, dtype=torch.bfloat16, requires_grad=True)
        labels, few = torch.zeros(8, 512, dtype=torch.int64), 8 * 4 * token_logps._CHUNK
        with LiveBytes([]) as live:
            # Under fake tensors nothing has a value, so the judged tokens are given.
            row, token = (part.flatten() for part in torch.meshgrid(torch.arange(8), torch.arange(511), indexing="ij"))
            places = row * 512 + token
            each = token_logps.logps_at(logits.flatten(0, 1), places, labels[row, token + 1])
            assert live.stretch().peak < few
            each.sum().backward()
            assert live.stretch().peak < logits.nbytes + few


# --- formulas -----------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(kind: str, c: float, r: float, nc: int, nr: int, b: float) -> float:
    """The loss of one pair from its two ratios and lengths, from the papers and TRL's documentation."""
    log_s = [math.log(sigmoid(b * (c - r))), math.log(sigmoid(-b * (c - r)))]
    e = {"robust": 0.1, "exo_pair": 0.02}.get(kind, 0.0)
    s = sigmoid(b * (c - r))
    return {
        "sigmoid": lambda: -log_s[0],
        "sigmoid_norm": lambda: -math.log(sigmoid(b * (c / nc - r / nr))),
        "hinge": lambda: max(0.0, 1 - b * (c - r)),
        "ipo": lambda: (c / nc - r / nr - 1 / (2 * b)) ** 2,
        "robust": lambda: (-(1 - e) * log_s[0] + e * log_s[1]) / (1 - 2 * e),
        "exo_pair": lambda: s * math.log(s / (1 - e)) + (1 - s) * math.log((1 - s) / e),
        "nca_pair": lambda: (
            -math.log(sigmoid(b * c)) - 0.5 * math.log(sigmoid(-b * c)) - 0.5 * math.log(sigmoid(-b * r))
        ),
        "bco_pair": lambda: -math.log(sigmoid(b * c)) - math.log(sigmoid(-b * r)),
        "sppo_hard": lambda: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
        "apo_zero": lambda: 1 - sigmoid(b * c) + sigmoid(b * r),
        "apo_down": lambda: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    }[kind]()


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_is_its_formula_away_from_neutral(kind):
    chosen, rejected = [-20.0, -31.0, -7.5], [-25.0, -28.0, -9.0]
    base_chosen, base_rejected = [-22.5, -26.0, -7.0], [-21.0, -29.5, -9.25]
    lengths = [5, 9, 3], [4, 11, 3]
    pairs = Pairs(
        *(torch.tensor(x, dtype=torch.float64) for x in (chosen, rejected, *lengths, base_chosen, base_rejected))
    )
    wanted = [
        by_hand(kind, chosen[n] - base_chosen[n], rejected[n] - base_rejected[n], lengths[0][n], lengths[1][n], 0.3)
        for n in range(3)
    ]
    assert losses(pairs, section(kind)).tolist() == pytest.approx(wanted, rel=1e-12)
    assert len({round(value, 6) for value in wanted}) == 3  # away from neutral: no two pairs are alike


def free_by_hand(settings: OrpoSection | CpoSection, chosen: float, rejected: float, nc: int, nr: int) -> float:
    """The loss of one pair without a reference, from sums of log-probabilities and lengths."""
    b = settings.beta
    if isinstance(settings, OrpoSection):
        odds = [math.exp(x / n) / (1 - math.exp(x / n)) for x, n in ((chosen, nc), (rejected, nr))]
        return -b * math.log(sigmoid(math.log(odds[0] / odds[1])))
    means = settings.loss_type in ("ipo", "simpo")
    margin = chosen / nc - rejected / nr if means else chosen - rejected
    gamma = 0.5 if settings.simpo_gamma is None else settings.simpo_gamma
    e = settings.label_smoothing or 0.0
    return {
        "sigmoid": lambda: -(1 - e) * math.log(sigmoid(b * margin)) - e * math.log(sigmoid(-b * margin)),
        "simpo": lambda: -math.log(sigmoid(b * margin - gamma)),
        "hinge": lambda: max(0.0, 1 - b * margin),
        "ipo": lambda: (margin - 1 / (2 * b)) ** 2,
    }[settings.loss_type]()


@pytest.mark.parametrize("settings", FREE, ids=repr)
def test_every_loss_without_a_reference_is_its_formula(settings):
    chosen, rejected, lengths = [-20.0, -31.0, -0.3], [-25.0, -28.0, -9.0], ([5, 9, 3], [4, 11, 3])
    pairs = Pairs(*(torch.tensor(x, dtype=torch.float64) for x in (chosen, rejected, *lengths)))
    rows = zip(chosen, rejected, *lengths, strict=True)
    wanted = [free_by_hand(settings, *row) for row in rows]
    assert losses(pairs, settings).tolist() == pytest.approx(wanted, rel=1e-12)


def test_an_answer_that_is_certain_has_finite_odds():
    sure = torch.zeros(1, requires_grad=True)
    pairs = Pairs(sure, torch.tensor([-3.0]), torch.tensor([2]), torch.tensor([2]))
    loss = losses(pairs, OrpoSection())
    loss.backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(sure.grad).all()


def test_the_schema_names_every_formula():
    assert set(get_args(DpoSection.model_fields["loss_type"].annotation)) == set(DPO)


# --- TRL's own ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    datasets = pytest.importorskip("datasets", reason="the trainers read datasets; install dude-peft[train]")
    trl = pytest.importorskip("trl", reason="TRL is not here: pip install 'dude-peft[trl]'")
    rows = {
        "prompt": [f"say {n} " for n in range(4)],
        "chosen": [f"yes {n}" for n in range(4)],
        "rejected": [f"no, never {n * n}" for n in range(4)],
    }
    model = get_peft_model(tiny_llama(), DudeConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    perturb(model)
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), beta=0.3, per_device_train_batch_size=4, bf16=False,
        gradient_checkpointing=False, use_cpu=True, report_to=[], dataloader_pin_memory=False,
    )  # fmt: skip
    return trl.DPOTrainer(
        model=model, ref_model=tiny_llama(), args=arguments, train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_gradients_and_metrics_are_trls_with_a_separate_reference_model(trl_trainer, kind):
    wanted = section(kind)
    trl_trainer.loss_types = [kind]
    trl_trainer.label_smoothing = wanted.label_smoothing or 0.0
    batch = next(iter(trl_trainer.get_train_dataloader()))
    model = trl_trainer.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trl_trainer._metrics["train"].clear()
    theirs = trl_trainer.compute_loss(model, dict(batch))
    slopes = torch.autograd.grad(theirs, trained)
    measured = {name: values[0] for name, values in trl_trainer._metrics["train"].items()}

    ours = PreferenceLoss(wanted)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    ours.look(model, inputs)
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    loss = ours(outputs, labels)
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for mine, its in zip(torch.autograd.grad(loss, trained), slopes, strict=True):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-5 * float(its.abs().max()) + 1e-9)
    assert ours.means() == pytest.approx({name: measured[name] for name in NAMES}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("settings", FREE, ids=repr)
def test_losses_without_a_reference_are_trls(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    datasets = pytest.importorskip("datasets", reason="the trainers read datasets; install dude-peft[train]")
    kind = "orpo" if isinstance(settings, OrpoSection) else "cpo"
    trl = pytest.importorskip(f"trl.experimental.{kind}", reason="this TRL has no such trainer")
    common: dict = {
        "output_dir": str(tmp_path), "beta": settings.beta, "per_device_train_batch_size": 3, "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "report_to": [], "dataloader_pin_memory": False,
    }  # fmt: skip
    if kind == "cpo":
        gamma, smooth = settings.simpo_gamma, settings.label_smoothing
        common |= {"loss_type": settings.loss_type, "cpo_alpha": settings.cpo_alpha, "label_smoothing": smooth or 0.0}
        common |= {} if gamma is None else {"simpo_gamma": gamma}
    model = get_peft_model(tiny_llama(), DudeConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    perturb(model)
    rows = {
        "prompt": [f"say {n} " for n in range(3)],
        "chosen": ["yes", "yes, two", "never"],
        "rejected": ["no, never", "no", "it is"],
    }
    trainer = getattr(trl, f"{kind.upper()}Trainer")(
        model=model, args=getattr(trl, f"{kind.upper()}Config")(**common), processing_class=tiny_tokenizer(),
        train_dataset=datasets.Dataset.from_dict(rows),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    theirs, measured = trainer.get_batch_loss_metrics(model, batch)
    slopes = torch.autograd.grad(theirs, trained)
    sides = [
        {"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()}
        for side in ("chosen", "rejected")
        for ids, labels, length in zip(
            batch[f"{side}_input_ids"], batch[f"{side}_labels"], batch[f"{side}_attention_mask"].sum(1), strict=True
        )
    ]
    inputs, ours = pad_right(sides, 257), PreferenceLoss(settings)
    ours.look(model, inputs)
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    loss = ours(outputs, inputs["labels"])
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for mine, its in zip(torch.autograd.grad(loss, trained), slopes, strict=True):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-5 * float(its.abs().max()) + 1e-9)
    assert ours.means() == pytest.approx({name: measured[name] for name in NAMES}, rel=1e-4, abs=1e-5)


def test_the_first_loss_is_log_2_exactly_and_means_start_over():
    model = get_peft_model(tiny_llama(), DudeConfig(r=4, target_modules="all-linear")).train()
    rows = [{"input_ids": [5, 6, 7 + n], "labels": [-100, 6, 7 + n]} for n in range(4)]
    inputs, loss = pad_right(rows, 257), PreferenceLoss(DpoSection())
    loss.look(model, inputs)
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    assert float(loss(outputs, inputs["labels"]).detach()) == pytest.approx(math.log(2), rel=1e-7)
    assert loss.sums()[:5] == [2.0, 0.0, 0.0, 0.0, 0.0]
    assert loss.means()["rewards/margins"] == 0.0
    assert loss.sums() == [0.0] * 7


def test_rewards_are_ratios_times_beta():
    values = (torch.tensor([float(n)]) for n in (-3, -5, 2, 2, -4, -4.5))
    chosen, rejected = rewards(Pairs(*values), DpoSection(beta=0.5))
    assert (float(chosen), float(rejected)) == (0.5, -0.25)
