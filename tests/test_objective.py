"""Mixture of losses: its value and gradient against float64, its batches, resuming, and what is measured beside it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from models import perturb
from peft import get_peft_model
from safetensors.torch import load_file
from test_cli import dude
from tiny import save_tiny, tiny_llama, write_rows
from torch._subclasses.fake_tensor import FakeTensorMode

from dude_peft import DudeConfig
from dude_peft.config.reading import load_config
from dude_peft.config.schema import RunConfig
from dude_peft.data.batches import flat, pad_right
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.measure import divergence as divergence_module
from dude_peft.measure.divergence import target_loss
from dude_peft.planning.live_bytes import LiveBytes
from dude_peft.training.general import general_scores
from dude_peft.training.mixed_order import MixedOrder
from dude_peft.training.objective import MixtureOfLosses, judged
from dude_peft.training.run import run
from dude_peft.training.trainer import RunTrainer
from dude_peft.tuner import DudeLinear
from dude_peft.tuner.untouched import as_base

WEIGHTS = "adapter/adapter_model.safetensors"


# --- the loss of tokens -------------------------------------------------------------------------------------------


def textbook(logits, places, labels, base):
    """The formula, token by token, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for n, place in enumerate(places.tolist()):
        q = logits[place].double().softmax(-1)
        k = n - (len(places) - len(base))
        if k < 0:
            total = total - q[labels[n]].log()
        else:
            p = base[k].double().softmax(-1)
            total = total + sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)) if p[v] > 0)
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 3, 7])
def test_loss_and_gradient_are_the_textbooks_in_any_chunks(monkeypatch, dtype, kept):
    torch.manual_seed(kept)
    logits = (3 * torch.randn(9, 11)).to(dtype).requires_grad_()
    base = (3 * torch.randn(kept, 11)).to(dtype)
    if kept:
        base[0, 4] = -torch.inf  # a token that the model rules out
    places, labels = torch.tensor([0, 2, 3, 5, 6, 7, 8]), torch.randint(11, (7,))
    wanted = textbook(logits, places, labels, base)
    (slope,) = torch.autograd.grad(wanted, logits)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    for chunk in (1, 11 * 2, 2**24):
        monkeypatch.setattr(divergence_module, "_CHUNK", chunk)
        loss = target_loss(logits, places, labels, base)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        precise = 1e-12 if dtype is torch.float64 else 1e-6
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=precise)
        assert torch.allclose(gradient.double(), slope.double(), atol=tolerance)
        assert not gradient[[1, 4]].any()  # never judged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_gradient_and_a_few_chunks(dtype):
    """4,096 tokens of a vocabulary of 128,256, half of them general: no second copy of the logits, wide or not."""
    with FakeTensorMode():
        logits = torch.empty(4096, 128256, dtype=dtype, requires_grad=True)
        base, labels = torch.empty(2048, 128256, dtype=dtype), torch.zeros(4096, dtype=torch.int64)
        few = 8 * 4 * divergence_module._CHUNK
        with LiveBytes([]) as live:
            loss = target_loss(logits, torch.arange(4096), labels, base)
            assert live.stretch().peak < few
            loss.backward()
            assert live.stretch().peak < logits.nbytes + few


@pytest.mark.parametrize("where", ["domain", "general", "base"])
def test_a_bad_number_of_any_side_reaches_the_loss(where):
    logits, base = torch.zeros(4, 5), torch.zeros(2, 5)
    if where == "base":
        base[1, 2] = torch.nan
    else:
        logits[0 if where == "domain" else 3, 2] = torch.nan
    assert math.isnan(target_loss(logits, torch.arange(4), torch.zeros(4, dtype=torch.int64), base))


# --- the base inside the model ------------------------------------------------------------------------------------


def adapted(dtype=torch.float64, **changes):
    model = get_peft_model(tiny_llama(dtype=dtype, **changes), DudeConfig(r=4, target_modules="all-linear"))
    return model.train()


