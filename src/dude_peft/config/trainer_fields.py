"""Which fields of `transformers.TrainingArguments` a run hands on, and why it sets or refuses the others.

Every field of the releases within our bounds stands in one of the tables, so that a name is judged while the
configuration is read, without transformers. A field that a later release adds is refused until somebody has looked at
what it does to the order of the rows, to checkpoints, and to resuming bit by bit.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dude_peft.show import shown

KEY = "train.extra_arguments"

HANDED_ON = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs", "torch_compile_backend",
    "torch_empty_cache_steps", "full_determinism", "ddp_bucket_cap_mb", "ddp_timeout", "run_name", "project",
}  # fmt: skip
"""Fields that a run takes as they are."""

_TRACKER = {"run_name", "project"}

_OF_ONE_NAME = (
    "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "optim", "weight_decay", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32",
    "gradient_checkpointing", "neftune_noise_alpha", "logging_steps", "report_to", "save_steps", "save_total_limit",
    "seed", "train_sampling_strategy", "torch_compile", "use_liger_kernel", "liger_kernel_config",
)  # fmt: skip
_SET_BY = {
    **{name: f"train.{name}" for name in _OF_ONE_NAME},
    "output_dir": "output_dir",
    "data_seed": "train.seed",
    "warmup_ratio": "train.warmup_steps",
    "activation_checkpointing": "train.gradient_checkpointing",
    "group_by_length": "train.train_sampling_strategy",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "eval_steps": "evaluation.eval_steps",
    "eval_strategy": "evaluation.eval_steps",
    "metric_for_best_model": "evaluation.metric_for_best_model",
    "load_best_model_at_end": "evaluation.load_best_model_at_end",
}

_REASONS = {
    "the run writes checkpoints of its own, from which it resumes bit by bit": (
        "save_only_model", "save_strategy", "save_on_each_node", "enable_jit_checkpoint",
        "restore_callback_states_from_checkpoint",
    ),
    "run the same command again: it resumes by itself": ("resume_from_checkpoint", "ignore_data_skip"),
    "it would change which rows a step has, and in which order": (
        "dataloader_drop_last", "dataloader_in_order", "auto_find_batch_size", "accelerator_config",
        "length_column_name", "remove_unused_columns", "label_names",
    ),
    "the loss of a step is a mean over all of its trained tokens, whatever the batches are": (
        "average_tokens_across_devices", "label_smoothing_factor",
    ),
    "the run decides by learning rate and weight decay which tensors are grouped": ("optim_target_modules",),
    "held-out rows are measured as section evaluation says": (
        "eval_delay", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
        "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval",
        "greater_is_better", "do_train", "do_eval", "do_predict",
    ),
    "the run writes metrics.jsonl and shows its own progress": (
        "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node", "log_level",
        "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "debug", "skip_memory_metrics",
        "logging_dir",
    ),
    "processes and devices are chosen by dude train --launch": (
        "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "local_rank", "ddp_find_unused_parameters",
        "ddp_broadcast_buffers", "ddp_backend", "ddp_static_graph", "use_cpu",
    ),
    "run dude upload on the finished adapter, which is checked first": (
        "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
        "hub_revision",
    ),
    "set up the tracker's own environment for it; it may publish the run": (
        "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    ),
    "adapters need the checkpointing without re-entry that train.gradient_checkpointing sets": (
        "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs",
    ),
    "it picks kernels by timing them, so a resumed run would not repeat the bits": ("torch_compile_mode",),
    "rows are tokenised before training and mapped into memory, so workers have nothing to do": (
        "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers",
        "dataloader_multiprocessing_context",
    ),
    "memory is pinned wherever there is a GPU": ("dataloader_pin_memory",),
    "keys and values of a training step are never read again": ("use_cache",),
}  # fmt: skip
_REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}

_BACKENDS = ("inductor", "aot_eager", "eager")


def fault(extra: Mapping[str, Any], section: Any) -> str | None:
    """What is wrong with `train.extra_arguments`, in one line; None where nothing is.

    Args:
        extra: the fields and their values.
        section: the `train` section that they stand in.
    """
    for name, value in extra.items():
        key = f"key '{KEY}.{shown(name, 80)}'"
        if name in _SET_BY:
            return f"{key}: the run has a key of its own for it; set {_SET_BY[name]}"
        if name in _REFUSED:
            return f"{key} is refused: {_REFUSED[name]}; leave it out"
        if name not in HANDED_ON:
            near = difflib.get_close_matches(name, [*HANDED_ON, *_SET_BY, *_REFUSED], n=1)
            hint = f"closest: {near[0]!r}" if near else f"known: {', '.join(sorted(HANDED_ON))}"
            return f"{key} is no field of TrainingArguments that a run can take; {hint}"
        if any(isinstance(number, float) and not math.isfinite(number) for number in _leaves(value)):
            return f"{key}: expected a finite number"
        if name in _TRACKER and not section.report_to:
            return f"{key} is for a tracker; set train.report_to too, or leave it out"
    if "lr_scheduler_kwargs" in extra and section.lr_scheduler_type.startswith("constant"):
        return f"key '{KEY}.lr_scheduler_kwargs' has no effect on train.lr_scheduler_type: {section.lr_scheduler_type}"
    if (backend := extra.get("torch_compile_backend")) is None:
        return None
    if not section.torch_compile:
        return f"key '{KEY}.torch_compile_backend' counts with train.torch_compile: true alone; leave it out"
    if backend not in _BACKENDS:
        return f"key '{KEY}.torch_compile_backend': expected one of {', '.join(_BACKENDS)}"
    return None


def hint(name: str) -> str | None:
    """What to do with a field of TrainingArguments that was written into section train, where that has no such key."""
    if name in HANDED_ON:
        return f"write it into {KEY}"
    return _REFUSED.get(name)


def classified() -> set[str]:
    """Every name that one of the tables knows."""
    return {*HANDED_ON, *_SET_BY, *_REFUSED}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
