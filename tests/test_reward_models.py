"""A reward model as a reward of `train.objective: grpo`, and what a resumed run knows of its rewards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_preference import start
from test_rewarded import LETTERS, code, grpo, interrupted, judge_of, rollouts, whole_result, write
from test_scored import settings as reward_run
from test_scored import write_pairs
from test_train_resume import _CutError, cut_at
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dude_peft import load_adapter, merge, plan
from dude_peft.config.schema import RewardSection
from dude_peft.data.encode import judged_ids
from dude_peft.data.formats import Message, Row
from dude_peft.data.template import Template
from dude_peft.errors import ArtifactError, ConfigError, DataError
from dude_peft.rewards.reward_model import load_reward_model

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A policy with its rows, and a reward model on another base: as an adapter, and merged."""
    folder = tmp_path_factory.mktemp("judged")
    save_tiny(folder / "model")
    generation = {"eos_token_id": [256, *range(150, 180)], "pad_token_id": 257}
    (folder / "model/generation_config.json").write_text(json.dumps(generation))
    write(folder / "train.jsonl", 10)
    write(folder / "test.jsonl", 4, start=100)
    own = folder / "judge"
    save_tiny(own / "model", seed=1)
    write_pairs(own / "train.jsonl", 22)
    write_pairs(own / "test.jsonl", 2, start=100)
    start(reward_run(own, own / "run", train={"max_steps": 6}))
    merge(own / "run/adapter", folder / "merged", verify=False)
    return folder


def by(model: Path, **more: object) -> dict:
    return {"kind": "model", "model": str(model), **more}


def stock_scores(model, lines: list[dict], rows: Path) -> list[float]:
    """What anybody's code gives the conversations of some rollouts, one at a time."""
    tokenizer = tiny_tokenizer()
    asked = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
    found = []
    for line in lines:
        said = [
            {"role": "user", "content": asked[int(line["row"].rpartition(":")[2]) - 1]},
            {"role": "assistant", "content": line["completion"]},
        ]
        ids = tokenizer(tokenizer.apply_chat_template(said, tokenize=False), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found.append(float(model.eval()(input_ids=torch.tensor([ids])).logits[0, 0]))
    return found


def test_the_score_is_that_of_the_rows_messages_by_the_models_own_template(places, tmp_path):
    rewards = [by(places / "judge/run/adapter", name="adapter"), by(places / "merged", name="merged"), LETTERS]
    wanted = grpo(places, tmp_path / "out", section={"rewards": rewards}, train={"max_steps": 2})
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(wanted))
    made = plan(path).cost.bill
    report = start(wanted)
    found = rollouts(tmp_path / "out")
    base = AutoModelForSequenceClassification.from_pretrained(places / "judge/model", num_labels=1)
    expected = stock_scores(load_adapter(base, places / "judge/run/adapter"), found, places / "train.jsonl")
    assert [line["rewards"]["adapter"] for line in found] == pytest.approx(expected, abs=1e-4)
    assert [line["rewards"]["merged"] for line in found] == pytest.approx(expected, abs=1e-3)
    assert max(expected) > min(expected) + 0.01
    assert report.after.rewards["rewards/adapter/mean"] == pytest.approx(
        report.after.rewards["rewards/merged/mean"], abs=1e-3
    )
    held = sum(tensor.nbytes for tensor in load_file(places / "merged/model.safetensors").values())
    adapter = (places / "judge/run/adapter/adapter_model.safetensors").stat().st_size
    assert 2 * held < made.reward_models < 2 * held + 1.1 * adapter + 10_000


def test_a_cut_run_goes_on_bit_by_bit_with_its_reward_model_and_refuses_another(places, tmp_path, monkeypatch):
    judge = tmp_path / "judge"
    shutil.copytree(places / "merged", judge)
    section = {"rewards": [by(judge, name="scorer")]}
    start(interrupted(places, tmp_path / "whole", section))
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(_CutError):
            start(interrupted(places, tmp_path / "out", section))
    weights, template = judge / "model.safetensors", judge / "chat_template.jinja"
    kept = weights.read_bytes(), template.read_text()
    tensors = load_file(weights)
    tensors["score.weight"][0, 0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"scorer is not the reward model that this run started with \(weights .* th"):
        start(interrupted(places, tmp_path / "out", section))
    weights.write_bytes(kept[0])
    template.write_text(kept[1] + "!")
    with pytest.raises(ConfigError, match=r"scorer is not the reward model .*\(chat template\); restore it"):
        start(interrupted(places, tmp_path / "out", section))
    template.write_text(kept[1])
    torch.manual_seed(999)
    start(interrupted(places, tmp_path / "out", section))
    assert whole_result(tmp_path / "out") == whole_result(tmp_path / "whole")


