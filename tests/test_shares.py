"""Held-out rows are shared out among processes: each row is scored once, and all processes call the model alike."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from served import dude
from test_launch import FSDP2, losses, program, wait_for, write_config
from tiny import save_tiny, write_rows

from dude_peft.data.prefixes import heads
from dude_peft.measure import shares
from dude_peft.measure.shares import Turn, all_of, together, turns

BATCHES = [[4, 0], [2], [1, 3], [5], [6, 7], [8, 9], [10]]
HEADS = [(1,), (1,), (1,), (), (2,), (2,), (3,)]


def of_all(monkeypatch, processes: int, begun: list[tuple[int, ...]] | None) -> list[list[Turn]]:
    found = []
    for rank in range(processes):
        monkeypatch.setattr(shares, "count", lambda: processes)
        monkeypatch.setattr(shares, "rank", lambda rank=rank: rank)
        found.append(turns(BATCHES, begun, spread=True))
    return found


@pytest.mark.parametrize("begun", [None, HEADS])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7, 9])
def test_every_batch_counts_once_and_every_process_makes_the_same_forwards(monkeypatch, processes, begun):
    found = of_all(monkeypatch, processes, begun)
    counted = [turn.rows for own in found for turn in own if turn.counts]
    assert sorted(counted) == sorted(BATCHES)
    assert {len(own) for own in found} == {-(-len(BATCHES) // processes)}
    assert sum(turn.done for turn in found[0]) == 11
    for together_ in zip(*found, strict=True):
        assert len({bool(turn.fresh) for turn in together_}) == 1
        assert len({turn.done for turn in together_}) == 1
    for own in found:
        known = ()
        for turn in own:
            known = turn.fresh or known
            assert not turn.head or turn.head == known
            assert turn.head == (begun or [()] * len(BATCHES))[BATCHES.index(turn.rows)]


def test_a_beginning_that_all_know_is_not_computed_again(monkeypatch):
    (own,) = of_all(monkeypatch, 1, HEADS)
    assert [turn.fresh for turn in own] == [(1,), (), (), (), (2,), (), (3,)]
    first, second = of_all(monkeypatch, 2, HEADS)
    assert [turn.fresh for turn in first] == [(1,), (), (2,), (3,)]
    assert [turn.fresh for turn in second] == [(1,), (), (2,), (3,)]


def test_processes_that_do_not_share_have_all(monkeypatch):
    monkeypatch.setattr(shares, "count", lambda: 3)
    assert [turn.rows for turn in turns(BATCHES, spread=False)] == BATCHES
    found = torch.ones(2)
    assert together(found, spread=False) is found
    monkeypatch.setattr(
        shares, "gathered", lambda value: [value, 0 * value] if isinstance(value, torch.Tensor) else [value, {1: "b"}]
    )
    assert torch.equal(together(found, spread=True), found)
    assert all_of({0: "a"}, spread=True) == {0: "a", 1: "b"}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Held-out rows of two kinds that begin alike over many tokens, and one that does not."""
    folder = tmp_path_factory.mktemp("shares")
    save_tiny(folder / "float32")
    write_rows(folder / "train.jsonl", 24)
    rows = [{"prompt": f"{kind * 200} {number}", "completion": f"yes {number}"} for kind in "ab" for number in range(7)]
    beginnings = [row["prompt"].encode()[:-1] for row in rows]
    assert any(heads([beginnings[at : at + 2] for at in range(0, len(rows), 2)])), "worth being computed once"
    rows.append({"prompt": "else", "completion": "no"})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.slow
