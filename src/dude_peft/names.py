"""What other tools call our keys: the one table of it, for the hint at a key that does not exist."""

from __future__ import annotations

_MEANT = {
    "model.name_or_path": (
        "model", "base_model", "model_id", "model_name", "model_path", "model_name_or_path", "base_model_name_or_path",
        "pretrained_model_name_or_path", "checkpoint",
    ),
    "model.quantization": (
        "quantisation", "quantize", "quantise", "quantization_config", "quant_method", "quant", "bnb_4bit_quant_type",
        "bnb_config", "quantization_method",
    ),
    "model.device_map": ("device", "devices", "auto_device_map"),
    "model.max_memory": ("max_memory_mb", "gpu_memory_limit", "memory_limit"),
    "model.offload_folder": ("offload_dir", "offload"),
    "model.dtype": ("torch_dtype", "precision", "float16"),
    "adapter": ("lora", "lora_config", "peft_config"),
    "adapter.method": ("peft_type", "finetuning_type", "train_type", "tuner_type"),
    "adapter.r": ("rank", "lora_r", "lora_rank", "lora_dim", "network_dim"),
    "adapter.lora_alpha": ("alpha", "lora_scale", "network_alpha"),
    "adapter.lora_dropout": ("dropout",),
    "adapter.target_modules": (
        "target", "modules", "target_layer", "lora_target", "lora_target_module", "lora_target_linear",
    ),
    "adapter.modules_to_save": ("additional_target", "lora_modules_to_save"),
    "data": ("dataset_config", "data_config"),
    "data.train": (
        "dataset", "dataset_name", "dataset_path", "dataset_dir", "data_path", "data_file", "train_file", "train_data",
        "train_dataset", "train_path", "training_data", "training_file",
    ),
    "data.test": (
        "val", "valid", "validation", "test_size", "val_size", "val_set_size", "split_dataset_ratio", "test_file",
        "test_data", "test_dataset", "eval_file", "eval_data", "eval_dataset", "val_file", "val_data", "val_dataset",
        "valid_data", "validation_file", "validation_data", "validation_split", "validation_dataset",
    ),
    "data.train_rows": ("max_sample", "max_train_sample", "num_sample"),
    "data.test_rows": ("max_eval_sample", "max_test_sample"),
    "data.template": ("prompt_style",),
    "data.chat_template": ("prompt_template", "custom_template", "jinja_template"),
    "data.train_on": ("train_on_input", "train_on_prompt", "mask_prompt", "completion_only_loss", "mask_history"),
    "data.max_length": (
        "max_seq_length", "max_seq_len", "max_sequence_length", "seq_length", "seq_len", "sequence_len",
        "sequence_length", "max_len", "cutoff_len", "context_length", "block_size", "model_max_length",
    ),
    "data.streaming": ("dataset_streaming", "stream", "streaming_dataset"),
    "data.packing": ("sample_packing", "pack"),
    "train": ("training", "trainer", "training_argument", "training_args", "hyperparameter"),
    "train.learning_rate": ("lr", "max_lr", "peak_lr", "step_size"),
    "train.max_steps": ("step", "max_iter", "num_step", "num_train_step", "iter", "iters", "total_steps"),
    "train.num_train_epochs": ("epoch", "num_epoch", "n_epoch", "max_epoch", "train_epoch"),
    "train.per_device_train_batch_size": (
        "batch", "bs", "batch_size", "micro_batch_size", "mini_batch_size", "train_batch_size", "global_batch_size",
        "per_device_batch_size",
    ),
    "train.gradient_accumulation_steps": (
        "grad_accum", "grad_accum_step", "gradient_accumulation", "gradient_accumulation_iter",
        "accumulate_grad_batche", "accumulation_step", "grad_accumulation_step",
    ),
    "train.warmup_steps": ("warmup", "warmup_ratio", "warmup_step", "num_warmup_step", "lr_warmup_step"),
    "train.lr_scheduler_type": ("scheduler", "lr_scheduler", "schedule", "lr_schedule"),
    "train.weight_decay": ("wd", "decay"),
    "train.max_grad_norm": ("clip", "clip_grad_norm", "grad_clip", "gradient_clipping", "gradient_clip_val"),
    "train.optim": ("optimizer", "optimiser", "optimizer_type"),
    "train.seed": ("seed", "random_seed", "random_state"),
    "train.save_total_limit": ("max_checkpoint", "keep_checkpoint"),
    "train.gradient_checkpointing": ("checkpointing", "activation_checkpointing", "use_gradient_checkpointing"),
    "train.report_to": ("logger", "tracker", "wandb", "wandb_project"),
    "evaluation": ("eval", "evaluate"),
    "evaluation.batch_size": ("eval_batch_size", "per_device_eval_batch_size", "val_batch_size"),
    "evaluation.max_new_tokens": ("max_new_token", "max_gen_toks"),
    "evaluation.tasks": ("benchmark", "eval_task"),
    "output_dir": ("output", "out", "out_dir", "output_path", "save_dir", "save_path", "checkpoint_dir", "run_name"),
}  # fmt: skip
_METHODS = {
    "use_dora": "dora",
    "use_rslora": "rslora",
    "init_lora_weights": "pissa",
    "pissa_init": "pissa",
}
_FORMATS = {
    "load_in_4bit": "nf4",
    "load_in_8bit": "int8",
    "qlora": "nf4",
    "quantization_bit": "nf4 (4 bits) or int8",
    "bits": "nf4 (4 bits) or int8",
    "bnb_4bit_compute_dtype": "{method: nf4, compute_dtype: ...}",
    "bnb_4bit_use_double_quant": "{method: nf4, double_quantization: true}",
    "double_quant": "{method: nf4, double_quantization: true}",
}
_KEYS = {word: key for key, words in _MEANT.items() for word in words}


def our_key(word: str) -> str | None:
    """The key of a run, as `train.learning_rate`, that other tools call `word`; None where the table has none."""
    plain = word.strip().lower().replace("-", "_")
    return _KEYS.get(plain) or _KEYS.get(plain.removesuffix("s"))


def instead_of(word: str, section: str = "adapter.") -> str | None:
    """What to do instead of setting a key of other tools that is no single key here; None where there is nothing.

    `section` stands before names of the adapter's keys.
    """
    plain = word.strip().lower().replace("-", "_")
    if plain in _METHODS:
        return f"set {section}method to {_METHODS[plain]!r}"
    if plain in _FORMATS:
        return f"set model.quantization to {_FORMATS[plain]}"
    if plain == "ensure_weight_tying":
        return f"name the embedding in {section}target_modules, and a tied output layer follows it"
    return None
