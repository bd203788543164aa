"""`train.objective: kto` as users run it: against TRL's trainer, interrupted, in two processes, with bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import served
import torch
from test_launch import FSDP2
from test_preference import (
    by_trl,
    lines,
    order_of_rows,
    refuses_to_read,
    same_losses_and_adapter,
    settings,
    start,
)  # fmt: skip
from test_train_resume import _CutError, cut_at, result
from tiny import save_tiny, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from dude_peft import check_data, plan
from dude_peft.config.schema import KtoSection
from dude_peft.data.formats import Reading
from dude_peft.data.prepare import prepare
from dude_peft.data.rows import load_rows
from dude_peft.data.template import Template
from dude_peft.errors import DataError
from dude_peft.training import run as training_run
from dude_peft.training.label_balance import told_of_labels
from dude_peft.training.labelled import LabelledLoss

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    save_tiny(folder / "model")
    write(folder / "train.jsonl", 24)
    write(folder / "test.jsonl", 5, start=100)
    return folder


def write(path: Path, count: int, *, start: int = 0) -> Path:
    rows = [
        {
            "prompt": f"say {n}",
            "completion": "yes" + "!" * (n % 5) if n % 2 else f"no, never {n * n}",
            "label": n % 2 > 0,
        }
        for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def kto(places: Path, out: Path, **sections: dict) -> dict:
    train = {"objective": "kto", "per_device_train_batch_size": 4} | sections.pop("train", {})
    return settings(places, out, train=train, **sections)


# --- equal to TRL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "optim", "section"),
    [
        ("dude", "adamw_torch", {"desirable_weight": 1.2}),
        pytest.param("dora", "sgd", {"loss_type": "apo_zero_unpaired", "beta": 0.5}, marks=SLOW),
        pytest.param("lora", "sgd", {"beta": 0.5, "undesirable_weight": 0.7}, marks=SLOW),
    ],
)
def test_twenty_steps_are_trls_with_a_separate_reference_model(places, tmp_path, monkeypatch, method, optim, section):
    trl = pytest.importorskip("trl", reason="TRL is not here: pip install 'dude-peft[trl]'")
    if not hasattr(trl, "KTOTrainer"):
        pytest.skip("this TRL has no KTOTrainer")
    order = order_of_rows(monkeypatch)
    train = {
        "max_steps": 20, "logging_steps": 1, "optim": optim, "learning_rate": 2e-2 if optim != "sgd" else 5.0,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "gradient_accumulation_steps": 1, "kto": section,
    }  # fmt: skip
    wanted = kto(places, tmp_path / "ours", adapter={"method": method}, train=train)
    wanted["evaluation"] = {"enabled": False}
    start(wanted)
    trainer = by_trl(wanted, order, tmp_path / "trl")
    ours, theirs = same_losses_and_adapter(trainer, tmp_path)
    names = ["rewards/margins", "rewards/chosen", "logps/rejected"]
    if "loss_type" not in section:
        names += ["kl"]
        assert max(line["kl"] for line in ours) > 1e-2  # the estimate took part
    for name in names:
        both = [(mine[name], its[name]) for mine, its in zip(ours, theirs, strict=True) if name in its]
        assert len(both) > 10
        assert [mine for mine, _ in both] == pytest.approx([its for _, its in both], abs=2e-4), name


def test_held_out_answers_are_scored_as_the_saved_adapter_scores_them(places, tmp_path):
    from transformers import AutoModelForCausalLM

    from dude_peft import load_adapter

    report = start(kto(places, tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(places / "model")
    tuned = load_adapter(AutoModelForCausalLM.from_pretrained(places / "model"), tmp_path / "out/adapter").eval()
    tokenizer = tiny_tokenizer()
    rows = [json.loads(line) for line in (places / "test.jsonl").read_text().splitlines()]

    def ratio(prompt: str, completion: str) -> float:
        asked = tokenizer(f"### Question:\n{prompt}\n\n### Answer:\n")["input_ids"]
        ids = torch.tensor([*asked, *tokenizer(completion)["input_ids"], 256])
        at = torch.arange(len(asked), len(ids))
        with torch.no_grad():
            logps = [model(input_ids=ids[None]).logits[0].double().log_softmax(-1) for model in (tuned, base)]
        ours, theirs = (float(each[at - 1, ids[at]].sum()) for each in logps)
        return ours - theirs

    others = [rows[-1], *rows[:-1]]
    kl = max(0.0, sum(ratio(a["prompt"], b["completion"]) for a, b in zip(rows, others, strict=True)) / len(rows))
    ratios = [ratio(row["prompt"], row["completion"]) for row in rows]
    signs = [1 if row["label"] else -1 for row in rows]
    found = [1 / (1 + 2.718281828459045 ** (s * 0.1 * (r - kl))) for s, r in zip(signs, ratios, strict=True)]
    assert report.after.losses == pytest.approx(found, rel=1e-4)
    assert report.after.preference["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    right = sum(s * (r - kl) > 0 for s, r in zip(signs, ratios, strict=True))
    assert (report.after.preference["right"], report.after.preference["answers"]) == (right, 5)
    assert report.before.loss == 0.5  # the start is the base model
    assert report.after.loss < 0.5
    asked = [answer.question for answer in report.after.answers]
    assert asked == [row["prompt"] for row in rows[:2] if row["label"]]  # unwanted answers are no right ones


def test_a_batch_of_one_at_the_end_of_an_epoch_borrows_the_next_rows_answer(places, tmp_path, monkeypatch):
    seen: list[tuple] = []
    looked = LabelledLoss.look

    def noted(self, model, inputs):
        seen.append((inputs["input_ids"].tolist(), inputs["mismatched"]["input_ids"].tolist()))
        looked(self, model, inputs)

    monkeypatch.setattr(LabelledLoss, "look", noted)
    rows = write(tmp_path / "five.jsonl", 5)
    start(kto(places, tmp_path / "out", data={"train": str(rows)}, train={"max_steps": 2}))
    assert [len(ids) for ids, _ in seen] == [4, 1] == [len(others) for _, others in seen]
    (own,), (other,) = seen[1]
    assert own != other


def test_a_question_with_another_answer_is_no_longer_than_what_the_model_reads(places, tmp_path):
    """GPT-2 has an embedding for each of its positions, and none beyond."""
    settings = GPT2Config(vocab_size=261, n_positions=96, n_embd=16, n_layer=1, n_head=2, eos_token_id=256)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    long = "x" * 50
    rows = [
        {"prompt": f"{n}{long if n % 2 else ''}", "completion": "yes" if n % 2 else long, "label": n % 2 > 0}
        for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {name: str(tmp_path / "rows.jsonl") for name in ("train", "test")}
    wanted = kto(places, tmp_path / "out", data=data, adapter={"target_modules": ["c_fc"]}, train={"max_steps": 2})
    report = start(wanted | {"model": {"name_or_path": str(tmp_path / "model")}})
    assert report.after.preference["kl"] >= 0


# --- interrupted, several processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, pytest.param(6, marks=SLOW), pytest.param(9, marks=SLOW)])
def test_a_run_that_was_cut_goes_on_bit_by_bit(places, tmp_path, monkeypatch, step):
    def wanted(name: str) -> dict:
        train = {"gradient_accumulation_steps": 3, "weight_decay": 0.1, "logging_steps": 4, "max_steps": 3 + step}
        rows = str(write(tmp_path / "rows.jsonl", 21))
        return kto(places, tmp_path / name, adapter={"lora_dropout": 0.2}, train=train, data={"train": rows})

    start(wanted("whole"))
    with monkeypatch.context() as patch:
        cut_at(step, patch)
        with pytest.raises(_CutError):
            start(wanted("out"))
    torch.manual_seed(999)
    start(wanted("out"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert any("kl" in line for line in lines(tmp_path / "out"))


@SLOW
@FSDP2
def test_two_processes_share_one_estimate_of_kl(places, tmp_path):
    """With one estimate for both, and rows that are all alike in a batch, the number of processes changes nothing."""
    path, found = tmp_path / "rows.jsonl", {}
    rows = [{"prompt": "say", "completion": "yes" if n % 2 else "no, no", "label": n % 2 > 0} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    two = ("--processes", "2", "--launch")
    for name, size, arguments in (("one", 4, ()), ("two", 2, (*two, "ddp")), ("split", 2, (*two, "fsdp2"))):
        train = {"per_device_train_batch_size": size, "max_steps": 6, "learning_rate": 0.003, "logging_steps": 1}
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(kto(places, tmp_path / name, train=train, data={"train": str(path)})))
        done = served.dude("train", file, *arguments)
        assert done.returncode == 0, done.stderr
        steps = [{key: line[key] for key in ("loss", "kl")} for line in lines(tmp_path / name) if "loss" in line]
        after = json.loads((tmp_path / name / "report.json").read_text())["after"]
        found[name] = [*steps, dict(enumerate(after["losses"]))]
    assert len(found["one"][-1]) == 5
    for one, *others in zip(*found.values(), strict=True):
        assert others == [pytest.approx(one, abs=2e-5)] * 2


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"per_device_train_batch_size": 1}}, "batch_size.*a batch of 1 has none.*apo_zero_unpaired"),
        ({"train": {"kto": {"beta": 0}}}, "train.kto.beta"),
        ({"train": {"kto": {"desirable_weight": 0}}}, "train.kto.desirable_weight"),
        ({"train": {"kto": {"loss_type": "bco"}}}, "train.kto.loss_type"),
        ({"train": {"kto": {"precompute_ref_log_probs": True}}}, "train.kto.precompute_ref_log_probs"),
        ({"train": {"objective": "dpo", "kto": {}}}, "train.kto.*no effect on train.objective: dpo"),
        ({"data": {"packing": True}}, "data.packing.*kto: the answers are padded"),
        ({"data": {"train_on": "all"}}, "data.train_on.*judged whole"),
        ({"data": {"upft": 4}}, "data.upft.*judged whole"),
        ({"train": {"trainer": "trl"}}, "train.trainer.*takes no labels"),
        ({"train": {"torch_compile": True}}, "torch_compile.*labels is not compiled"),
        ({"adapter": {"bias": "all"}}, "adapter.bias.*no base model"),
        ({"adapter": {"budget": {"parameters": "1%", "by": "fisher"}}}, "adapter.budget.by.*wanted or not"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_what_kto_cannot_do_is_refused_in_one_line(places, tmp_path, sections, words):
    refuses_to_read(tmp_path, kto(places, tmp_path / "out", **sections), words)


def test_a_batch_of_one_is_enough_for_apo_and_one_label_alone_is_told(places, tmp_path, monkeypatch):
    titles: list[str] = []
    same = tmp_path / "same.jsonl"
    same.write_text("".join(f'{{"prompt": "q{n}", "completion": "a", "label": false}}\n' for n in range(4)))
    train = {"per_device_train_batch_size": 1, "max_steps": 2, "kto": {"loss_type": "apo_zero_unpaired"}}
    monkeypatch.setattr(training_run, "loss_curve", lambda *parts: titles.extend(parts[4:]) or b"")
    report = start(kto(places, tmp_path / "out", data={"train": str(same), "test": str(same)}, train=train))
    assert any(text.startswith("all 4 labels are false: what to avoid or prefer") for text in report.warnings)
    assert any(text.startswith("data.test: all 4 labels are false: the scores do not") for text in report.warnings)
    assert titles == ["loss of an answer (kto)"]
    assert "kl" not in report.after.preference
    assert not any("kl" in line or "rewards/chosen" in line for line in lines(tmp_path / "out"))


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "completion": "a", "label": 1}, "'label' is 1; write true for an answer that is wanted"),
        ({"prompt": "q", "completion": "a", "label": "true"}, "'label' is 'true'.*without quotes"),
        ({"prompt": "q", "completion": "a", "label": None}, "'label' is null; write true"),
        ({"prompt": "q", "completion": " ", "label": True}, "'completion' is empty"),
        ({"prompt": "q", "completion": "a"}, "without 'label', which fit train.objective: sft, mol"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "pairs of answers, which fit train.objective: dpo, orpo, cpo",
        ),
        ({"messages": [Q, A], "label": True}, "a label needs one question and one answer"),
        ({"text": "a", "label": True}, "a label needs one question and one answer"),
        # One table of several files: every column in every row, null where it does not apply.
        ({"prompt": None, "completion": None, "text": "a", "label": True}, "a label needs one question and one answer"),
        (
            {"prompt": None, "completion": None, "messages": [Q, A], "label": False},
            "a label needs one question and one",
        ),
        ({"id": 3}, "no labelled answer in the columns"),
    ],
)
def test_bad_rows_are_told_with_their_place(tmp_path, row, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=words) as caught:
        load_rows(str(path), reading=Reading(kind="labels"))
    assert str(caught.value).startswith(f"{path}:1:")
    assert "\n" not in str(caught.value)


def test_labelled_rows_under_another_objective_say_which_they_fit(places, tmp_path):
    with pytest.raises(DataError, match=r"labelled answers, not pairs, which fit train\.objective: kto"):
        start(kto(places, tmp_path / "out", train={"objective": "dpo"}))
    left_out = check_data(places / "train.jsonl", str(places / "model")).left_out
    learns = "(train.objective: kto learns from it) (12 of 24 rows)"
    assert f"left out: label: false, of an answer that is not wanted {learns}, label {learns}" in left_out


def test_one_answer_and_one_label_are_told_before_anything_is_trained(places, tmp_path):
    one, same = tmp_path / "one.jsonl", tmp_path / "same.jsonl"
    one.write_text('{"prompt": "q", "completion": "a", "label": true}\n')
    same.write_text("".join(f'{{"prompt": "q{n}", "completion": "a", "label": false}}\n' for n in range(4)))
    with pytest.raises(DataError, match=r"data\.test: one labelled answer leaves no other to estimate KL from"):
        start(kto(places, tmp_path / "out", data={"test": str(one)}))
    metric = {"metric_for_best_model": "rewards/margins"}
    with pytest.raises(DataError, match=r"rewards/margins needs held-out answers of both labels"):
        start(kto(places, tmp_path / "out", data={"test": str(same)}, evaluation=metric))


# --- rows, plan, report -------------------------------------------------------------------------------------------


def test_data_check_counts_labels_and_tells_a_wrong_balance(places, tmp_path, capsys):
    rows = [{"prompt": f"q{n}", "completion": "a", "label": n % 4 == 0} for n in range(8)]
    rows += [{"prompt": [Q], "completion": [A], "label": True}, {"question": "q", "answer": "a", "label": False}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_data(path, str(places / "model"), objective="kto", quiet=False)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "labels: 3 true, 7 false" in said
    assert "3 wanted and 7 unwanted answers weigh 0.43 to 1" in said
    assert "set train.kto.desirable_weight: 2.33" in said
    assert "1 answers to the same question are labelled both true and false" in said
    assert "example 1, labelled true" in said
    assert "objective: kto" in said
    assert (report.wanted, report.samples[0]) == (3, "<|user|>q0<|end|>\n<|assistant|>«a<|end|>»")
    balanced, one = write(tmp_path / "balanced.jsonl", 8), tmp_path / "one.jsonl"
    one.write_text('{"prompt": "q", "completion": "a", "label": true}\n')
    assert not check_data(balanced, str(places / "model"), objective="kto").left_out
    (line,) = check_data(balanced, str(places / "model"), objective="kto", test=str(one)).left_out
    assert line.startswith("held-out: all 1 labels are true: the scores do not show")


@pytest.mark.parametrize("settings", [{"undesirable_weight": 400}, {"desirable_weight": 400}])
def test_no_weight_is_named_that_the_key_would_refuse(settings):
    class Labels(np.ndarray):
        contradictions = 0
        labels = property(np.asarray)

    for wanted in (1, 400):
        examples = (np.arange(500) < wanted).view(Labels)
        (line,) = told_of_labels(examples, KtoSection(**settings))
        named = re.search(r"set train\.kto\.(\w+): (\S+)$", line)
        assert named or line.endswith("no weight makes up for that; add answers with the rarer label")
        if named:
            KtoSection(**{**settings, named[1]: float(named[2])})


def test_labels_are_part_of_what_a_run_was_trained_on(tmp_path):
    tokenizer, hashes, path = tiny_tokenizer(), [], tmp_path / "rows.jsonl"
    for label in ("true", "false"):
        path.write_text(f'{{"prompt": "a", "completion": "b", "label": {label}}}\n' * 2)
        for _ in range(2):  # made, and found again
            made = prepare(path, Template(tokenizer, "plain"), tokenizer, max_length=64, kind="labels", cache=tmp_path)
            assert made.labels.tolist() == [label == "true"] * 2
        hashes.append({made.sha256, made.tokens_sha256})
    assert not hashes[0] & hashes[1]


def test_a_run_on_builtin_rows_learns_them_and_its_page_says_so(places, tmp_path):
    path = tmp_path / "run.yaml"
    data = {"train": "builtin:unpaired-preferences", "test": 0.2, "train_rows": 40}
    path.write_text(json.dumps(kto(places, tmp_path / "out", data=data, train={"max_steps": 4})))
    made = plan(path)
    assert (made.rows.rows, made.as_dict()["batch"]["rows"]) == (32, 4)
    assert any("mismatched answers" in text for text in made.warnings)
    done = served.dude("train", path)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert all(words in said for words in ("margin", "kl 0.", "answers judged right")), said  # a narrow column wraps
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["data"]["train"]["examples"] == 32
    assert report["after"]["preference"]["answers"] == 8 == len(report["after"]["losses"])
    done = served.dude("report", tmp_path / "out", "-o", tmp_path / "out.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.md").read_text()
    assert all(words in page for words in ("preference loss an answer", "Held-out answers", "side of their label"))


def test_the_builtin_rows_are_the_pairs_answers_in_turn():
    rows = load_rows("builtin:unpaired-preferences", limit=6, reading=Reading(kind="labels"))
    pairs = load_rows("builtin:preferences", limit=6, reading=Reading(kind="pairs"))
    assert [row.label for row in rows] == [True, False] * 3
    for row, pair in zip(rows, pairs, strict=True):
        assert row.messages[:-1] == pair.prompt
        assert row.answer == (pair.messages if row.label else pair.rejected)[-1].content
        assert row.is_learned