@FSDP2
def test_the_scores_are_those_of_one_process(places, tmp_path):
    reports = {}
    cases = {"one": (6, ()), "fsdp2": (3, ("fsdp2", 2)), "three": (2, ("fsdp2", 3)), "ddp": (2, ("ddp", 3))}
    for name, (rows, launched) in cases.items():
        config = write_config(places, tmp_path / name, per_device_train_batch_size=rows, logging_steps=1)
        settings = json.loads(config.read_text())
        settings["evaluation"] |= {"batch_size": 2, "rows": 15, "max_new_tokens": 5}
        config.write_text(json.dumps(settings))
        arguments = ("--launch", launched[0], "--processes", launched[1]) if launched else ()
        done = dude("train", config, *arguments)
        assert done.returncode == 0, done.stderr
        reports[name] = json.loads((tmp_path / name / "report.json").read_text())
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for name in ("fsdp2", "three", "ddp"):
        for when in ("before", "after"):
            wanted, found = reports["one"][when], reports[name][when]
            assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5 if when == "after" else 1e-6)
            assert found["tokens"] == wanted["tokens"]
            assert [answer["text"] for answer in found["answers"]] == [answer["text"] for answer in wanted["answers"]]


@pytest.mark.slow
@FSDP2
def test_who_has_its_last_token_waits_for_the_others():
    wait_for([program("import test_shares; test_shares.answers()", rank, 2) for rank in range(2)])


def answers() -> None:
    """One process of the test above: the answers of one of them end at once."""
    import torch.distributed as dist
    from peft import get_peft_model
    from tiny import tiny_llama, tiny_tokenizer

    from dude_peft import DudeConfig
    from dude_peft.machine.processes import is_first
    from dude_peft.machine.sharding import is_cut, split
    from dude_peft.measure.score import complete
    from dude_peft.tuner.load import put_on_empty

    dist.init_process_group("gloo")
    config, tokenizer = DudeConfig(r=2, target_modules="all-linear"), tiny_tokenizer()
    prompts = [list(range(start, start + length)) for start, length in ((3, 4), (40, 9), (80, 12))]
    how = {"max_new_tokens": 6, "batch_size": 1}
    whole = get_peft_model(tiny_llama(), config)
    ids = torch.tensor([prompts[0]])
    first = whole(input_ids=ids).logits[0, -1].argmax()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(first))
    wanted = complete(whole, tokenizer, prompts, **how)
    assert wanted[0] == ""
    assert all(wanted[1:])
    model = whole
    if not is_first():
        with torch.device("meta"):
            empty = tiny_llama()
        model = put_on_empty(empty, config)
    assert not is_cut(model)
    split(model, torch.device("cpu"))
    assert is_cut(model)
    model(input_ids=ids)  # not inference mode, as in a run
    assert complete(model, tokenizer, prompts, **how, spread=True) == wanted
    assert complete(model, tokenizer, prompts, **how) == wanted
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto", "reward"])
def test_pairs_and_labels_are_shared_as_well(monkeypatch, kind):
    """Each of two processes measures its part, and the parts add up to all."""
    from tiny import tiny_llama

    from dude_peft.config.schema import DpoSection, KtoSection, OrpoSection, RewardModelSection
    from dude_peft.training import label_scores, pair_scores, scored_pairs

    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            f"{side}{name}": torch.randint(3, 250, (length + shift,), generator=generator).tolist()
            for side, shift in (("", 0), ("rejected_", 3))
            for name in ("input_ids", "labels")
        }
        for length in (5, 9, 6, 12, 7)
    ]
    model = tiny_llama()
    if kind == "reward":
        llama, scored = model, torch.nn.Module()
        scored.device = model.device
        scored.forward = lambda **batch: SimpleNamespace(logits=llama(**batch).logits[:, -1, :1])
        model = scored

    def measured(spread: bool):
        if kind == "kto":
            return label_scores.LabelMeter(rows, KtoSection(), 257, 2, 64, "any", spread)._logps(model, rows)
        if kind == "reward":
            return scored_pairs.ScoreMeter(rows, RewardModelSection(), 257, 3, "any", spread)._measured(model)[:1]
        settings = OrpoSection() if kind == "orpo" else DpoSection()
        return pair_scores.PairMeter(rows, settings, 257, 3, "any", spread)._measured(model)

    wanted, parts = measured(False), []
    monkeypatch.setattr(shares, "count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(shares, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(shares, "together", lambda found, spread: parts.append(found) or found)
        measured(True)
    monkeypatch.setattr(shares, "together", lambda found, spread: parts[0] + parts[1])
    assert not torch.equal(parts[0], parts[1])
    for found, each in zip(measured(True), wanted, strict=True):
        assert torch.equal(found, each)