def test_the_base_is_the_pretrained_model_and_nothing_is_left_behind():
    model, ids = adapted(attention_dropout=0.5), torch.randint(250, (2, 9))
    perturb(model)
    wanted = tiny_llama(dtype=torch.float64)(input_ids=ids).logits
    before = [(m.training, getattr(m, "_disable_adapters", None)) for m in model.modules()]
    learned = [p.requires_grad for p in model.parameters()]
    model.eval()
    tuned = model(input_ids=ids).logits
    model.train()
    refreshed = []
    for layer in model.modules():
        if isinstance(layer, DudeLinear):
            layer.refresh = lambda: refreshed.append(1)
    with as_base(model), torch.no_grad():
        assert [p.requires_grad for p in model.parameters()] == learned
        assert torch.equal(model(input_ids=ids).logits, wanted)
    assert not refreshed  # the gain is kept
    assert [(m.training, getattr(m, "_disable_adapters", None)) for m in model.modules()] == before
    assert not torch.equal(tuned, wanted)


def examples(lengths, seed=0):
    """Domain examples trained on their second half; general ones on all but the first token."""
    generator = torch.Generator().manual_seed(seed)
    for length, general in lengths:
        ids = torch.randint(250, (length,), generator=generator).tolist()
        first = 1 if general else length // 2
        yield {"input_ids": ids, "labels": [-100] * first + ids[first:]}


DOMAIN, GENERAL = [*examples([(6, 0), (11, 0), (8, 0)])], [*examples([(9, 1), (5, 1), (12, 1)], seed=1)]


def by_hand(model):
    """Loss of the step over all examples, each alone, from log_softmax, with PEFT's own disable_adapter."""
    total, tokens = 0, 0
    for example in [*DOMAIN, *GENERAL]:
        ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
        log_q = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for t, label in enumerate(labels[0, 1:].tolist()):
            if label != -100:
                tokens += 1
                general = example in GENERAL
                total = total + ((log_p[t].exp() * (log_p[t] - log_q[t])).sum() if general else -log_q[t, label])
    return total / tokens, tokens


def gradient(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("shape", ["padded", "packed"])
@pytest.mark.parametrize("cut", [[6], [2, 4], [1, 1, 1, 1, 1, 1], [3, 3]])
def test_a_step_is_the_same_in_any_micro_batches(shape, cut):
    model = adapted()
    perturb(model)
    wanted, tokens = by_hand(model)
    slopes = gradient(model, wanted)
    objective, loss = MixtureOfLosses(), 0
    tensors = flat if shape == "packed" else lambda rows: pad_right(rows, 257)
    mixed = [row for pair in zip(DOMAIN, GENERAL, strict=True) for row in pair]
    for start, stop in itertools.pairwise(itertools.accumulate(cut, initial=0)):
        rows = sorted(mixed[start:stop], key=lambda row: row in GENERAL)
        general = [row for row in rows if row in GENERAL]
        batch = tensors(rows)
        objective.look(model, batch, tensors(general) if general else None)
        labels = batch.pop("labels")
        loss = loss + objective(model(**batch, use_cache=False), labels, torch.tensor(tokens))
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    for mine, own in zip(gradient(model, loss), slopes, strict=True):
        assert torch.allclose(mine, own, rtol=1e-7, atol=1e-12)


def test_general_rows_do_not_pull_at_the_start_and_do_behind_it():
    model, objective = adapted(torch.float32), MixtureOfLosses()

    def pull():
        batch = pad_right(GENERAL, 257)
        objective.look(model, batch, batch)
        labels = batch["labels"]
        loss = objective(model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False), labels)
        return float(loss.detach()), max(float(part.abs().max()) for part in gradient(model, loss))

    assert pull() == (0.0, 0.0)
    perturb(model)
    loss, slope = pull()
    assert loss > 0
    assert slope > 0


