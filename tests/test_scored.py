"""`train.objective: reward` as users run it: against TRL, interrupted, loaded by stock PEFT, with bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import served
import torch
import transformers
from families import FAMILIES
from safetensors.torch import load_file
from test_preference import lines, order_of_rows, refuses_to_read, same_losses_and_adapter, start
from test_preference import settings as of_pairs
from test_train_resume import _CutError, cut_at, in_process, result, wait_for_a_checkpoint
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from dude_peft import DudeConfig, check_data, export, generate, load_adapter, merge, plan, verify
from dude_peft.config.schema import RunConfig
from dude_peft.data.formats import Reading
from dude_peft.data.rows import load_rows
from dude_peft.errors import ConfigError, DataError
from dude_peft.training.strategy import check_strategy

SLOW = pytest.mark.slow
WEIGHTS = "adapter/adapter_model.safetensors"
HEAD = "base_model.model.score.weight"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    save_tiny(folder / "model")
    write_pairs(folder / "train.jsonl", 22)  # with batches of 2, three to a step, an epoch ends with a short step
    write_pairs(folder / "test.jsonl", 6, start=100)
    return folder


def write_pairs(path: Path, count: int, *, start: int = 0, margin: bool = False) -> Path:
    """Pairs of many lengths; the answer with `yes` in it is the better one, wherever it stands."""
    rows = [
        {
            "prompt": f"say {n}",
            "chosen": "so " * (n % 3) + "yes" + "!" * (n % 5),
            "rejected": "so " * (n % 2) + f"no {n * n}" + "!" * (n % 4),
            **({"margin": (n % 4) / 2} if margin else {}),
        }
        for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(places: Path, out: Path, **sections: dict) -> dict:
    train = {"objective": "reward", **sections.pop("train", {})}
    data = {"template": "chat", **sections.pop("data", {})}
    wanted = of_pairs(places, out, train=train, data=data, **sections)
    wanted["evaluation"] = {"eval_steps": 4, **sections.get("evaluation", {})}  # its model answers nothing
    return wanted


def scorer(places: Path, **settings):
    """The base model under a head that another process drew."""
    torch.manual_seed(1234)
    return AutoModelForSequenceClassification.from_pretrained(places / "model", num_labels=1, **settings)


def texts(path: Path, side: str) -> list[str]:
    """Conversations as anybody writes them for a reward model."""
    tokenizer = tiny_tokenizer()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}], tokenize=False
        )
        for row in rows
    ]


def scores(model, path: Path) -> dict[str, torch.Tensor]:
    """The rewards that stock code reads off a model, all conversations of a side in one batch."""
    tokenizer = tiny_tokenizer()
    found = {}
    for side in ("chosen", "rejected"):
        batch = tokenizer(texts(path, side), add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            out = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found[side] = out.logits[:, 0]
    return found


# --- equal to TRL -------------------------------------------------------------------------------------------------


def by_trl(wanted: dict, order: list[int], folder: Path):
    """TRL's own trainer, which loads the model, draws the head and reads the rows by itself, in the same order."""
    datasets = pytest.importorskip("datasets", reason="the trainers read datasets; install dude-peft[train]")
    trl = pytest.importorskip("trl", reason="TRL is not here: pip install 'dude-peft[trl]'")

    class InOrder(trl.RewardTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = RunConfig(**wanted).resolved()
    train = config.train
    rows = [json.loads(line) for line in Path(wanted["data"]["train"]).read_text().splitlines()]
    asked = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
            **({"margin": row["margin"]} if "margin" in row else {}),
        }
        for row in (rows[n] for n in order)
    ]
    trainer = InOrder(
        model=wanted["model"]["name_or_path"],
        peft_config=DudeConfig(**config.adapter.settings(), task_type="SEQ_CLS"),
        args=trl.RewardConfig(
            **train.preference.model_dump(), seed=train.seed,
            output_dir=str(folder), max_steps=train.max_steps, learning_rate=train.learning_rate, optim=train.optim,
            per_device_train_batch_size=train.per_device_train_batch_size, lr_scheduler_type=train.lr_scheduler_type,
            gradient_accumulation_steps=train.gradient_accumulation_steps, warmup_steps=0, max_grad_norm=1.0,
            bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no",
            dataloader_pin_memory=False, disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=datasets.Dataset.from_list(asked),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("method", "optim", "section", "margin"),
    [
        ("dude", "adamw_torch", {"center_rewards_coefficient": 0.01}, True),
        pytest.param("pissa", "sgd", {}, False, marks=SLOW),
        pytest.param("dude", "sgd", {}, True, marks=SLOW),
    ],
)
def test_twenty_steps_are_trls(places, tmp_path, monkeypatch, method, optim, section, margin):
    order = order_of_rows(monkeypatch)
    rows = write_pairs(tmp_path / "train.jsonl", 22, margin=margin)
    train = {
        "max_steps": 20, "logging_steps": 1, "optim": optim, "learning_rate": 1e-2 if optim != "sgd" else 1.0,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "seed": 3, "reward": section,
    }  # fmt: skip
    wanted = settings(places, tmp_path / "ours", adapter={"method": method}, train=train, data={"train": str(rows)})
    wanted["evaluation"] = {"enabled": False}
    start(wanted)
    trainer = by_trl(wanted, order, tmp_path / "trl")
    ours, theirs = same_losses_and_adapter(trainer, tmp_path)
    for name, their in (("rewards/margins", "margin"), ("rewards/accuracies", "accuracy")):
        assert [line[name] for line in ours] == pytest.approx([line[their] for line in theirs], abs=1e-5), name
    assert HEAD in load_file(tmp_path / "ours" / WEIGHTS)


# --- what is saved ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    rows = str(write_pairs(out.parent / "train.jsonl", 64))
    report = start(settings(places, out, data={"train": rows}, train={"max_steps": 24}))
    return out, report


def test_it_learns_a_planted_preference(trained):
    out, report = trained
    before, after = report.before.preference, report.after.preference
    assert after["right"] == after["pairs"] == 6
    assert after["rewards/accuracies"] == 1.0
    assert after["rewards/margins"] > before["rewards/margins"] + 2
    assert before["interval"][0] <= before["rewards/accuracies"] <= before["interval"][1]
    assert report.before.answers == report.after.answers == ()
    found = [line for line in lines(out) if "eval_loss" in line]
    assert found[-1]["eval_rewards/margins"] == after["rewards/margins"]


def test_stock_peft_and_load_adapter_give_the_scores_of_the_run(places, trained):
    out, report = trained
    base = scorer(places, pad_token_id=257)
    stock = scores(peft.PeftModel.from_pretrained(base, out / "adapter"), places / "test.jsonl")
    ours = scores(load_adapter(scorer(places), out / "adapter"), places / "test.jsonl")
    margins = stock["chosen"] - stock["rejected"]
    assert float(margins.mean()) == pytest.approx(report.after.preference["rewards/margins"], abs=1e-4)
    losses = -torch.nn.functional.logsigmoid(margins)
    assert report.after.losses == pytest.approx(losses.tolist(), abs=1e-4)
    for side in stock:
        assert torch.allclose(stock[side], ours[side], atol=1e-5)


def test_another_padding_token_is_set_back_with_a_warning(places, trained):
    out, _ = trained
    base = scorer(places, pad_token_id=1)
    with pytest.warns(UserWarning, match="trained with pad_token_id 257, the model has 1"):
        model = load_adapter(base, out / "adapter")
    assert model.config.pad_token_id == 257


def test_the_head_follows_from_the_seed(places, tmp_path):
    heads = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        start(settings(places, tmp_path / name, train={"seed": seed, "max_steps": 1, "learning_rate": 1e-30}))
        heads.append(load_file(tmp_path / name / WEIGHTS)[HEAD])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# --- exported, planned, refused elsewhere ---------------------------------------------------------------------------


def test_a_merged_folder_gives_the_scores_of_the_live_adapter(places, trained, tmp_path):
    out, _ = trained
    made = merge(out / "adapter", tmp_path / "merged", verify=False)
    config = json.loads((made.path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == 257
    names = set(load_file(made.path / "model.safetensors"))
    assert "score.weight" in names
    assert "lm_head.weight" not in names
    merged, found = AutoModelForSequenceClassification.from_pretrained(made.path, output_loading_info=True)
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.config.num_labels == 1
    live = scores(load_adapter(scorer(places), out / "adapter"), places / "test.jsonl")
    for side, rewards in scores(merged, places / "test.jsonl").items():
        assert torch.allclose(rewards, live[side], atol=1e-4)
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification, which gives scores and writes nothing"):
        generate(made.path, ["hi"])
    again = settings(places, tmp_path / "again", model={"name_or_path": str(made.path)}, train={"max_steps": 1})
    report = start(again)
    margin = float((live["chosen"] - live["rejected"]).mean())
    assert report.before.preference["rewards/margins"] == pytest.approx(margin, abs=1e-4)
    assert list(report.model["head"]) == ["xxh3"]  # it brought its head along


def trains_and_agrees(places: Path, folder: Path, rows: Path, **sections: dict) -> None:
    """A few steps on the model in a folder; stock PEFT and the merged model give the scores of the run."""
    model = {"name_or_path": str(folder / "model"), **sections.pop("model", {})}
    wanted = settings(places, folder / "out", model=model, **sections)
    report = start(wanted)
    assert report.after.preference["rewards/margins"] != report.before.preference["rewards/margins"]
    loads = {"num_labels": 1, "pad_token_id": 257, "dtype": "auto"}
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", **loads)
    stock = scores(peft.PeftModel.from_pretrained(base, folder / "out/adapter"), rows)
    made = merge(folder / "out/adapter", folder / "merged", verify=False)
    merged = scores(AutoModelForSequenceClassification.from_pretrained(made.path, dtype="auto"), rows)
    near = 1e-4 if base.dtype == torch.float32 else 0.03
    margin = float((stock["chosen"] - stock["rejected"]).float().mean())
    assert margin == pytest.approx(report.after.preference["rewards/margins"], abs=near)
    for side in stock:
        assert torch.allclose(stock[side].float(), merged[side].float(), atol=near)


def test_a_base_in_bfloat16(places, tmp_path):
    save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    train = {"max_steps": 4, "bf16": True, "gradient_checkpointing": True}
    trains_and_agrees(places, tmp_path, places / "test.jsonl", train=train)


@pytest.mark.slow
def test_a_quantised_base_keeps_its_head_and_merges(places, tmp_path):
    pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes: pip install 'dude-peft[quant]'")
    model = {"name_or_path": str(places / "model"), "quantization": "nf4"}
    report = start(settings(places, tmp_path / "out", model=model, train={"max_steps": 5}))
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = scorer(places, quantization_config=how, device_map={"": "cpu"})
    assert type(base.score) is torch.nn.Linear  # no score of a run is read through 4 bits
    found = scores(load_adapter(base, tmp_path / "out/adapter"), places / "test.jsonl")
    margin = float((found["chosen"] - found["rejected"]).mean())
    assert margin == pytest.approx(report.after.preference["rewards/margins"], abs=1e-4)
    assert merge(tmp_path / "out/adapter", tmp_path / "merged").record["difference"]["score"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mistral", "Mixtral", "Qwen3", "Gemma 2", "GPT-2", "GPT-NeoX"])
def test_other_families(places, tmp_path, family):
    torch.manual_seed(0)
    FAMILIES[family].make().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    adapter = {"target_modules": "all-linear"}
    trains_and_agrees(places, tmp_path, places / "test.jsonl", adapter=adapter, train={"max_steps": 3})


@pytest.mark.slow
@pytest.mark.parametrize("to", ["merged", "peft"])
def test_an_export_is_proved_in_a_process_of_its_own(trained, tmp_path, to):
    out, _ = trained
    made = export(out / "adapter", to, tmp_path / "made")
    assert made.record["verified"]
    assert made.record["difference"]["score"] < 1e-4
    card = (made.path / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "vLLM" not in card


def test_what_reads_the_adapter_says_that_it_scores(trained, tmp_path):
    out, report = trained
    found = verify(out / "adapter")
    assert found.saved_whole == ("score.weight",)
    assert found.serving == ()
    assert found.stock_refusal == ""
    said = "is for SEQ_CLS: it gives scores, as a reward model does, and writes nothing"
    with pytest.raises(ConfigError, match=said):
        generate(out / "adapter", ["hi"])
    for to in ("gguf", "lora:8"):
        with pytest.raises(ConfigError, match=f"--to {to[:4]}.*is a reward model"):
            export(out / "adapter", to, tmp_path / "made")
    with pytest.raises(ConfigError, match="--max-kl compares next tokens"):
        export(out / "adapter", "peft", tmp_path / "made", max_kl=0.1)
    assert report.model["head"]["drawn_with_seed"] == 0
    assert not (tmp_path / "made").exists()


def test_a_plan_counts_both_conversations_and_no_vocabulary(places, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings(places, tmp_path / "out")))
    made = plan(path)
    assert made.rows.rows == 22
    assert made.as_dict()["batch"]["rows"] == 4
    assert not made.cost.uncounted
    report = check_data(places / "train.jsonl", str(places / "model"), objective="reward")
    assert made.rows.tokens_per_row == pytest.approx(report.tokens / 22)
    path.write_text(json.dumps(settings(places, tmp_path / "out", train={"objective": "orpo"})))
    others = plan(path).cost.bill
    assert made.cost.bill.weights == others.weights - 4 * 64 * 261 + 4 * 64  # no output layer; the head that was drawn
    assert made.cost.bill.trained == others.trained + 4 * 64
    assert made.cost.bill.logits_and_loss < others.logits_and_loss


@pytest.mark.slow
def test_a_run_from_a_new_configuration_has_a_page_and_a_card(places, tmp_path):
    written = tmp_path / "run.yaml"
    done = served.dude(
        "config", "new", "builtin:preferences", "--model", places / "model", "--objective", "reward", "-o", written
    )
    assert done.returncode == 0, done.stderr
    assert "objective: reward" in written.read_text()
    how = ["data.train_rows=40", "data.max_length=512", f"output_dir={tmp_path / 'out'}", "adapter.r=2"]
    how += ["train.num_train_epochs=1", "adapter.budget={parameters: 5%}"]
    done = served.dude("train", written, *(word for each in how for word in ("--set", each)))
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "pairs ranked right, by reward" in said
    assert "dude verify" in said
    assert "dude chat" not in said
    card = (tmp_path / "out/adapter/README.md").read_text()
    assert "num_labels=1, pad_token_id=257" in card
    assert "pairs ranked right, 95 % interval" in card
    done = served.dude("report", tmp_path / "out", "-o", tmp_path / "out.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.md").read_text()
    assert all(words in page for words in ("preference loss a pair", "Held-out pairs", "Rewards of the pairs"))


# --- interrupted --------------------------------------------------------------------------------------------------


def interrupted(places: Path, out: Path) -> dict:
    train = {"gradient_accumulation_steps": 3, "weight_decay": 0.1, "logging_steps": 4}
    return settings(places, out, adapter={"lora_dropout": 0.2}, train=train)


@pytest.mark.parametrize("step", [3, pytest.param(6, marks=SLOW), pytest.param(9, marks=SLOW)])
def test_a_run_that_was_cut_goes_on_bit_by_bit(places, tmp_path, monkeypatch, step):
    start(interrupted(places, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        cut_at(step, patch)
        with pytest.raises(_CutError):
            start(interrupted(places, tmp_path / "out"))
    torch.manual_seed(999)
    start(interrupted(places, tmp_path / "out"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
def test_a_killed_process_goes_on_bit_by_bit(places, tmp_path):
    def process(name: str) -> subprocess.Popen:
        return in_process(tmp_path, interrupted(places, tmp_path / name))

    assert process("whole").wait() == 0
    running = process("out")
    wait_for_a_checkpoint(tmp_path / "out", running)
    running.kill()
    running.wait()
    assert not (tmp_path / "out/report.json").exists()
    assert process("out").wait() == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo as on POSIX")
def test_two_processes_train_as_one(places, tmp_path):
    found, rows = {}, str(write_pairs(tmp_path / "train.jsonl", 24, margin=True))
    for name, size, arguments in (("one", 4, []), ("two", 2, ["--launch", "ddp", "--processes", "2"])):
        train = {"per_device_train_batch_size": size, "max_steps": 4, "learning_rate": 0.003}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(settings(places, tmp_path / name, train=train, data={"train": rows})))
        done = served.dude("train", path, *arguments)
        assert done.returncode == 0, done.stderr
        found[name] = [
            {key: line[key] for key in line if "loss" in key or "/" in key} for line in lines(tmp_path / name)
        ]
    for one, two in zip(*found.values(), strict=True):
        assert two == pytest.approx(one, abs=2e-5)
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_processes_that_share_one_model_are_refused(places, tmp_path):
    config = RunConfig(**settings(places, tmp_path / "out"))
    assert check_strategy(config, "ddp", 2, scored=False) == []
    for strategy in ("fsdp2", "zero3"):
        with pytest.raises(ConfigError, match=f"reward: {strategy} does not split its head; choose ddp"):
            check_strategy(config, strategy, 2, scored=False)


# --- rows, refused ------------------------------------------------------------------------------------------------


def test_conversations_are_read_to_the_end_that_the_chat_template_writes(places, tmp_path):
    tokenizer = tiny_tokenizer()
    found = check_data(places / "test.jsonl", str(places / "model"), objective="reward").samples
    said = [text.replace("«", "").replace("»", "") for text in found]
    assert said[0] == texts(places / "test.jsonl", "chosen")[0]
    assert said[1] == texts(places / "test.jsonl", "rejected")[0]
    assert said[0].endswith(tokenizer.eos_token + "\n")
    told = served.dude(
        "data", "check", places / "test.jsonl", "--model", places / "model", "--objective", "reward"
    ).stdout
    assert "objective: reward" in told
    assert "trained end" not in told


def test_margins_are_read_and_change_the_tokens_hash(places, tmp_path):
    rows = load_rows(str(write_pairs(tmp_path / "m.jsonl", 4, margin=True)), reading=Reading(kind="scores"))
    assert [row.margin for row in rows] == [0.0, 0.5, 1.0, 1.5]
    assert rows[0].shape == "prompt + chosen + rejected + margin"
    (dpo, *_) = load_rows(str(tmp_path / "m.jsonl"), reading=Reading(kind="pairs"))
    assert (dpo.margin, dpo.left_out) == (None, ("margin",))
    for value, words in (
        ("1", r"'margin' is '1'; write a number"),
        (True, "'margin' is True"),
        (1e9, "'margin' is 1000000000"),
    ):
        path = tmp_path / "bad.jsonl"
        path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b", "margin": value}) + "\n")
        with pytest.raises(DataError, match=words):
            load_rows(str(path), reading=Reading(kind="scores"))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"packing": True}}, "data.packing.*padded to one length"),
        ({"train": {"trainer": "trl"}}, "train.trainer.*takes no pairs"),
        ({"train": {"torch_compile": True}}, "torch_compile.*not compiled"),
        ({"adapter": {"start": "x"}}, "adapter.start.*no head"),
        ({"model": {"trust_remote_code": True}}, "trust_remote_code.*transformers' own"),
        ({"evaluation": {"tasks": ["gsm8k"]}}, "evaluation.tasks.*gives scores"),
        ({"evaluation": {"tasks_text": "x.txt"}}, "evaluation.tasks_text.*writes no text"),
        ({"data": {"general_test": "x.jsonl"}}, "data.general_test.*no text to compare"),
        ({"train": {"curriculum": {"by": "length"}}}, "train.curriculum.*reward"),
        ({"train": {"reward": {"beta": 0.1}}}, "train.reward.beta"),
        ({"train": {"reward": {"center_rewards_coefficient": 0}}}, "center_rewards_coefficient"),
        ({"train": {"objective": "dpo", "reward": {}}}, "train.reward.*no effect on train.objective: dpo"),
        ({"train": {"reward": {}, "dpo": {}}}, "train.dpo.*no effect on train.objective: reward"),
        ({"evaluation": {"metric_for_best_model": "reward"}}, "reward is measured by train.objective: grpo"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_what_a_reward_model_cannot_do_is_refused_in_one_line(places, tmp_path, sections, words):
    refuses_to_read(tmp_path, settings(places, tmp_path / "out", **sections), words)


def test_rows_that_do_not_fit_are_refused(places, tmp_path):
    answers, same = tmp_path / "answers.jsonl", tmp_path / "same.jsonl"
    answers.write_text('{"prompt": "q", "completion": "a"}\n')
    same.write_text('{"prompt": "q", "chosen": "a", "rejected": "a"}\n')
    (tmp_path / "text.txt").write_text("hi\n")
    for rows, words in (
        (answers, "answers.jsonl:1: rows of answers.*train.objective: sft, mol"),
        (same, "in all 1 pairs the chosen and the rejected answer are the same"),
        ("builtin:word-problems", "word-problems: its rows fit train.objective: sft"),
        (tmp_path / "text.txt", "text has no pairs"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            start(settings(places, tmp_path / "out", data={"train": str(rows)}))
        assert "\n" not in str(caught.value)


def test_a_family_without_a_sequence_classification_is_refused_by_name(places, tmp_path):
    from transformers import CohereConfig, CohereForCausalLM

    small = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    CohereForCausalLM(CohereConfig(**small, **heads, pad_token_id=257)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    wanted = settings(places, tmp_path / "out", model={"name_or_path": str(tmp_path / "model")})
    with pytest.raises(ConfigError, match="no sequence classification for a CohereConfig; use a model of another"):
        start(wanted)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(places, tmp_path):
    save_tiny(tmp_path / "model", pad_token_id=None)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    wanted = settings(places, tmp_path / "out", model={"name_or_path": str(tmp_path / "model")})
    report = start(wanted | {"evaluation": {"batch_size": 3}})
    model = load_adapter(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1), tmp_path / "out/adapter"
    )
    assert model.config.pad_token_id == 256
    alone = []
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts(places / "test.jsonl", side)]
            alone.append(torch.cat([model.eval()(input_ids=row).logits[:, 0] for row in rows]))
    margin = float((alone[0] - alone[1]).mean())
    assert report.after.preference["rewards/margins"] == pytest.approx(margin, abs=1e-4)
