"""Speed and memory of `objective: dpo` and `grpo` against TRL's own trainer with a PEFT LoRA: same rows, model, batch.

    python benchmarks/objective_speed.py dpo --json benchmarks/results/DATE-objective-speed-dpo.json
    python benchmarks/objective_speed.py grpo --model FOLDER --gguf-file ""

Speed: every round trains each case for a few steps, of which the first is not counted. Tokens are those of prompts and
answers, padding left out. Ratios are tokens a second over the baseline's in the same round, so above 1 is faster. Of
dpo, all see the same batches in the same order; of grpo, answers are drawn, so a few end early.
Memory: of one more run, the most bytes that live beyond the loaded base model: adapter, optimizer, activations, caches,
merged weights, any second model. On a CPU they are counted (exact), on a GPU the allocator tells them. Below 1 is less.
Of dpo, the disabled adapter is the reference of all cases, asked in every step; with --precompute all ask it before
training, which no speed counts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any

import measure
import peft
import torch
from rich.console import Console
from throughput import ALPHA, RANK, TARGETS, Clock, dude_train, trl_settings
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from dude_peft.config.schema import RunConfig
from dude_peft.data.answers import same_answer
from dude_peft.data.labels import IGNORE
from dude_peft.data.objectives import KINDS
from dude_peft.data.prepare import prepare
from dude_peft.data.template import Template
from dude_peft.model.load import load_model, load_tokenizer, locate
from dude_peft.planning.live_bytes import LiveBytes
from dude_peft.terminal.quiet import quiet_imports
from dude_peft.training.order import EpochOrder
from dude_peft.training.training_set import TrainingSet

RATE = 1e-5
BASELINE = "TRL, PEFT LoRA"
COLUMNS = ["tokens_per_second", "ratio", "ratio_low", "ratio_high", "peak_mib", "peak_ratio"]


class Peak:
    """Within: the most bytes that live beyond what was there before."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._live = LiveBytes([])
        self.bytes = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.bytes = -torch.cuda.memory_allocated()
        else:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._device == "cuda":
            self.bytes += torch.cuda.max_memory_allocated()
        else:
            self._live.__exit__(kind, error, trace)
            self.bytes = self._live.peak


class OnOurRows(DPOTrainer):
    """Takes token ids as they are, in our order: in another one, batches would differ in their padding."""

    def __init__(self, order: EpochOrder, **settings: Any) -> None:
        self._order = order
        super().__init__(**settings)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any) -> Any:
        return self._order


def trl_lora(config: RunConfig, where: str, tokenizer: Any, examples: TrainingSet, within: Any) -> float:
    """TRL's trainer as its documentation has it; the base model is loaded before `within` begins."""
    from datasets import Dataset

    dpo, section = config.train.dpo, config.train.rewarded
    rows = [_asked(examples[index], tokenizer) for index in range(len(examples))]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        common = trl_settings(config, folder)
        settings: dict[str, Any] = {
            "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
            "peft_config": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"),
            "callbacks": [clock],
        }
        model = load_model(config.model, where)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), within:
            if dpo is not None:
                arguments = DPOConfig(
                    **common,
                    beta=dpo.beta,
                    precompute_ref_log_probs=dpo.precompute_ref_log_probs,
                    include_num_input_tokens_seen="non_padding",
                )
                order = EpochOrder(examples.lengths.tolist(), config.train.seed)
                trainer: Any = OnOurRows(order, model=model, args=arguments, **settings)
            else:
                assert section is not None
                drawing = {
                    name: getattr(section, name) for name in ("num_generations", "max_completion_length", "beta")
                }
                arguments = GRPOConfig(**common, **drawing)
                trainer = GRPOTrainer(model=model, reward_funcs=_right, args=arguments, **settings)
            trainer.train()
    return clock.speed()


def _right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(same_answer(given, wanted)) for given, wanted in zip(completions, answer, strict=True)]


def _asked(example: dict[str, list[int]], tokenizer: Any) -> dict[str, Any]:
    """A row as TRL reads it, with the same tokens."""
    prompt = [id for id, label in zip(example["input_ids"], example["labels"], strict=True) if label == IGNORE]
    answer = [label for label in example["labels"] if label != IGNORE]
    if "rejected_labels" not in example:
        return {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(answer, skip_special_tokens=True)}
    rejected = [label for label in example["rejected_labels"] if label != IGNORE]
    return {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": rejected}


def configured(settings: argparse.Namespace, method: str) -> RunConfig:
    """The run of a case."""
    dpo = settings.objective == "dpo"
    section = (
        {"precompute_ref_log_probs": settings.precompute}
        if dpo
        else {
            "num_generations": settings.batch,
            "max_completion_length": settings.max_completion_length,
            "beta": settings.beta,
        }
    )
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": settings.model, "gguf_file": settings.gguf_file or None, "dtype": settings.dtype},
            "adapter": {"method": method, "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS},
            "data": {"train": "builtin:preferences" if dpo else "builtin:word-problems", "train_rows": 100},
            "train": {
                "objective": settings.objective,
                settings.objective: section,
                "learning_rate": RATE,
                "max_steps": settings.steps,
                "per_device_train_batch_size": settings.batch,
                "logging_steps": 1000,
            },
            "evaluation": {"enabled": False},
            "output_dir": "unused",
        }
    ).resolved()


def main() -> None:
    """Measure and print."""
    parser = measure.arguments(__doc__, rounds=5)
    parser.add_argument("objective", choices=["dpo", "grpo"])
    measure.add_model(parser)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=None, help="of a step: pairs (4), or answers to one prompt (8)")
    parser.add_argument("--precompute", action="store_true", help="dpo: ask the reference before training")
    parser.add_argument("--max-completion-length", type=int, default=32, help="grpo")
    parser.add_argument("--beta", type=float, default=0.0, help="grpo: weight of KL to the base model")
    settings = parser.parse_args()
    settings.batch = settings.batch or (4 if settings.objective == "dpo" else 8)
    measure.set_threads(settings)
    Console().print("loading", style="dim")
    with quiet_imports():
        config = configured(settings, "lora")
        where = locate(config.model)
        tokenizer = load_tokenizer(config.model, where)
        tokens = prepare(
            config.data.train,
            Template(tokenizer, "auto"),
            tokenizer,
            max_length=512,
            train_on="answers" if config.train.rewarded is None else "last_answer",
            limit=config.data.train_rows,
            kind=KINDS[settings.objective],
        )
        examples = TrainingSet(tokens)
        trains: dict[str, Callable[..., float]] = {BASELINE: functools.partial(trl_lora, config)}
        for method in ("dude", "lora"):
            trains[f"dude train, {method}"] = functools.partial(dude_train, configured(settings, method))
        peaks = {}
        for name, train in trains.items():
            peak = Peak(settings.device)
            train(where, tokenizer, examples, within=peak)
            peaks[name] = peak.bytes
        speed = {
            name: functools.partial(train, where, tokenizer, examples, within=contextlib.nullcontext())
            for name, train in trains.items()
        }
        results = measure.speeds(speed, settings.rounds)
    for name, row in results.items():
        row |= {"peak_mib": peaks[name] / 2**20, "peak_ratio": peaks[name] / peaks[BASELINE]}
    measure.show(f"{settings.objective}, {settings.batch} rows a step", results, COLUMNS)
    measure.finish("objective speed", settings, results)


if __name__ == "__main__":
    main()