def test_judged_tokens_are_predicted_by_the_token_before():
    labels = torch.tensor([[-100, 5, -100, 7], [-100, -100, -100, 9]])
    places, wanted = judged(labels)
    assert places.tolist() == [0, 2, 6]
    assert wanted.tolist() == [5, 7, 9]


def test_what_is_measured_on_general_rows_is_the_formula():
    model = adapted()
    perturb(model)
    found = general_scores(model, GENERAL, pad_id=257, batch_size=2)
    ce, kl, reverse, tokens = 0.0, 0.0, 0.0, 0
    for example in GENERAL:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            log_q = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            with model.disable_adapter():
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        ce -= float(log_q.gather(1, ids[0, 1:, None]).sum())
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        reverse += float((log_q.exp() * (log_q - log_p)).sum())
        tokens += len(log_q)
    wanted = {"loss": ce / tokens, "kl_base_tuned": kl / tokens, "kl_tuned_base": reverse / tokens}
    assert found == pytest.approx(wanted, rel=1e-5)
    assert abs(kl - reverse) > 1e-3 * kl  # two numbers, not one under two names


# --- the order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(12, 12), (30, 10), (5, 17), (9, 1)])
@pytest.mark.parametrize("grouped", [0, 4])
def test_every_stretch_has_its_share_and_every_row_comes_once(first, second, grouped):
    lengths = [7 * n % 13 + 1 for n in range(first + second)]
    order = MixedOrder(lengths, first, seed=3, grouped=grouped)
    order.begin(0)
    rows = list(order)
    assert sorted(rows) == list(range(first + second))
    general = [row >= first for row in rows]
    for size in (1, 2, 8):
        for start in range(len(rows) - size + 1):
            assert abs(sum(general[start : start + size]) - size * second / (first + second)) <= 1
    order.begin(1)
    assert list(order) != rows
    order.begin(0)
    assert list(order) == rows


def test_partners_change_from_epoch_to_epoch():
    order = MixedOrder([5] * 40, 20, seed=0)
    pairs = []
    for epoch in range(2):
        order.begin(epoch)
        rows = list(order)
        pairs.append(set(zip(rows[0::2], rows[1::2], strict=True)))
    assert len(pairs[0] & pairs[1]) < 6


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(checkpoint, tmp_path) -> dict:
    for name, start in (("general", 0), ("general_test", 500)):
        lines = [json.dumps({"text": f"nothing to learn of {n}"}) + "\n" for n in range(start, start + 10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return {
        "model": {"name_or_path": str(checkpoint)},
        "adapter": {"r": 4},
        "data": {
            "train": str(write_rows(tmp_path / "train.jsonl", 12)),
            "test": str(write_rows(tmp_path / "test.jsonl", 4, start=100)),
            "general": str(tmp_path / "general.jsonl"),
            "general_test": str(tmp_path / "general_test.jsonl"),
            "max_length": 64,
        },
        "train": {
            "objective": "mol",
            "learning_rate": 0.01,
            "max_steps": 8,
            "logging_steps": 2,
            "per_device_train_batch_size": 4,
            "save_steps": 2,
        },
        "evaluation": {"rows": 1, "max_new_tokens": 2, "eval_steps": 3},
        "output_dir": str(tmp_path / "out"),
    }


def start(settings: dict, **changes: dict):
    merged = {
        key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in settings.items()
    }
    return run(RunConfig(**{**merged, "output_dir": changes.get("output_dir", settings["output_dir"])}), quiet=True)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / WEIGHTS)


def metrics(folder) -> list[dict]:
    timed = {"tokens_per_second", "memory_bytes", "seconds"}
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def test_the_domain_is_learned_and_the_rest_stays_nearer_to_the_base(settings, tmp_path):
    data = {"general": None}
    plain = start(settings, train={"objective": "sft"}, data=data, output_dir=str(tmp_path / "sft"))
    mixed = start(settings, data={"general_share": 0.75})
    for report in (plain, mixed):
        measured = report.data["general_test"]["measured"]
        assert [line["step"] for line in measured] == [0, 3, 6, 8]
        assert measured[0]["kl_base_tuned"] == measured[0]["kl_tuned_base"] == 0
        assert report.after.loss < report.before.loss
        written = [line for line in metrics(report.config["output_dir"]) if "general_loss" in line]
        assert [{key.removeprefix("general_"): value for key, value in line.items()} for line in written] == measured
    kl = [report.data["general_test"]["measured"][-1]["kl_base_tuned"] for report in (plain, mixed)]
    assert kl[1] < 0.7 * kl[0]
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert saved["data"]["general_test"]["measured"] == mixed.data["general_test"]["measured"]
    assert saved["data"]["general"]["examples"] == 10


@pytest.mark.parametrize(
    ("train", "data"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}),
        ({"gradient_checkpointing": True}, {}),
    ],
)
def test_accumulation_and_checkpointing_take_the_same_steps(settings, tmp_path, train, data):
    start(settings)
    start(settings, train=train, data=data, output_dir=str(tmp_path / "other"))
    one, other = weights(tmp_path / "out"), weights(tmp_path / "other")
    moved = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert moved < 2e-4


