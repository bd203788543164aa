"""`train.curriculum`: stages by measured pass rates or by length, their order, interruptions, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import served
import torch
from test_preference import lines, settings, start
from test_rewarded import LETTERS, grpo, rollouts, write
from test_train_resume import _CutError, cut_at, digest, in_process, result, wait_for_a_checkpoint
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM, set_seed

from dude_peft import check_data, plan
from dude_peft.answer.cache import AnswerCache
from dude_peft.artifact.sealed import sealed
from dude_peft.config.reading import load_config
from dude_peft.config.schema import CurriculumSection, RunConfig
from dude_peft.data.answers import same_answer
from dude_peft.errors import ConfigError, DataError
from dude_peft.folder.record import RunReport
from dude_peft.training.curriculum import staged, values_in
from dude_peft.training.curriculum_order import CurriculumOrder
from dude_peft.training.loop import Loop
from dude_peft.training.pass_rates import PassRates
from dude_peft.training.run import run

SLOW = pytest.mark.slow
ANSWERS = ("1", "11", "21", "x")
"""A model that writes 1, 2 and ends gives the first one often, the third seldom, the last one never."""


def save_writer(folder: Path) -> Path:
    """A model whose head likes three tokens, whatever it reads: 1, 2 and the end."""
    tokenizer = tiny_tokenizer()
    settings = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PhiForCausalLM(PhiConfig(**settings, num_attention_heads=2, eos_token_id=256, pad_token_id=257))
    with torch.no_grad():
        model.lm_head.bias[[*tokenizer("12")["input_ids"], 256]] = torch.tensor([13.0, 12.0, 13.5])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curriculum")
    save_writer(folder / "writer")
    rows = [{"prompt": "say " * (n % 3 + 1) + str(n), "completion": ANSWERS[n % 4]} for n in range(20)]
    rows[7] = rows[3]  # asked twice
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny(folder / "model")
    generation = {"eos_token_id": [256, *range(150, 180)], "pad_token_id": 257}
    (folder / "model/generation_config.json").write_text(json.dumps(generation))
    write(folder / "train.jsonl", 10)
    write(folder / "test.jsonl", 4, start=100)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sft(places: Path, out: Path, curriculum: dict | None = None, **sections: dict) -> dict:
    own = {"by": "pass_rate", "stages": [0.1, 0.0], "samples": 24, "max_new_tokens": 4} | (curriculum or {})
    train = {"objective": "sft", "curriculum": own, "max_steps": 10, "per_device_train_batch_size": 3}
    adapter = {"target_modules": ["q_proj", "fc1"]} | sections.pop("adapter", {})
    data = {"train": str(places / "rows.jsonl")} | sections.pop("data", {})
    train |= sections.pop("train", {})
    sections["evaluation"] = {"enabled": False, "eval_steps": None, "batch_size": 240} | sections.get("evaluation", {})
    found = settings(places, out, train=train, adapter=adapter, data=data, **sections)
    return found | {"model": {"name_or_path": str(places / "writer")}}


def staged_grpo(places: Path, out: Path, curriculum: dict | None = None, **sections: dict) -> dict:
    own = {"by": "pass_rate", "stages": 2, "samples": 6, "reward": "letters", "drop": {}} | (curriculum or {})
    train = {"curriculum": own, "max_steps": 8} | sections.pop("train", {})
    sections["evaluation"] = {"enabled": False, "eval_steps": None} | sections.get("evaluation", {})
    section = {"rewards": [LETTERS, {"kind": "answer"}]} | sections.pop("section", {})
    return grpo(places, out, train=train, section=section, **sections)


def kept(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "curriculum.jsonl").read_text().splitlines()]


@pytest.fixture
def seen(monkeypatch) -> list[list[int]]:
    """Rows of each micro-batch that is trained on."""
    found: list[list[int]] = []
    original = Loop.seen

    def noted(self, loss, rows):
        found.append(rows.tolist())
        original(self, loss, rows)

    monkeypatch.setattr(Loop, "seen", noted)
    return found


def documented(sizes: list[int], step: int, steps: int, seed: int, answers: int = 1, iterations: int = 1) -> list:
    """The order that docs/training.md tells of: (stage, place in it) of every place of every step."""
    per_step = step // answers
    passes = [-(-size // per_step) for size in sizes]  # steps of a pass
    units = -(-steps // iterations)
    found: list[tuple[int, int]] = []
    for stage, size in enumerate(sizes):
        own: list[int] = []
        for again in itertools.count():
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + again)).tolist()
            own += [order[place % size] for place in range(passes[stage] * per_step)]
            if len(own) >= units * per_step:
                break
        begin = -(-units * sum(passes[:stage]) // sum(passes))
        end = -(-units * sum(passes[: stage + 1]) // sum(passes))
        for number in range(end - begin):
            rows = own[number * per_step : (number + 1) * per_step]
            found += [(stage, row) for _ in range(iterations) for row in rows for _ in range(answers)]
    return found[: steps * step]


# --- pass rates ---------------------------------------------------------------------------------------------------


def test_sft_trains_from_easy_to_hard_as_the_base_model_finds_it(places, tmp_path, seen):
    report = start(sft(places, tmp_path / "out", train={"logging_steps": 1}))
    rows = kept(tmp_path / "out")
    rates = [row["pass_rate"] for row in rows]
    assert [row["row"] for row in rows] == [f"{places / 'rows.jsonl'}:{n + 1}" for n in range(20)]
    assert rates[7] == rates[3]
    by_answer = [np.mean(rates[kind::4]) for kind in range(4)]
    assert 1 > by_answer[0] > by_answer[1] > by_answer[2] >= by_answer[3] == 0
    assert [row["stage"] for row in rows] == [1 if rate >= 0.1 else 2 for rate in rates]
    stages = [[n for n, row in enumerate(rows) if row["stage"] == stage] for stage in (1, 2)]
    order = documented([len(stage) for stage in stages], 3, 10, 0)
    assert [row for batch in seen for row in batch] == [stages[stage][place] for stage, place in order]
    found = report.curriculum
    assert found["dropped"] == {"solved": 0, "hopeless": 0}
    assert [stage["rows"] for stage in found["stages"]] == [len(stage) for stage in stages]
    assert [stage["mean"] for stage in found["stages"]] == [np.mean([rates[n] for n in stage]) for stage in stages]
    border = found["stages"][0]["last_step"]
    assert found["stages"][1] | {"first_step": border + 1, "last_step": 10} == found["stages"][1]
    told = [line["stage"] for line in lines(tmp_path / "out") if "loss" in line]
    assert told == [1] * border + [2] * (10 - border)
    assert report.files["curriculum.jsonl"] == digest(tmp_path / "out/curriculum.jsonl")
    assert RunReport.read(tmp_path / "out/report.json").curriculum == found
    again = RunConfig.model_validate(report.config)  # what a run writes down, it reads
    assert again.resolved() == again == load_config(tmp_path / "out/config.yaml").resolved()


@SLOW
def test_pass_rates_are_those_of_stock_transformers(places, tmp_path):
    """Reference: generate() of the plain checkpoint, prompt by prompt, and the check of `--keep correct`."""
    wanted = sft(places, tmp_path / "out", {"samples": 40}, evaluation={"batch_size": 1})
    start(wanted)
    rates = [row["pass_rate"] for row in kept(tmp_path / "out")]
    model = AutoModelForCausalLM.from_pretrained(places / "writer").eval()
    tokenizer = AutoTokenizer.from_pretrained(places / "writer")
    right = []
    for n in range(4):
        row = json.loads((places / "rows.jsonl").read_text().splitlines()[n])
        ids = tokenizer(f"### Question:\n{row['prompt']}\n\n### Answer:\n", return_tensors="pt")["input_ids"]
        set_seed(n)
        out = model.generate(ids.expand(400, -1), do_sample=True, top_k=0, max_new_tokens=4, eos_token_id=256)
        texts = [ids.tolist() for ids in out[:, ids.shape[1] :]]
        ended = [tokenizer.decode(each[: each.index(256)]) if 256 in each else None for each in texts]
        right.append(np.mean([text is not None and same_answer(text, row["completion"]) for text in ended]))
    for n, rate in enumerate(right):  # 3 deviations of two samples, of 40 and of 400
        assert abs(rates[n] - rate) <= 3 * np.sqrt(max(rate, 0.003) * (1 - rate) * (1 / 40 + 1 / 400)), (n, rate)
    assert right[0] > 0.1 > right[1] > right[2] > 0


@SLOW
def test_rates_are_measured_once_and_again_where_anything_that_decides_them_differs(places, tmp_path, own_cache):
    def rates(name: str, curriculum: dict | None = None, **sections: dict) -> list[float]:
        start(sft(places, tmp_path / name, curriculum, **sections | {"train": {"max_steps": 4}}))
        return [row["pass_rate"] for row in kept(tmp_path / name)]

    def measured() -> int:
        return len(list((own_cache / "pass_rates").iterdir()))

    first = rates("first")
    (path,) = (own_cache / "pass_rates").iterdir()
    content = path.read_bytes()
    assert rates("second", {"stages": 2, "drop": {}}) == first
    assert measured() == 1
    assert path.read_bytes() == content
    others = [
        {"curriculum": {"samples": 23}}, {"curriculum": {"temperature": 0.9}}, {"curriculum": {"max_new_tokens": 5}},
        {"data": {"seed": 1}}, {"data": {"train_rows": 19}}, {"evaluation": {"batch_size": 30}},
    ]  # fmt: skip
    for number, changes in enumerate(others):
        rates(f"other-{number}", **changes)
        assert measured() == 2 + number, changes


@SLOW
def test_what_a_reward_imports_from_beside_it_decides_rates_as_well(places, tmp_path, own_cache):
    helper = tmp_path / "code/helper.py"
    helper.parent.mkdir()
    code = "import helper\n\ndef f(completions):\n    return [helper.X] * len(completions)\n"
    (helper.parent / "mine.py").write_text(code)
    mine = {"kind": "function", "file": str(helper.parent / "mine.py"), "function": "f", "name": "letters"}
    section = {"rewards": [mine], "trust_reward_files": True}

    def rates(name: str, gives: str) -> set[float]:
        helper.write_text(f"X = {gives}\n")
        start(staged_grpo(places, tmp_path / name, section=section, train={"max_steps": 2}))
        return {row["pass_rate"] for row in kept(tmp_path / name)}

    assert rates("first", "1.0") == {1.0}
    assert rates("second", "0.00") == {0.0}
    assert rates("third", "0.00") == {0.0}
    assert len(list((own_cache / "pass_rates").iterdir())) == 2


def test_solved_and_hopeless_rows_are_left_out_and_told(places, tmp_path, seen, capsys):
    wanted = sft(places, tmp_path / "out", {"drop": {"hopeless": 0.0, "solved": 0.2}, "stages": 2})
    report = run(RunConfig(**wanted))
    rows = kept(tmp_path / "out")
    out = [n for n, row in enumerate(rows) if row["pass_rate"] == 0 or row["pass_rate"] >= 0.2]
    assert {rows[n]["pass_rate"] > 0 for n in out} == {True, False}
    assert [n for n, row in enumerate(rows) if row["stage"] is None] == out
    assert not {row for batch in seen for row in batch} & set(out)
    dropped = report.curriculum["dropped"]
    assert dropped == {
        "hopeless": sum(row["pass_rate"] == 0 for row in rows),
        "solved": sum(row["pass_rate"] >= 0.2 for row in rows),
    }
    told = " ".join(capsys.readouterr().out.split())
    assert f"not trained on, of 20 rows: {dropped['solved']} solved, {dropped['hopeless']} hopeless" in told
    assert "stage 1 of 2:" in told
    assert "mean 0." in told


@pytest.mark.parametrize("section", [{}, pytest.param({"num_iterations": 2}, marks=SLOW)])
def test_grpo_trains_whole_groups_stage_after_stage(places, tmp_path, section):
    report = start(staged_grpo(places, tmp_path / "out", section=section))
    rows = kept(tmp_path / "out")
    assert 0 < np.mean([row["pass_rate"] for row in rows]) < 1
    stages = [[n for n, row in enumerate(rows) if row["stage"] == stage] for stage in (1, 2)]
    assert [len(stage) for stage in stages] == [5, 5]
    assert min(rows[n]["pass_rate"] for n in stages[0]) >= max(rows[n]["pass_rate"] for n in stages[1])
    iterations = section.get("num_iterations", 1)
    order = documented([5, 5], 8, 8, 0, answers=4, iterations=iterations)
    steps = [order[begin : begin + 8] for begin in range(0, 64, 8)][::iterations]
    wanted = [rows[stages[stage][place]]["row"] for step in steps for stage, place in step]
    assert [line["row"] for line in rollouts(tmp_path / "out")] == wanted
    assert [stage["last_step"] for stage in report.curriculum["stages"]] == [4, 8]


# --- interrupted --------------------------------------------------------------------------------------------------


class _KilledError(Exception):
    """In place of a kill."""


def whole_result(out: Path) -> dict:
    found = result(out) | {"stages": digest(out / "curriculum.jsonl")}
    found["state"]["loop"].pop("rollouts_bytes", None)
    return found


@pytest.mark.parametrize(
    ("made", "train"),
    [
        (sft, {}),
        pytest.param(staged_grpo, {}, marks=SLOW),
        pytest.param(staged_grpo, {"bf16": True, "gradient_checkpointing": True}, marks=SLOW),
    ],
)
def test_a_measurement_that_was_cut_goes_on_where_it_was_and_so_does_training(
    places, tmp_path, monkeypatch, made, train
):
    evaluation = {"enabled": True, "batch_size": 48 if made is sft else 12}
    measured = {"evaluation": evaluation, "train": {"max_steps": 6, **train}}
    start(made(places, tmp_path / "whole", **measured))
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "another"))
    added = AnswerCache.add
    count = itertools.count()

    def stops(self, batch):
        added(self, batch)
        if next(count) == 2:
            raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(AnswerCache, "add", stops)
        with pytest.raises(_KilledError):
            start(made(places, tmp_path / "out", **measured))
    assert not (tmp_path / "out").exists()
    (path,) = (tmp_path / "another/pass_rates").iterdir()
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"of": "half')  # a line that a kill has torn
    torch.manual_seed(999)
    with monkeypatch.context() as patch:
        cut_at(4, patch)
        with pytest.raises(_CutError):
            start(made(places, tmp_path / "out", **measured))
    assert path.read_bytes().startswith(before)
    drawn = lambda *_, **__: pytest.fail("nothing is drawn for pass rates again")  # noqa: E731
    with monkeypatch.context() as patch:  # a run that has begun keeps its stages itself
        patch.setattr("dude_peft.training.pass_rates.draw", drawn)
        patch.setenv("DUDE_CACHE", str(tmp_path / "third"))
        start(made(places, tmp_path / "out", **measured))
    assert whole_result(tmp_path / "out") == whole_result(tmp_path / "whole")


@SLOW
def test_damaged_stages_are_made_again_and_other_ones_are_refused(places, tmp_path, monkeypatch):
    wanted = sft(places, tmp_path / "out")
    start(sft(places, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        cut_at(4, patch)
        with pytest.raises(_CutError):
            start(wanted)
    path = tmp_path / "out/curriculum.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"stage": 2', '"stage": 1', 1))
    (cache,) = (tmp_path / "cache/pass_rates").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("dude_peft.training.pass_rates.PassRates._scores", lambda *_: [0.0] * 23 + [1.0])
        cache.unlink()
        with pytest.raises(DataError, match=r"stage 1 of 2 has no row|other stages than when this run started"):
            start(wanted)
    cache.write_bytes(cache.read_bytes().replace(b"[0.0", b"[1.0", 1))
    report = start(wanted)
    assert any("is damaged; what it held is measured again" in text for text in report.warnings)
    assert any("curriculum.jsonl is damaged; it is made again" in text for text in report.warnings)
    assert path.read_text() == text
    assert whole_result(tmp_path / "out") == whole_result(tmp_path / "whole")


def test_another_curriculum_is_another_run(places, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_at(4, patch)
        with pytest.raises(_CutError):
            start(sft(places, tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"another configuration \(train.curriculum.stages: "):
        start(sft(places, tmp_path / "out", {"stages": [0.2, 0.0]}))
    wanted = sft(places, tmp_path / "out")
    wanted["train"].pop("curriculum")
    with pytest.raises(ConfigError, match=r"another configuration"):
        start(wanted)
    record = tmp_path / "out/run.json"
    known = json.loads(record.read_text())
    known["config"]["train"].pop("max_grad_norm")
    record.write_text(json.dumps(sealed({key: value for key, value in known.items() if key != "sha256"})))
    with pytest.raises(ConfigError, match=r"another version of dude-peft, which did not know train\.max_grad_norm; "):
        start(sft(places, tmp_path / "out"))


@SLOW
def test_a_second_run_waits_for_the_first_ones_measurement(places, tmp_path, monkeypatch, own_cache):
    scored = []
    original = PassRates._scored

    def noted(self, *arguments):
        scored.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(PassRates, "_scored", noted)
    monkeypatch.setattr("dude_peft.answer.cache._WAIT_SECONDS", 0.02)
    start(sft(places, tmp_path / "first", train={"max_steps": 2}))
    (path,) = (own_cache / "pass_rates").iterdir()
    batches = len(scored)
    path.unlink()
    cache = AnswerCache(path, {"pass rates": path.stem})  # another process holds it, and ends a second later
    threading.Timer(4.0, cache.close).start()
    begun = time.monotonic()
    start(sft(places, tmp_path / "second", train={"max_steps": 2}))
    assert time.monotonic() - begun > 4
    assert len(scored) == 2 * batches
    assert kept(tmp_path / "first") == kept(tmp_path / "second")


@SLOW
@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
@pytest.mark.parametrize("with_", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_in_a_stage_goes_on(places, tmp_path, with_):
    def process(name: str) -> subprocess.Popen:
        return in_process(tmp_path, staged_grpo(places, tmp_path / name, train={"max_steps": 30}))

    assert process("whole").wait() == 0
    running = process("out")
    wait_for_a_checkpoint(tmp_path / "out", running)
    running.send_signal(with_)
    assert running.wait() == {signal.SIGKILL: -9, signal.SIGTERM: 143}[with_]
    assert process("out").wait() == 0
    assert whole_result(tmp_path / "out") == whole_result(tmp_path / "whole")


@SLOW
@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
@pytest.mark.parametrize("with_", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_measurement_goes_on(places, tmp_path, own_cache, with_):
    wanted = {"samples": 400, "max_new_tokens": 24}

    def process(name: str) -> subprocess.Popen:
        return in_process(tmp_path, sft(places, tmp_path / name, wanted, evaluation={"batch_size": 100}))

    running = process("out")
    part = own_cache / "pass_rates"
    while not (part.is_dir() and any(len(path.read_bytes().splitlines()) > 3 for path in part.iterdir())):
        assert running.poll() is None
        time.sleep(0.005)
    running.send_signal(with_)
    assert running.wait() == {signal.SIGKILL: -9, signal.SIGINT: 130}[with_]
    (path,) = part.iterdir()
    before = path.read_bytes()
    assert len(before.splitlines()) < 20
    assert process("out").wait() == 0
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    os.environ["DUDE_CACHE"] = str(own_cache.parent / "whole-cache")
    assert process("whole").wait() == 0
    assert whole_result(tmp_path / "out") == whole_result(tmp_path / "whole")


# --- length -------------------------------------------------------------------------------------------------------


def test_stages_by_length_need_no_model_and_are_what_data_check_shows(places, tmp_path, seen, own_cache):
    curriculum = {"by": "length", "stages": [41, 44, 512]}
    wanted = sft(places, tmp_path / "out")
    wanted["train"] |= {"curriculum": curriculum, "max_steps": None, "num_train_epochs": 2.0}
    report = start(wanted)
    assert not (own_cache / "pass_rates").exists()
    rows = kept(tmp_path / "out")
    lengths = [row["length"] for row in rows]
    assert [row["stage"] for row in rows] == [1 if n <= 41 else 2 if n <= 44 else 3 for n in lengths]
    stages = [[n for n, row in enumerate(rows) if row["stage"] == stage] for stage in (1, 2, 3)]
    steps = 2 * sum(-(-len(stage) // 3) for stage in stages)
    assert report.steps == steps
    order = documented([len(stage) for stage in stages], 3, steps, 0)
    assert [row for batch in seen for row in batch] == [stages[stage][place] for stage, place in order]
    assert sorted({row for batch in seen for row in batch}) == list(range(20))
    found = check_data(places / "rows.jsonl", str(places / "writer"), template="plain", stages=[41, 44, 512]).stages
    steps_of = ("first_step", "last_step")
    assert found == report.curriculum | {
        "stages": [{k: v for k, v in stage.items() if k not in steps_of} for stage in report.curriculum["stages"]]
    }
    for given, words in (([64, 32], "they have to rise"), ([64, 128], "--max-length 512"), (1, "--stages: ")):
        with pytest.raises(ConfigError, match=words):
            check_data(places / "rows.jsonl", str(places / "writer"), stages=given)
    with pytest.raises(ConfigError, match=r"train.curriculum is for sft and grpo, not dpo"):
        check_data(places / "rows.jsonl", str(places / "writer"), stages=2, objective="dpo")


@SLOW
def test_a_run_by_length_goes_on_bit_by_bit(places, tmp_path, monkeypatch):
    def wanted(name: str) -> dict:
        found = sft(places, tmp_path / name, adapter={"lora_dropout": 0.2}, train={"gradient_accumulation_steps": 2})
        found["train"]["curriculum"] = {"by": "length", "stages": 3}
        return found

    start(wanted("whole"))
    for step in (3, 7):
        with monkeypatch.context() as patch:
            cut_at(step, patch)
            with pytest.raises(_CutError):
                start(wanted("out"))
    start(wanted("out"))
    assert whole_result(tmp_path / "out") == whole_result(tmp_path / "whole")


# --- stages and order, by themselves ------------------------------------------------------------------------------


def test_bounds_belong_to_the_easier_stage_and_equal_stages_break_ties_by_place():
    section = CurriculumSection(stages=[0.5, 0.25, 0]).completed(None, 8)
    rates = np.array([0.5, 0.49, 0.25, 0.0, 1.0, 0.24, 0.75])
    found = staged(section, rates)
    assert [stage.rows.tolist() for stage in found.stages] == [[0, 6], [1, 2], [3, 5]]
    assert found.dropped == {"solved": 1, "hopeless": 0}
    assert (values_in(found.text(str), section) == rates).all()
    section = CurriculumSection(by="length", stages=[4, 9])
    assert [stage.rows.tolist() for stage in staged(section, np.array([9.0, 4, 5, 1])).stages] == [[1, 3], [0, 2]]
    section = CurriculumSection(by="length", stages=2)
    found = staged(section, np.array([5.0, 5, 5, 5, 4]))
    assert [stage.rows.tolist() for stage in found.stages] == [[0, 1, 4], [2, 3]]
    assert found.doubts() == []
    (line,) = staged(CurriculumSection(stages=4), np.array([0.5, 0, 0, 0, 0, 0, 0, 0])).doubts()
    assert "all rows of stages 2 and 3, 3 and 4 have one pass rate" in line
    (line,) = staged(section, np.array([5.0, 5, 5])).doubts()
    assert "all rows of stages 1 and 2 have one length" in line


@pytest.mark.parametrize(
    ("sizes", "step", "answers", "iterations", "steps"),
    [((5, 3, 9), 4, 1, 1, 13), ((5, 3), 8, 4, 3, 11), ((1, 1), 2, 1, 1, 2), ((7, 2), 6, 2, 1, 50)],
)
def test_the_order_is_the_documented_one_whatever_the_epochs(sizes, step, answers, iterations, steps):
    firsts = np.cumsum([0, *sizes])
    stages = [list(range(begin, begin + size)) for begin, size in zip(firsts, sizes, strict=False)]
    order = CurriculumOrder(stages, 3, answers=answers, step=step, iterations=iterations, steps_of=lambda places: steps)
    assert len(order) % step == 0
    found: list[int] = []
    for epoch in itertools.count():
        order.begin(epoch)
        found += list(order)
        if len(found) >= steps * step:
            break
    wanted = documented(list(sizes), step, steps, 3, answers, iterations)
    assert found[: steps * step] == [stages[stage][place] for stage, place in wanted]
    told = [order.stage_of(number + 1) - 1 for number in range(steps)]
    assert told == [stage for stage, _ in wanted][::step]
    assert order.bounds[-1] == steps


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curriculum", "sections", "words"),
    [
        ({"stages": [0.0]}, {}, "train.curriculum.stages.*one stage is no curriculum"),
        ({"stages": 1}, {}, "train.curriculum.stages"),
        ({"stages": [0.2, 0.5, 0]}, {}, "bounds of pass_rate go from easy to hard; they have to fall"),
        ({"stages": [0.5, 0.2]}, {}, "the last stage takes what is left; end with 0"),
        ({"stages": [1.5, 0]}, {}, "pass rates go from 1 to 0"),
        ({"by": "difficulty"}, {}, "train.curriculum.by"),
        ({"samples": 1}, {}, "train.curriculum.samples"),
        ({"drop": {"hopeless": 0.5, "solved": 0.5}}, {}, "hopeless is not below solved"),
        ({"drop": {"hard": 0.5}}, {}, "train.curriculum.drop.*hard"),
        ({"reward": "answer"}, {}, "train.curriculum.reward.*no effect on train.objective: sft"),
        ({}, {"train": {"objective": "mol"}, "data": {"general": "x.jsonl"}}, "objective: mol learns from others"),
        ({}, {"train": {"objective": "dpo"}}, "train.objective: dpo learns from others; use sft or grpo"),
        ({}, {"train": {"objective": "kto"}}, "train.objective: kto learns from others"),
        ({}, {"data": {"packing": True}}, "data.packing.*no order of their own"),
        ({}, {"data": {"train_on": "all"}}, "data.train_on.*trains the prompts"),
        ({}, {"data": {"upft": 3}}, "data.upft.*whole answer"),
        ({}, {"train": {"max_steps": 1}}, "train.max_steps.*2 stages need as many steps"),
        ({}, {"train": {"trainer": "trl"}}, "train.trainer.*TRL orders rows itself"),
        ({}, {"train": {"train_sampling_strategy": "group_by_length"}}, "train_sampling_strategy"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_what_cannot_work_is_refused_in_one_line(places, tmp_path, curriculum, sections, words):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(sft(places, tmp_path / "out", curriculum, **sections)))
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("curriculum", "words"),
    [
        ({"by": "length", "samples": 4}, "'train.curriculum.samples' has no effect on by: length"),
        ({"by": "length", "drop": {}}, "'train.curriculum.drop' has no effect on by: length"),
        ({"by": "length", "stages": [64, 32]}, "bounds of length go from easy to hard; they have to rise"),
        ({"by": "length", "stages": [32, 64]}, "data.max_length.*last bound of stages, 64, leaves longer rows"),
    ],
)
def test_what_length_cannot_have_is_refused(places, tmp_path, curriculum, words):
    wanted = sft(places, tmp_path / "out")
    wanted["train"]["curriculum"] = curriculum
    (tmp_path / "run.yaml").write_text(json.dumps(wanted))
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "run.yaml")


def test_rewards_that_do_not_tell_right_from_wrong_have_to_be_named(places, tmp_path):
    with pytest.raises(ValueError, match=r"train.curriculum.reward.*whether an answer passes: letters; or set by"):
        RunConfig(**staged_grpo(places, tmp_path / "out", {"reward": None}, section={"rewards": [LETTERS]}))
    with pytest.raises(ValueError, match=r"train.curriculum.reward.*letters, answer"):
        RunConfig(**staged_grpo(places, tmp_path / "out", {"reward": "nothing"}))
    chosen = RunConfig(**staged_grpo(places, tmp_path / "out", {"reward": None, "drop": None})).resolved()
    found = chosen.train.curriculum
    assert (found.reward, found.threshold, found.max_new_tokens, found.temperature) == ("answer", 1.0, 6, 1.0)
    assert (found.drop.hopeless, found.drop.solved) == (0.0, 1.0)


def test_rows_that_leave_nothing_or_an_empty_stage_are_refused_with_numbers(places, tmp_path):
    with pytest.raises(
        DataError, match=r"stage 1 of 2 has no row; the 20 rows to train on have pass rates from 0\.\d+ "
    ):
        start(sft(places, tmp_path / "out", {"stages": [0.99, 0.0]}))
    with pytest.raises(
        DataError, match=r"no row is left to train on: of 20 the base model solves \d+ and fails at \d+"
    ):
        start(sft(places, tmp_path / "out", {"drop": {"hopeless": 0.0, "solved": 0.01}}))
    with pytest.raises(DataError, match=r"20 rows are too few for 30 stages; lower train.curriculum.stages"):
        start(sft(places, tmp_path / "out", {"stages": 30}, train={"max_steps": 40}))
    few = {"max_steps": 3, "per_device_train_batch_size": 1}
    with pytest.raises(ConfigError, match=r"3 optimizer steps leave none for stage 2 of 3; raise train.max_steps"):
        start(sft(places, tmp_path / "out", {"stages": [0.2, 0.1, 0.0]}, train=few))
    assert not (tmp_path / "out").exists()
    (tmp_path / "text.jsonl").write_text('{"text": "a plain text"}\n' * 3)
    with pytest.raises(DataError, match=r"text.jsonl:1: plain text asks nothing; train.curriculum: by pass_rate needs"):
        start(sft(places, tmp_path / "out", data={"train": str(tmp_path / "text.jsonl")}))
    with pytest.raises(ConfigError, match=r"train.curriculum.max_new_tokens: 5000 tokens after a prompt"):
        start(sft(places, tmp_path / "out", {"max_new_tokens": 5000}))


@SLOW
def test_several_processes_measure_nothing_but_train_by_length(places, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(sft(places, tmp_path / "out")))
    done = served.dude("train", path, "--launch", "ddp", "--processes", "2")
    assert done.returncode == 2
    assert "pass rates are measured in one process; leave --launch out" in done.stderr
    done = served.dude("train", path, "--launch", "ddp", "--processes", "2", "--set", "train.curriculum={by: length}")
    assert done.returncode == 0, done.stderr
    assert sum(
        stage["rows"] for stage in json.loads((tmp_path / "out/report.json").read_text())["curriculum"]["stages"]
    )


# --- told ---------------------------------------------------------------------------------------------------------


def test_plan_tells_what_the_measurement_costs(places, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(sft(places, tmp_path / "out")))
    made = plan(path)
    assert made.as_dict()["pass_rates"] == {"answers": 20 * 24, "most_tokens": 20 * 24 * 4}
    assert "480 answers of the base model, 1,920 tokens at most" in made._repr_html_()
    assert any("train.curriculum: steps are counted of all rows" in text for text in made.warnings)
    path.write_text(json.dumps(sft(places, tmp_path / "out") | {"train": {"curriculum": {"by": "length"}}}))
    assert plan(path).as_dict()["pass_rates"] is None


@SLOW
def test_data_check_shows_stages_and_its_section_has_them(places):
    options = ("--model", places / "writer", "--template", "plain")
    done = served.dude("data", "check", places / "rows.jsonl", *options, "--stages", "41,512")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "stage 1 of 2:" in said
    assert "by: length" in said
    assert "- 41\n" in said
    done = served.dude("data", "check", places / "rows.jsonl", *options, "--stages", "41,many")
    assert done.returncode == 2
    assert "--stages" in done.stderr


@SLOW
def test_the_command_and_the_page_show_the_stages(places, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(staged_grpo(places, tmp_path / "out")))
    done = served.dude("train", path, "--no-page")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "stage 1 of 2: 5 rows, pass rates" in said
    assert "; steps 1 to 4" in said
    assert "stage 2 begins" in said
    done = served.dude("report", tmp_path / "out", "-o", tmp_path / "out.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.md").read_text()
    assert "Stages, from easy to hard" in page
    assert "The base model gave 6 answers to each of 10 rows" in page
