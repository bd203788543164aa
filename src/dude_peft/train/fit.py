"""The optimisation: transformers' Trainer, watched for NaN and shown as one bar and one file of numbers."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import peft  # noqa: F401  # Trainer would import it later, in the middle of the output
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dude_peft.data.batches import pad_right
from dude_peft.errors import ConfigError, NumericsError, ResourceError
from dude_peft.train.config import TrainSection
from dude_peft.train.progress import Display


@dataclass(frozen=True)
class Fit:
    """What came out of a training loop, beside the trained model."""

    steps: int
    tokens: int
    """Non-padding tokens seen."""
    seconds: float
    curve: tuple[tuple[int, float], ...]
    """(step, mean loss since the point before)."""

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the whole loop."""
        return self.tokens / max(self.seconds, 1e-9)


def training_arguments(section: TrainSection, scratch: str) -> TrainingArguments:
    """Trainer's own settings for a resolved section; nothing is ever written to `scratch`.

    Raises:
        ConfigError: transformers refuses a setting here, such as an optimizer that is not installed.
    """
    checkpointing: dict[str, Any] = {}
    if section.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    try:
        arguments = TrainingArguments(
            output_dir=scratch,
            learning_rate=section.learning_rate or 0.0,
            max_steps=section.max_steps or -1,
            num_train_epochs=section.num_train_epochs or 1.0,
            per_device_train_batch_size=section.per_device_train_batch_size,
            gradient_accumulation_steps=section.gradient_accumulation_steps,
            warmup_steps=section.warmup_steps,
            lr_scheduler_type=section.lr_scheduler_type,
            weight_decay=section.weight_decay,
            max_grad_norm=section.max_grad_norm,
            optim=section.optim,
            seed=section.seed,
            data_seed=section.seed,
            bf16=section.bf16,
            **checkpointing,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=section.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"section 'train': {' '.join(str(error).split())}") from error
    # One process drives one device: Trainer would wrap the model in nn.DataParallel wherever it sees several.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def fit(
    model: Any,
    examples: list[dict[str, list[int]]],
    arguments: TrainingArguments,
    *,
    pad_id: int,
    metrics: TextIO,
    display: Display,
) -> Fit:
    """Trains the adapter of `model` in place.

    Raises:
        NumericsError: the loss, a gradient or a trained weight became NaN or Inf; nothing was stepped with it.
        ResourceError: a batch does not fit into memory.
    """
    watch = _Watch(metrics, display)
    trainer = _WatchedTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=functools.partial(pad_right, pad_id=pad_id),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.on_loss = watch.add_loss
    uses_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # keys and values of a training forward are never read again
    steps = trainer_steps(arguments, len(examples))
    start = time.perf_counter()
    try:
        with display.stage("training", steps) as watch.advance:
            trainer.train()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"training does not fit into the device's memory at step {trainer.state.global_step + 1}; lower "
            "train.per_device_train_batch_size or data.max_length, or set train.gradient_checkpointing: true"
        ) from error
    finally:
        model.config.use_cache = uses_cache
    _check_weights(model)
    return Fit(
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=time.perf_counter() - start,
        curve=tuple(watch.curve),
    )


def trainer_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps that Trainer will take."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(rows / arguments.per_device_train_batch_size)
    each = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.num_train_epochs * each)


class _WatchedTrainer(Trainer):
    """Trainer that stops at a loss that is not a number, where Trainer itself logs 0 and goes on."""

    on_loss: Callable[[float], None]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        value = float(loss)
        if not math.isfinite(value):
            raise NumericsError(f"the training loss is {value} at step {self.state.global_step + 1}; {_REMEDY}")
        self.on_loss(value)
        return loss


_REMEDY = "nothing was saved: lower train.learning_rate, or use model.dtype: float32"


class _Watch(TrainerCallback):
    """Follows the run: the bar, metrics.jsonl, and gradients that are not numbers."""

    def __init__(self, metrics: TextIO, display: Display) -> None:
        self.curve: list[tuple[int, float]] = []
        self.advance: Callable[..., None] = lambda count, note="": None
        self._metrics = metrics
        self._display = display
        self._loss = 0.0
        self._start = self._mark = time.perf_counter()
        self._tokens = 0
        self._speed = 0.0

    def add_loss(self, loss: float) -> None:
        """One micro-batch's share of the step's loss."""
        self._loss += loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = self._mark = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        # Clipping has already spread one NaN or Inf over all gradients, so the norm cannot miss it.
        if gradients and not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
            raise NumericsError(f"a gradient is not finite at step {state.global_step + 1}; {_REMEDY}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # Trainer would drop the steps behind the last multiple of logging_steps
        elapsed = time.perf_counter() - self._start
        self._speed = state.num_input_tokens_seen / max(elapsed, 1e-9)
        self.advance(1, note=f"loss {self._loss:.3f}  {self._speed:,.0f} tokens/s")
        self._loss = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        now, tokens = time.perf_counter(), int(state.num_input_tokens_seen)
        line = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens_per_second": round((tokens - self._tokens) / max(now - self._mark, 1e-9), 1),
            "seconds": round(now - self._start, 3),
        }
        self._mark, self._tokens = now, tokens
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self.curve.append((line["step"], line["loss"]))
        if not self._display.live:
            left = (now - self._start) / state.global_step * (state.max_steps - state.global_step)
            self._display.say(
                f"step {state.global_step}/{state.max_steps}  loss {line['loss']:.3f}  "
                f"{line['tokens_per_second']:,.0f} tokens/s  ETA {left:.0f} s"
            )


def _check_weights(model: Any) -> None:
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise NumericsError(f"{name} is not finite after training; {_REMEDY}")
