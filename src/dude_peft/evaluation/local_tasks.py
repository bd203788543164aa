"""Local data under the harness's own tasks: its YAML included unchanged, its data replaced.

The folder that is written serves `lm-eval run --include_path FOLDER` as well: the same tasks on the same documents.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dude_peft.artifact.durable import disk_errors, replace_file
from dude_peft.artifact.json_text import json_text
from dude_peft.data.word_problems import SIZES, word_problems
from dude_peft.errors import DataError
from dude_peft.evaluation import local_files
from dude_peft.evaluation.local_files import Document
from dude_peft.evaluation.task_names import GROUPS, GSM8K, WORDMATH, harness_tasks
from dude_peft.show import shown

COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
MATH = ("SVAMP", "AddSub", "MultiArith", "SingleEq", "AQuA", "mawps")

_NUMBER = "(-?[$0-9.,]{2,})|(-?[0-9]+)"  # GSM8K's flexible-extract
# (C); answer is C; answer: **C**; C alone or before a stop. An article, as in "A train", is no answer.
_LETTER = (
    r"(?i)\(([A-E])\)|(?:answer|option|choice)(?: is)?:?[\s*$(]*(A(?!\s+(?-i:[a-z]))|[B-E])\b"
    r"|\A[\s*$(]*([A-E])(?=[\s*$]*(?:[).:,]|\Z))"
)
_SCORE = "!function dude_peft.evaluation.word_answers.score"


def is_local(name: str) -> bool:
    """Whether local files, or our own generator, can be the data of this task."""
    return name in (*GSM8K, *GROUPS, WORDMATH) or name.removeprefix("mmlu_") in _subjects()


def write_tasks(name: str, data: Path | None, folder: Path) -> list[str]:
    """Write the YAML and documents of a task or group; the names of its tasks, as the harness then knows them.

    Args:
        name: one that `is_local`.
        data: the user's files, laid out as `local_files` says; `wordmath` needs none.
        folder: where to; what is there and the same is left alone.

    Raises:
        DataError: a file is missing or malformed.
        ResourceError: the folder cannot be written.
    """
    if name == WORDMATH:
        return [_wordmath(folder)]
    assert data is not None
    if name in GSM8K:
        return [_gsm8k(name, data, folder)]
    if name == "mmlu" or name.startswith("mmlu_"):
        subjects = _subjects() if name == "mmlu" else [name.removeprefix("mmlu_")]
        return [_mmlu(subject, data, folder) for subject in subjects]
    return _instruction_sets(name, data, folder)


def mmlu_category(task: str) -> str | None:
    """`stem`, `humanities`, `social_sciences` or `other`, as the harness groups MMLU; None for other tasks."""
    path = harness_tasks() / "mmlu" / "default" / f"{task}.yaml"
    if not path.is_file():
        return None
    tag = str(yaml.safe_load(path.read_text("utf-8"))["tag"])
    return tag.removeprefix("mmlu_").removesuffix("_tasks")


def _gsm8k(name: str, data: Path, folder: Path) -> str:
    # The train split has the examples; gsm8k_cot brings its own.
    needed = ("test",) if name == "gsm8k_cot" else ("train", "test")
    splits = {split: local_files.gsm8k(data / "gsm8k" / f"{split}.jsonl") for split in needed}
    file = {"gsm8k": "gsm8k", "gsm8k_cot": "gsm8k-cot", "gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot"}[name]
    return _write(name, folder, splits, include=f"gsm8k/{file}.yaml", dataset_name=None)


def _mmlu(subject: str, data: Path, folder: Path) -> str:
    splits = {s: local_files.mmlu(data / "mmlu" / s / f"{subject}_{s}.csv", subject) for s in ("dev", "test")}
    include = f"mmlu/default/mmlu_{subject}.yaml"
    # The harness leaves the number of examples open; MMLU's is 5 (Hendrycks et al., 2021).
    return _write(f"mmlu_{subject}", folder, splits, include=include, dataset_name=None, num_fewshot=5)


def _instruction_sets(name: str, data: Path, folder: Path) -> list[str]:
    """LLM-Adapters' files, in their own words: they lack what the harness's prompts are made of (BoolQ's passages)."""
    read: Callable[[Path], list[Document]] = local_files.commonsense if name == "commonsense" else local_files.math
    there = [known for known in (COMMONSENSE if name == "commonsense" else MATH) if (data / name / known).is_dir()]
    if not there:
        raise DataError(
            f"{shown(data / name, 300)}: the folder has none of {', '.join(COMMONSENSE + MATH)}; docs/evaluation.md "
            "lists them"
        )
    splits = {known: {"test": read(data / name / known / "test.json")} for known in there}
    return [
        _write(
            f"{name}_{known.lower()}",
            folder,
            documents,
            **(_choices() if name == "commonsense" else _of_answers(documents["test"])),
        )
        for known, documents in splits.items()
    ]


def _choices() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{instruction}}\n",
        "doc_to_choice": "{% set c = [] %}{% for x in choices %}{{ c.append('the correct answer is ' ~ x) or '' }}"
        "{% endfor %}{{ c }}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _of_answers(documents: list[Document]) -> dict[str, Any]:
    """AQuA's answers are letters, the others' numbers; the last one counts, and 125 km is none of (A) to (E)."""
    return _generated(_LETTER if all(document["answer"] in "ABCDE" for document in documents) else _NUMBER)


def _wordmath(folder: Path) -> str:
    rows = word_problems(SIZES["test"], split="test")
    documents = [{"question": row.prompt[-1].content, "answer": row.answer.rpartition("#### ")[2]} for row in rows]
    return _write(WORDMATH, folder, {"test": documents}, **_generated(_NUMBER))


def _generated(pattern: str) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False},
        "filter_list": [
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": pattern},
                    {"function": "take_first"},
                ],
            }
        ],
        "process_results": _SCORE,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2.0},
    }


def only(names: set[str], folder: Path) -> None:
    """Remove the tasks in `folder` that are none of the names. ResourceError where the disk does not allow it."""
    with disk_errors(folder):
        for path in folder.glob("*.yaml"):
            if path.stem not in names:
                path.unlink(missing_ok=True)


def _write(
    name: str, folder: Path, splits: dict[str, list[Document]], include: str | None = None, **settings: Any
) -> str:
    files = {}
    with disk_errors(folder):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for split, documents in splits.items():
            path = folder / "data" / f"{name}-{split}.jsonl"
            _replace_if_changed(path, "".join(json_text(one, ensure_ascii=False) + "\n" for one in documents))
            files[split] = str(path.absolute())
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, **settings}
        if include is not None:
            config["include"] = str(harness_tasks() / include)
        text = yaml.safe_dump(config, sort_keys=False).replace(f"'{_SCORE}'", _SCORE)
        _replace_if_changed(folder / f"{name}.yaml", text)
    return name


def _replace_if_changed(path: Path, text: str) -> None:
    """The harness's readers cache by a file's time of change."""
    content = text.encode("utf-8", "backslashreplace")
    if not path.is_file() or path.read_bytes() != content:
        replace_file(path, content)


def _subjects() -> list[str]:
    folder = harness_tasks() / "mmlu" / "default"
    return sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))
