"""What held-out rows and prompts begin with is computed once: losses and answers stay those of whole rows."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from models import perturb
from peft import get_peft_model
from test_probe import PAD, TARGETS, made
from test_train_resume import _CutError, cut_at, result
from tiny import save_tiny, tiny_llama, tiny_tokenizer

import dude_peft
from dude_peft import DudeConfig
from dude_peft.answer import decode as decoding_module
from dude_peft.config.schema import RunConfig
from dude_peft.data import prefixes
from dude_peft.data.prefixes import heads
from dude_peft.model.prefix import Prefix, shares_exactly
from dude_peft.training import trainer as trainer_module
from dude_peft.training.run import run

HEAD = "A shop sells plums, figs and pears. Answer with one word and nothing more.\n"
QUESTIONS = [f"{HEAD}{'Please! ' * (n % 4)}How many are {n} plums and {n * 7 % 5} figs?" for n in range(20)]
NEVER = 10**9


@pytest.fixture
def computed(monkeypatch) -> list[weakref.ref]:
    """Every prefix that is computed, for as long as it is there."""
    found = []
    original = Prefix.__init__

    def record(self, *given):
        original(self, *given)
        found.append(weakref.ref(self))

    monkeypatch.setattr(Prefix, "__init__", record)
    monkeypatch.setattr("dude_peft.model.prefix._tried", _quietly(monkeypatch, found))
    return found


def _quietly(monkeypatch, found):
    from dude_peft.model.prefix import _tried

    def tried(*given):
        before = len(found)
        try:
            return _tried(*given)
        finally:
            del found[before:]

    return tried


def adapter_on(name: str, folder: Path) -> str:
    """On a model whose answers follow from what is asked: the weights of a fresh one are too small for that."""
    model = made(name)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    model.save_pretrained(folder / "model")
    tiny_tokenizer(chat=False).save_pretrained(folder / "model")
    model.name_or_path = model.config.name_or_path = str(folder / "model")
    adapted = get_peft_model(
        model, DudeConfig(r=4, target_modules=TARGETS.get(name, "all-linear"), task_type="CAUSAL_LM")
    )
    perturb(adapted, 0.2)
    adapted.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


# --- which ---------------------------------------------------------------------------------------------------------


def test_batches_have_the_heads_that_save_most(monkeypatch):
    monkeypatch.setattr(prefixes, "WORTHWHILE", 1)
    system = list(range(40))
    rows = [[*system, 50 + n] for n in range(8)]
    assert heads([rows[:4], rows[4:]]) == [tuple(system)] * 2
    # Two begin alike a little longer, by chance: they have what all have.
    assert heads([[[*system, 1, 2], [*system, 1, 3]], rows]) == [tuple(system)] * 2
    # Each prompt several times: it is worth more than what all have.
    questions = [[*system, *range(100 * n, 100 * n + 60)] for n in (1, 2, 3)]
    assert heads([[question] * 4 for question in questions]) == [tuple(question[:-1]) for question in questions]
    assert heads([[row] for row in rows]) == [tuple(system)] * 8  # one row a batch
    assert heads([[rows[0], [7, 8]], rows]) == [(), tuple(system)]
    assert heads([[[5]], [system, system]]) == [(), tuple(system[:-1])]  # a row keeps a token
    assert heads([[[1, 2, 3, 4]] * 9]) == [()]  # too short
    assert heads([]) == []
    monkeypatch.undo()
    assert heads([rows[:4], rows[4:]]) == [()] * 2  # 280 tokens


def test_only_what_float32_rounds_is_shared():
    assert shares_exactly(tiny_llama(), PAD)
    assert not shares_exactly(tiny_llama(dtype=torch.bfloat16), PAD)
    assert not shares_exactly(tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}), PAD)
    assert not shares_exactly(made("gemma2"), PAD)  # its window is shorter than a head


# --- dude generate --------------------------------------------------------------------------------------------------

SHARING = ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("qwen3-moe", marks=pytest.mark.slow)]
OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in ("mamba", "gemma2", "rwkv", "recurrent-gemma")]


@pytest.mark.parametrize("name", [*SHARING, *OTHERS])
def test_generate_answers_as_with_whole_prompts(tmp_path, monkeypatch, computed, name):
    adapter = adapter_on(name, tmp_path)
    how = {"max_new_tokens": 8, "base_too": name != "rwkv"}
    found = dude_peft.generate(adapter, QUESTIONS, **how)
    shares = name in ("llama", "gpt2", "qwen3-moe")
    count = len(computed)
    assert (count > 0) == shares
    assert count % 2 == 0  # base and tuned each their own
    assert not any(prefix() for prefix in computed)
    monkeypatch.setattr(prefixes, "WORTHWHILE", NEVER)
    assert dude_peft.generate(adapter, QUESTIONS, **how) == found
    assert len(computed) == count
    assert not shares or len({record["completion"] for record in found}) > 3


def test_samples_are_drawn_as_with_whole_prompts(tmp_path, monkeypatch, computed):
    adapter = adapter_on("llama", tmp_path)
    how = {"max_new_tokens": 6, "temperature": 1.0, "samples": 4, "batch_size": 4, "seed": 3}
    found = dude_peft.generate(adapter, QUESTIONS[:5], **how)
    assert len(computed) == 5  # each prompt whole, but for its last token
    monkeypatch.setattr(prefixes, "WORTHWHILE", NEVER)
    assert dude_peft.generate(adapter, QUESTIONS[:5], **how) == found
    assert len({record["completion"] for record in found}) > 10


def test_an_interrupted_command_goes_on_behind_the_same_heads(tmp_path, monkeypatch, computed):
    adapter, original = adapter_on("llama", tmp_path), decoding_module.decode
    behind: list[tuple] = []
    stop = [2]

    def stopping(*given, head, **named):
        if len(behind) == stop[0]:
            raise KeyboardInterrupt
        behind.append((tuple(given[1][0]), head))
        return original(*given, head=head, **named)

    monkeypatch.setattr(decoding_module, "decode", stopping)
    asked = [*QUESTIONS[:12], *(f"{HEAD}{HEAD}{n}" for n in range(12))]
    how = {"max_new_tokens": 4, "output": tmp_path / "out.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        dude_peft.generate(adapter, asked, **how)
    stop[0] = NEVER
    dude_peft.generate(adapter, asked, **how)
    found, behind = (tmp_path / "out.jsonl").read_bytes(), behind
    parts = set(behind)
    behind.clear()
    dude_peft.generate(adapter, asked, max_new_tokens=4, output=tmp_path / "whole.jsonl")
    assert set(behind) == parts
    assert (tmp_path / "whole.jsonl").read_bytes() == found


# --- dude train -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    save_tiny(folder / "model")
    for name, numbers in (("train", range(8)), ("test", range(8, 36))):
        rows = [
            {"prompt": f"{HEAD}{'Please! ' * (n % 3)}How many are {n} plums?", "completion": f"{n}"} for n in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(place: Path, out: Path, **train: object) -> dict:
    return {
        "model": {"name_or_path": str(place / "model")},
        "adapter": {"r": 4, "lora_dropout": 0.1},
        # The plain template needs no process that renders.
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl"), "template": "plain"},
        "train": {"learning_rate": 0.02, "max_steps": 4, "save_steps": 1, **train},
        "evaluation": {"rows": 20, "max_new_tokens": 4, "eval_steps": 2},
        "output_dir": str(out),
    }


def started(wanted: dict):
    return run(RunConfig(**wanted), quiet=True)


@pytest.fixture(autouse=True)
def lean(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dude_peft.training.run.loss_curve", lambda *_: b"")


def test_a_run_is_judged_as_by_whole_rows(place, tmp_path, monkeypatch, computed):
    original, alive = trainer_module.RunTrainer.training_step, []

    def step(self, *given, **named):
        alive.append(sum(prefix() is not None for prefix in computed))
        return original(self, *given, **named)

    monkeypatch.setattr(trainer_module.RunTrainer, "training_step", step)
    shared = started(settings(place, tmp_path / "shared", save_steps=4))
    count = len(computed)
    assert count > 0
    assert set(alive) == {0}
    monkeypatch.setattr(prefixes, "WORTHWHILE", NEVER)
    whole = started(settings(place, tmp_path / "whole", save_steps=4))
    assert len(computed) == count
    for one, other in ((shared.before, whole.before), (shared.after, whole.after)):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert (one.tokens, one.answers) == (other.tokens, other.answers)
    assert shared.after.loss < shared.before.loss
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("shared", "whole")]
    for one, other in zip(*(map(json.loads, each) for each in lines), strict=True):
        assert one.get("eval_loss", 0.0) == pytest.approx(other.get("eval_loss", 0.0), rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(place, tmp_path, monkeypatch, computed):
    started(settings(place, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(_CutError):
            started(settings(place, tmp_path / "cut"))
    count = len(computed)
    started(settings(place, tmp_path / "cut"))
    assert len(computed) > count
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


@pytest.mark.slow
def test_under_autocast_rows_are_whole(place, tmp_path, computed):
    started(settings(place, tmp_path / "out", bf16=True))
    assert not computed
