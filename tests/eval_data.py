"""Small benchmark files in the layout that `dude eval --data-dir` reads, and a tiny model with an adapter."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from models import perturb
from peft import get_peft_model
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dude_peft import DudeConfig

MMLU_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
SUBJECTS = ("anatomy", "astronomy", "virology")


def write_data(folder: Path) -> Path:
    """GSM8K, three subjects of MMLU, one set of each of LLM-Adapters' kinds."""
    (folder / "gsm8k").mkdir(parents=True)
    for split, count in (("train", 7), ("test", 6)):
        rows = [
            {"question": f"{split} {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "gsm8k" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    for split, count in (("dev", 5), ("test", 9)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for place, subject in enumerate(SUBJECTS):
            write_mmlu(folder / "mmlu" / split / f"{subject}_{split}.csv", count + (place if split == "test" else 0))
    write_instructions(folder / "commonsense" / "boolq" / "test.json", "true/false", "true")
    write_instructions(folder / "math" / "SVAMP" / "test.json", None, "8.0")
    return folder


def write_mmlu(path: Path, count: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(MMLU_HEADER)
        for n in range(count):
            writer.writerow([f'Which is {n}, the "right" one?', n, n + 1, n + 2, n + 3, n % 4])


def write_instructions(path: Path, choices: str | None, answer: str) -> None:
    path.parent.mkdir(parents=True)
    ending = "" if choices is None else f"\n\nAnswer format: {choices}"
    rows = [{"instruction": f"question {n}{ending}", "input": "", "output": "", "answer": answer} for n in range(4)]
    path.write_text(json.dumps(rows), encoding="utf-8")


def save_model(folder: Path) -> Path:
    """A tiny random model that reads 2,048 tokens."""
    return save_tiny(folder, max_position_embeddings=2048)


def save_adapter(model_folder: Path, folder: Path, target_modules: str | list[str] = "all-linear") -> Path:
    """An adapter that changes what the model answers."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(0)
    model = get_peft_model(model, DudeConfig(r=4, target_modules=target_modules))
    perturb(model, scale=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
