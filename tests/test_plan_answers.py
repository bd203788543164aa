"""What `dude plan` says of steps that judge answers, beside what lives in a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from night import some_by_day
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from dude_peft import plan
from dude_peft.config.schema import RunConfig
from dude_peft.planning.live_bytes import LiveBytes
from dude_peft.training.run import run

ROWS = 6
ASKED = "what is the sum of these many numbers and of those other ones and so on, please say"


def written(folder: Path, objective: str) -> dict[str, Any]:
    """Long prompts, short answers, and many words in the vocabulary: the logits are most of a step."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=6000, num_key_value_heads=2, **sizes))
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    better, worse = {"chosen": "yes, yes!"}, {"rejected": "no, no, no!"}
    answers: dict[str, Any] = {"completion": "12", "label": True} if objective == "kto" else better | worse
    if objective == "grpo":
        answers = {"completion": "12"}
    rows = [{"prompt": f"{ASKED} {n}", **answers} for n in range(10, 10 + ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"objective": objective, "learning_rate": 1e-4, "max_steps": 2, "per_device_train_batch_size": ROWS}
    if objective == "grpo":
        train["grpo"] = {"num_generations": ROWS, "max_completion_length": 8}
    return {
        "model": {"name_or_path": str(folder / "model")},
        "adapter": {"r": 2},
        "data": {"train": str(folder / "rows.jsonl"), "template": "plain"},
        "train": train,
        "evaluation": {"enabled": False},
        "output_dir": str(folder / "out"),
    }


@pytest.mark.parametrize("objective", some_by_day(["dpo", "orpo", "cpo", "kto", "grpo"], ["dpo", "kto"]))
def test_the_peak_is_that_of_a_real_step(objective, tmp_path, monkeypatch):
    wanted = written(tmp_path, objective)
    (tmp_path / "run.yaml").write_text(json.dumps(wanted))
    bill = plan(tmp_path / "run.yaml").cost.bill
    peaks = []

    def counted(self, *given, train=Trainer.train, **named):
        with LiveBytes([]) as live:
            found = train(self, *given, **named)
        peaks.append(live.peak)
        return found

    monkeypatch.setattr(Trainer, "train", counted)
    run(RunConfig(**wanted), quiet=True)
    planned = bill.total - bill.runtime - bill.weights - bill.adapter_frozen - bill.trained
    assert planned == pytest.approx(peaks[0], rel=0.1)
