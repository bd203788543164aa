"""Tokens a second of `dude train` against TRL's SFTTrainer with a PEFT LoRA: same rows, model, batch, packing on both.

Every round trains each case for a few steps; the first step of each is not counted. Ratios are tokens a second over the
baseline's in the same round, so above 1 is faster.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import measure
import peft
import torch
from rich.console import Console
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from dude_peft import DudeConfig
from dude_peft.config.schema import RunConfig
from dude_peft.data.prepare import prepare
from dude_peft.data.template import Template
from dude_peft.folder.checkpoint import Checkpoints
from dude_peft.folder.run_folder import save_adapter
from dude_peft.machine.stop import Stop
from dude_peft.model.load import load_model, load_tokenizer, locate
from dude_peft.model.probe import nature_of
from dude_peft.rewards.judge import Judge
from dude_peft.terminal.quiet import quiet_imports
from dude_peft.training.fit import Training, training_arguments
from dude_peft.training.loop import Loop
from dude_peft.training.progress import Display
from dude_peft.training.reference import Reference
from dude_peft.training.training_set import TrainingSet

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, RATE = 16, 16, 1e-4


class Clock(TrainerCallback):
    """Time and tokens from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.marks.append((time.perf_counter(), int(state.num_input_tokens_seen)))

    def speed(self) -> float:
        (start, first), (end, last) = self.marks[0], self.marks[-1]
        return (last - first) / (end - start)


def trl_settings(config: RunConfig, folder: str) -> dict[str, Any]:
    """What a trainer of TRL takes in the place of our run."""
    return {
        "output_dir": folder,
        "max_steps": config.train.max_steps,
        "per_device_train_batch_size": config.train.per_device_train_batch_size,
        "learning_rate": config.train.learning_rate,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": config.train.bf16,
        "gradient_checkpointing": False,
        "optim": config.train.optim,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": config.train.logging_steps,
    }


def trl_lora(config: RunConfig, where: str, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """SFTTrainer as its documentation has it."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            **trl_settings(config, folder),
            packing=True,
            max_length=config.data.max_length,
            include_num_input_tokens_seen="all",
        )
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        clock = Clock()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            trainer = SFTTrainer(
                model=load_model(config.model, where),
                args=settings,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=lora,
                callbacks=[clock],
            )
            trainer.train()
        return clock.speed()


def dude_train(
    config: RunConfig, where: str, tokenizer: Any, examples: Any, within: AbstractContextManager[Any] | None = None
) -> float:
    """The loop of `dude train`, the process of its rewards included where it has any.

    The base model is loaded before `within` begins. A reference of pairs that is measured before training is no part of
    the time.
    """
    model: Any = load_model(config.model, where)
    nature = nature_of(model, int(tokenizer.pad_token_id))
    with tempfile.TemporaryDirectory() as folder, within or nullcontext():
        dpo, reference = config.train.dpo, None
        if dpo is not None and dpo.precompute_ref_log_probs:
            how: Any = {"say": str, "stage": lambda *_: nullcontext(lambda done: None), "check": lambda: None}
            reference = Reference(model, tokenizer, config.evaluation.batch_size, nature.company, config.train.bf16)
            reference = reference.measure(examples, examples.tokens_sha256, **how)
        model = peft.get_peft_model(model, DudeConfig(**config.adapter.settings(), task_type="CAUSAL_LM"))
        judge = None if config.train.rewarded is None else Judge(config.train.rewarded)
        metrics, answers = Path(folder, "metrics.jsonl"), Path(folder, "rollouts.jsonl")
        display = Display(quiet=True)
        loop = Loop(
            display=display,
            stop=Stop(display.warn),
            evaluation=config.evaluation,
            name_of=examples.source,
            save_adapter=save_adapter,
            checkpoints=Checkpoints(Path(folder, "checkpoints")),
            open_metrics=lambda kept: metrics.open("w", buffering=1, encoding="utf-8"),
            open_rollouts=lambda kept: answers.open("w", buffering=1, encoding="utf-8") if judge else nullcontext(),
        )
        run = config.model_copy(update={"output_dir": folder})
        arguments = training_arguments(run)
        Training(model, tokenizer, nature, examples, arguments, run, loop, judge, reference=reference).run()
        if judge is not None:
            judge.close()
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        return float(lines[-1]["tokens_per_second"])  # from the first line, behind step 1, to the last


def main() -> None:
    parser = measure.arguments(__doc__, rounds=6)
    measure.add_model(parser)
    parser.add_argument("--steps", type=int, default=7, help="with 3 the ratio swings by a fifth")
    parser.add_argument("--batch", type=int, default=2, help="packs in a step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a pack")
    settings = parser.parse_args()
    measure.set_threads(settings)
    Console().print("loading", style="dim")
    with quiet_imports():
        base = {
            "model": {"name_or_path": settings.model, "gguf_file": settings.gguf_file or None, "dtype": "float32"},
            "adapter": {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS},
            "data": {
                "train": "builtin:word-problems",
                "train_rows": 400,
                "packing": True,
                "max_length": settings.max_length,
            },
            "train": {
                "learning_rate": RATE,
                "max_steps": settings.steps,
                "per_device_train_batch_size": settings.batch,
                "logging_steps": 1000,
            },
            "evaluation": {"enabled": False},
            "output_dir": "unused",
        }
        config = RunConfig(**base).resolved()
        where = locate(config.model)
        tokenizer = load_tokenizer(config.model, where)
        template = Template(tokenizer, "auto")
        tokens = prepare(config.data.train, template, tokenizer, max_length=config.data.max_length, limit=400)
        examples = TrainingSet(tokens)
        rows = [examples[index] for index in range(len(examples))]

        def ours(method: str) -> RunConfig:
            return RunConfig(**{**base, "adapter": {**base["adapter"], "method": method}}).resolved()

        cases = {
            "TRL SFTTrainer, PEFT LoRA": lambda: trl_lora(config, where, tokenizer, rows),
            "dude train, dude": lambda: dude_train(ours("dude"), where, tokenizer, examples),
            "dude train, lora": lambda: dude_train(ours("lora"), where, tokenizer, examples),
        }
        results = measure.speeds(cases, settings.rounds)
    measure.show(
        f"tokens a second in training, packs of {settings.max_length}, {settings.batch} a step",
        results,
        ["tokens_per_second", "ratio", "ratio_low", "ratio_high"],
    )
    measure.finish("throughput", settings, results)


if __name__ == "__main__":
    main()