def test_a_cut_run_refuses_another_helper_of_its_rewards(places, tmp_path, monkeypatch):
    section = code(tmp_path, "return [helpers.SCALE * len(ids) for ids in others['completion_ids']]")
    source = tmp_path / "rewards.py"
    source.write_text(f"import helpers\n{source.read_text()}")
    helper = tmp_path / "helpers.py"
    helper.write_text("SCALE = 0.1\n")
    with monkeypatch.context() as patch:
        cut_at(1, patch)
        with pytest.raises(_CutError):
            start(grpo(places, tmp_path / "out", section=section, train={"max_steps": 2}))
    recorded = json.loads((tmp_path / "out/run.json").read_text())["rewards"]["beside"]
    assert list(recorded) == [str(helper)]
    helper.write_text("SCALE = 0.2\n")
    with pytest.raises(ConfigError, match=r"helpers\.py, which a file of rewards imports, is not as it was .*restore"):
        start(grpo(places, tmp_path / "out", section=section, train={"max_steps": 2}))
    helper.write_text("SCALE = 0.1\n")
    start(grpo(places, tmp_path / "out", section=section, train={"max_steps": 2}))


def test_a_helper_that_is_imported_when_a_reward_is_called_is_part_of_the_run_as_well(tmp_path):
    section = code(tmp_path, "import helpers\n    from pack.inner import SCALE\n    return [0.0] * len(completions)")
    for name, text in {
        "helpers.py": "def late():\n    import deeper\n",
        "deeper.py": "import json, helpers\n",
        "pack/__init__.py": "",
        "pack/inner.py": "from . import beside\nSCALE = 1\n",
        "pack/beside.py": "",
        "unused.py": "",
        "json.py.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    judge = judge_of(section)
    judge.close()
    names = ["deeper.py", "helpers.py", "pack/__init__.py", "pack/beside.py", "pack/inner.py"]
    assert list(judge.beside) == [str(tmp_path / name) for name in names]


# --- refused ------------------------------------------------------------------------------------------------------


def changed(places: Path, folder: Path, **config: object) -> Path:
    """The merged reward model with other lines in its config.json."""
    shutil.copytree(places / "merged", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_what_is_no_reward_model_is_refused_in_one_line(places, tmp_path):
    labels = changed(places, tmp_path / "labels", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    bare = changed(places, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    headless = changed(places, tmp_path / "headless")
    tensors = load_file(headless / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, headless / "model.safetensors", {"format": "pt"})
    untold = changed(places, tmp_path / "untold")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (untold / name).unlink()
    for model, kind, words in (
        (tmp_path / "nowhere", ConfigError, r"no folder .*nowhere; check the path, or give a hub id"),
        (places / "judge/run", ConfigError, r"is a run's folder; give the adapter inside it"),
        (labels, ConfigError, r"has 2 labels; a reward is one number"),
        (places / "model", ConfigError, r"is a LlamaForCausalLM, which has no head of scores; name a reward model"),
        (bare, ConfigError, r"has no chat template; save one with it, or set template: plain"),
        (headless, ArtifactError, r"lacks 1 tensors of LlamaForSequenceClassification, among them score.weight"),
        (untold, ConfigError, r"tokenizer .*untold.*cannot be loaded"),
    ):
        with pytest.raises(kind, match=rf"^train\.grpo\.rewards: scorer: .*{words}") as caught:
            start(grpo(places, tmp_path / "out", section={"rewards": [by(model, name="scorer")]}))
        assert "\n" not in str(caught.value)
        assert "name_or_path" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@SLOW
def test_an_adapter_of_a_language_model_is_no_reward_model(places, tmp_path):
    start(grpo(places, tmp_path / "first", train={"max_steps": 1}))
    rewards = [by(tmp_path / "first/adapter")]
    with pytest.raises(ConfigError, match=r"rewards: model: adapter .* is of a language model and has no head"):
        start(grpo(places, tmp_path / "out", section={"rewards": rewards}))


def test_long_conversations_and_scores_that_are_no_numbers_end_the_run_with_prompt_and_row(places, tmp_path):
    short = changed(places, tmp_path / "short", max_position_embeddings=30)
    words = r"train\.jsonl:\d+: the reward model reads 30 tokens at most, and the conversation has 31, on the prompt '"
    with pytest.raises(DataError, match=words):
        start(grpo(places, tmp_path / "out", section={"rewards": [by(short)]}))
    broken = changed(places, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["score.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        DataError, match=r"train\.jsonl:4: the reward model gave nan for the answer .*on the prompt"
    ) as caught:
        start(grpo(places, tmp_path / "other", section={"rewards": [by(broken)]}))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"kind": "model"}, "model needs 'model'"),
        ({"kind": "answer", "model": "x"}, "'model' has no effect on answer"),
        ({"kind": "function", "file": "a.py", "function": "f", "template": "chat"}, "'template' has no effect"),
        ({"kind": "model", "model": "x", "sha256": "0"}, "'sha256' has no effect on model"),
    ],
)
def test_keys_of_other_kinds_are_refused(reward, words):
    with pytest.raises(ValueError, match=words):
        RewardSection(**reward)


# --- what is read -------------------------------------------------------------------------------------------------


def test_a_template_may_leave_out_what_it_likes_of_a_judged_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] | trim }}"
    )
    asked = (
        Message("system", "Be brief."),
        Message("user", "one?"),
        Message("assistant", "1"),
        Message("user", "two?"),
    )
    template = Template(tokenizer, "chat").unclosed()
    for answer in ("2", "", "<think>so</think> 2", "say <|end|>, or <|user|>"):
        row = Row((*asked, Message("assistant", answer)), "rows.jsonl:1")
        said = tokenizer.apply_chat_template([each.as_dict() for each in row.messages], tokenize=False)
        (ids,) = judged_ids([row], template, tokenizer)
        assert tokenizer.decode(ids) == said
        assert ids.count(tokenizer.eos_token_id) == len(row.messages)  # what the answer spells is text


