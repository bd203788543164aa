"""`dude eval` against lm-evaluation-harness on the same model, items and batches, and merged against live adapters.

python benchmarks/eval.py MODEL --data-dir DIR --tasks mmlu_anatomy,gsm8k --limit 16

MODEL is a folder with a tokenizer. Loading, imports and the harness's start are left out on both sides; its command
pays them once more for each model. The adapter is random: what is timed does not depend on its values.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import torch
from lm_eval.models.huggingface import HFLM
from measure import arguments, finish, interleaved, set_threads, show
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dude_peft import DudeConfig, load_adapter
from dude_peft.answer.speaker import open_speaker
from dude_peft.evaluation.options import EvalOptions
from dude_peft.evaluation.record import ANSWERS
from dude_peft.evaluation.run import measure
from dude_peft.evaluation.subset import stratified
from dude_peft.evaluation.tasks import load_tasks
from dude_peft.terminal.display import Display

QUIET = Display(quiet=True)
COLUMNS = ["ratio", "ratio_low", "ratio_high", "items_per_second", "median_seconds"]


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", default="mmlu_anatomy,gsm8k")
    parser.add_argument("--limit", type=int, default=16, help="items of each task")
    parser.add_argument("--batch-size", type=int, default=8)
    settings = parser.parse_args()
    set_threads(settings)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = tuple(settings.tasks.split(","))
    options = EvalOptions(names, settings.data_dir, limit=settings.limit, batch_size=settings.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        adapter, merged = _adapter(settings.model, folder)
        chosen = load_tasks(names, settings.data_dir, folder / "tasks")
        items = {
            task: rows
            for one in chosen
            for task, rows in stratified({n: len(t.eval_docs) for n, t in one.tasks.items()}, settings.limit, 0).items()
        }
        count = sum(map(len, items.values()))
        plain = open_speaker(str(merged), base=None, gguf_file=None, notes=QUIET)
        adapted = open_speaker(str(adapter), base=None, gguf_file=None, notes=QUIET)

        def ours(speaker: Any, merge: bool) -> Callable[[], None]:
            def run() -> None:
                with tempfile.TemporaryDirectory(dir=folder) as output:  # no answers from the round before
                    (Path(output) / ANSWERS).mkdir()
                    measure(speaker, options, Path(output), display=QUIET, merge=merge, chosen=chosen)

            return run

        def theirs() -> None:
            model = HFLM(pretrained=plain.model, tokenizer=plain.tokenizer, batch_size=settings.batch_size)
            tasks = {task: loaded for one in chosen for task, loaded in one.tasks.items()}
            for loaded in tasks.values():
                loaded.set_fewshot_seed(1234)
            with contextlib.redirect_stderr(io.StringIO()):
                lm_eval.evaluator.evaluate(model, {"tasks": tasks, "groups": {}}, samples=items, bootstrap_iters=0)

        results = {}
        for title, cases, times in (
            ("one model", {"lm-eval": theirs, "dude eval": ours(plain, False)}, 1),
            ("an adapter and its base", {"live": ours(adapted, False), "merged in memory": ours(adapted, True)}, 2),
        ):
            rows = interleaved(cases, settings.rounds, settings.device)
            for row in rows.values():
                row["items_per_second"] = times * count / row["median_seconds"]
            show(f"{title}: {count} items of {settings.tasks}, batches of {settings.batch_size}", rows, COLUMNS)
            results[title] = rows
    finish("eval", settings, results)


def _adapter(model_folder: Path, folder: Path) -> tuple[Path, Path]:
    """A random adapter and the model that it makes, as folders."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder), DudeConfig(r=16, target_modules="all-linear")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    load_adapter(base, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    for name in ("adapter", "merged"):
        tokenizer.save_pretrained(folder / name)
    return folder / "adapter", folder / "merged"


if __name__ == "__main__":
    main()