@pytest.mark.parametrize(("train", "data"), [({"bf16": True}, {}), ({}, {"packing": True})])
def test_autocast_and_packing_train_as_well(settings, train, data):
    report = start(settings, train=train, data=data)
    assert report.after.loss < report.before.loss
    assert 0 < report.data["general_test"]["measured"][-1]["kl_base_tuned"] < 0.1


def test_an_interrupted_run_goes_on_bit_by_bit(settings, tmp_path, monkeypatch):
    dropout = {"lora_dropout": 0.1}
    whole = start(settings, adapter=dropout)
    cut = {"output_dir": str(tmp_path / "cut"), "adapter": dropout}
    step = RunTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise RuntimeError("the power is gone")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "training_step", interrupted)
        with pytest.raises(RuntimeError, match="power"):
            start(settings, **cut)
    again = start(settings, **cut)
    one, other = weights(tmp_path / "out"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(tmp_path / "out") == metrics(tmp_path / "cut")
    assert again.data["general_test"]["measured"] == whole.data["general_test"]["measured"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_take_the_steps_of_one(settings, tmp_path, strategy):
    """With one row each, one of them sees the domain alone and the other general rows alone."""
    train = {"per_device_train_batch_size": 2}
    start(settings, train=train)
    halves = settings | {"train": settings["train"] | {"per_device_train_batch_size": 1}}
    (tmp_path / "run.yaml").write_text(json.dumps(halves))
    options = ["--launch", strategy, "--processes", "2", "--output-dir", tmp_path / "two"]
    done = dude("train", tmp_path / "run.yaml", *options)
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "out"), weights(tmp_path / "two")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_a_bad_number_of_the_base_stops_before_the_step_and_names_the_rows(settings, monkeypatch):
    look, poisoned = MixtureOfLosses.look, []

    def bad(self, model, inputs, general):
        look(self, model, inputs, general)
        poisoned.append(1)
        if len(poisoned) == 3:
            self._base[0, 0] = torch.nan

    monkeypatch.setattr(MixtureOfLosses, "look", bad)
    with pytest.raises(NumericsError, match=r"loss is nan at step 3, on rows .*train\.jsonl:.*general\.jsonl:"):
        start(settings)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.general", "null", "data.general.*missing"),
        ("train.objective", "sft", "data.general.*not used"),
        ("data.general_share", "1", "general_share"),
        ("data.general_share", "0", "general_share"),
        ("adapter.bias", "all", "adapter.bias"),
        ("train.objective", "mole", "objective"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, tmp_path, key, value, words):
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "run.yaml", [f"{key}={value}"])


def test_a_share_of_no_row_is_refused(settings):
    with pytest.raises(ConfigError, match=r"general_share: 0[.]01 gives less than one general row for 12 rows"):
        start(settings, data={"general_share": 0.01})