@SLOW
def test_a_plain_template_and_a_checkpoint_without_padding_are_read(places, tmp_path):
    judge = changed(places, tmp_path / "judge", pad_token_id=None)
    (judge / "chat_template.jinja").unlink()
    found = load_reward_model(RewardSection(**by(judge, template="plain")), "auto", "cpu")
    row = Row((Message("user", "how?"), Message("assistant", "")), "rows.jsonl:1")
    scores = found.scores(row, ["so", "otherwise, and at length"])
    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    for answer, score in zip(("so", "otherwise, and at length"), scores, strict=True):
        text = f"### Question:\nhow?\n\n### Answer:\n{answer}<|end|>"
        ids = AutoTokenizer.from_pretrained(judge)(text, add_special_tokens=False)["input_ids"]
        assert score == pytest.approx(float(model(input_ids=torch.tensor([ids])).logits[0, 0]), abs=1e-5)


@SLOW
def test_pass_rates_by_a_reward_model_are_kept_for_this_model_alone(places, tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))
    curriculum = {"by": "pass_rate", "samples": 2, "stages": 2, "reward": "scorer", "threshold": 0.0, "drop": {}}
    other = changed(places, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "score.weight": -tensors["score.weight"]}, other / "model.safetensors", {"format": "pt"})
    rates = []
    for number, judge in enumerate((places / "merged", tmp_path / "moved", other)):
        if number == 1:
            shutil.copytree(places / "merged", judge)
        section = {"rewards": [by(judge, name="scorer")]}
        out = tmp_path / f"out{number}"
        start(grpo(places, out, section=section, train={"max_steps": 2, "curriculum": curriculum}))
        lines = (out / "curriculum.jsonl").read_text().splitlines()
        rates.append([json.loads(line)["pass_rate"] for line in lines])
        assert len(list((tmp_path / "cache/pass_rates").iterdir())) == (1 if number < 2 else 2)
    assert rates[0] == rates[1]
    assert [1 - rate for rate in rates[0]] == pytest.approx(rates[2])
