"""No key is read and forgotten: set by itself, each changes what a run leaves behind.

A run's adapter, metrics, scores, answers, checkpoints, warnings and files are compared with those of the same run
without the key. A new key fails the first test until it stands in one of the two tables.
"""

from __future__ import annotations

import copy
import hashlib
import json
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel
from tiny import save_tiny

import dude_peft
from dude_peft.config.schema import RunConfig

GPU = "needs a GPU"
BESIDE = "tested with what it needs beside it: "
NOT_HERE = {
    "output_dir": "where all of it is",
    "model.gguf_file": f"{BESIDE}test_gguf",
    "model.revision": "of the hub",
    "model.quantization.method": f"{BESIDE}test_train_quantised",
    "model.quantization.compute_dtype": f"{BESIDE}test_train_quantised",
    "model.quantization.double_quantization": f"{BESIDE}test_train_quantised",
    "model.device_map": f"{BESIDE}test_placement",
    "model.max_memory": f"{BESIDE}test_placement",
    "model.offload_folder": f"{BESIDE}test_placement",
    "adapter.peft": f"{BESIDE}test_foreign",
    "adapter.start": f"{BESIDE}test_train_start",
    "adapter.init_from": f"{BESIDE}test_init_from",
    "adapter.target_parameters": f"{BESIDE}test_experts_run",
    "adapter.groups": f"{BESIDE}test_orthogonality",
    "data.train_split": "of hub sets and folders",
    "data.test_split": "of hub sets and folders",
    "data.streaming": "the rows are the same: test_data_streaming",
    "data.seed": "of generated rows, shares and mixtures",
    "train.grpo.reward_timeout": "a limit: test_rewarded",
    "train.grpo.reward_memory_gib": "a limit: test_rewarded",
    "train.grpo.trust_reward_files": f"{BESIDE}test_rewarded",
    "train.grpo.rewards.file": f"{BESIDE}test_rewarded",
    "train.grpo.rewards.function": f"{BESIDE}test_rewarded",
    "train.grpo.rewards.sha256": f"{BESIDE}test_rewarded",
    "train.grpo.rewards.model": f"{BESIDE}test_reward_models",
    "train.grpo.rewards.template": f"{BESIDE}test_reward_models",
    "train.fp16": GPU,
    "train.gradient_checkpointing": "memory alone",
    "train.report_to": "a tracker, which may not be installed",
    "train.tf32": GPU,
    "train.use_liger_kernel": f"{GPU}: test_liger",
    "train.liger_kernel_config": f"{GPU}: test_liger",
    "train.torch_compile": "a compiler's time: test_train_compile",
    "train.extra_arguments": "test_extra_arguments",
    "train.curriculum.reward": f"{BESIDE}test_curriculum",
    "train.curriculum.threshold": f"{BESIDE}test_curriculum",
    "evaluation.metric_for_best_model": "which steps differ is luck: test_preference",
    "evaluation.samples": "how many answers are shown",
    "evaluation.tasks": f"{BESIDE}test_eval_in_training",
    "evaluation.tasks_data_dir": f"{BESIDE}test_eval_in_training",
    "evaluation.tasks_limit": f"{BESIDE}test_eval_in_training",
    "evaluation.tasks_chat": f"{BESIDE}test_eval_in_training",
    "evaluation.tasks_num_fewshot": f"{BESIDE}test_eval_in_training",
    "evaluation.tasks_text": f"{BESIDE}test_eval_in_training",
    "evaluation.tasks_steps": f"{BESIDE}test_eval_in_training",
}

_LENGTH = {"kind": "length", "soft_punish_cache": 4}
_LETTERS = {"kind": "format", "pattern": ".*[ -~].*[ -~].*"}
PAIRS = {"data": {"train": "builtin:preferences", "test": "builtin:preferences", "train_rows": 8, "test_rows": 4}}
LABELS = {"data": dict.fromkeys(("train", "test"), "builtin:unpaired-preferences")}
BASES: dict[str, dict] = {
    "sft": {},
    "saving": {"train": {"save_steps": 1}},
    "watched": {"evaluation": {"eval_steps": 1}, "train": {"learning_rate": 0.5}},
    "impatient": {
        "evaluation": {"eval_steps": 1, "early_stopping_patience": 3, "early_stopping_threshold": 50.0},
    },
    "patient": {"evaluation": {"eval_steps": 1, "early_stopping_patience": 1}},
    "dpo": {**PAIRS, "train": {"objective": "dpo"}},
    "robust": {**PAIRS, "train": {"objective": "dpo", "dpo": {"loss_type": "robust", "label_smoothing": 0.1}}},
    "orpo": {**PAIRS, "train": {"objective": "orpo"}},
    "cpo": {**PAIRS, "train": {"objective": "cpo"}},
    "simpo": {**PAIRS, "train": {"objective": "cpo", "cpo": {"loss_type": "simpo"}}},
    "kto": {"data": {**LABELS["data"], "train_rows": 8, "test_rows": 4}, "train": {"objective": "kto"}},
    "reward": {
        **PAIRS,
        "train": {"objective": "reward"},
        "evaluation": {"rows": 64, "max_new_tokens": 128},  # the defaults: its model answers nothing
    },
    "grpo": {"train": {"objective": "grpo", "grpo": {"rewards": [_LETTERS, _LENGTH], "num_iterations": 2, "beta": 0.1,
                                                     "num_generations": 2, "max_completion_length": 6}}},
    "mol": {"data": {"general": "general.jsonl"}, "train": {"objective": "mol"}},
    "budget": {"adapter": {"budget": {"parameters": "4%", "by": "gradient"}}},
    "staged": {"train": {"curriculum": {"by": "length", "stages": 2}}},
}  # fmt: skip
BASES["staged by rate"] = {
    "train": {
        **BASES["grpo"]["train"],
        "curriculum": {"reward": "format", "samples": 4, "max_new_tokens": 4, "stages": 2},
        "max_steps": 8,
    }
}

KEYS: list[tuple[str, str, object]] = [
    ("sft", "model.name_or_path", "other"),
    ("sft", "model.dtype", "bfloat16"),
    ("sft", "model.attn_implementation", "eager"),
    ("sft", "model.trust_remote_code", True),
    ("sft", "adapter.method", "lora"),
    ("sft", "adapter.r", 2),
    ("sft", "adapter.lora_alpha", 3),
    ("sft", "adapter.lora_dropout", 0.5),
    ("sft", "adapter.target_modules", ["q_proj"]),
    ("sft", "adapter.exclude_modules", ["q_proj"]),
    ("sft", "adapter.modules_to_save", ["embed_tokens"]),
    ("sft", "adapter.rank_pattern", {"q_proj": 2}),
    ("sft", "adapter.alpha_pattern", {"q_proj": 2}),
    ("sft", "adapter.layers_to_transform", [0]),
    ("sft", "adapter.bias", "all"),
    ("sft", "adapter.norm_gradient", "exact"),
    ("sft", "adapter.svd_tol", 0.5),
    ("sft", "adapter.svd_seed", 7),
    ("budget", "adapter.budget.parameters", "5%"),
    ("budget", "adapter.budget.by", "uniform"),
    ("budget", "adapter.budget.calibration_rows", 3),
    ("budget", "adapter.budget.min_r", 1),
    ("budget", "adapter.budget.max_r", 3),
    ("sft", "data.train", "test.jsonl"),
    ("sft", "data.test.share", 0.2),
    ("sft", "data.set_aside", 0.3),
    ("sft", "data.columns", {"prompt": "completion", "completion": "prompt"}),
    ("sft", "data.train_rows", 5),
    ("sft", "data.test_rows", 2),
    ("sft", "data.template", "plain"),
    ("sft", "data.chat_template", "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"),
    ("sft", "data.special_tokens", "allow"),
    ("sft", "data.train_on", "all"),
    ("sft", "data.upft", 3),
    ("mol", "data.general", "general_test.jsonl"),
    ("mol", "data.general_share", 0.25),
    ("sft", "data.general_test", "general.jsonl"),
    ("sft", "data.max_length", 36),
    ("sft", "data.packing", True),
    ("dpo", "train.objective", "orpo"),
    ("dpo", "train.dpo.beta", 0.5),
    ("dpo", "train.dpo.loss_type", "hinge"),
    ("robust", "train.dpo.label_smoothing", 0.2),
    ("dpo", "train.dpo.precompute_ref_log_probs", True),
    ("orpo", "train.orpo.beta", 0.5),
    ("cpo", "train.cpo.beta", 0.5),
    ("cpo", "train.cpo.loss_type", "ipo"),
    ("cpo", "train.cpo.cpo_alpha", 0.2),
    ("simpo", "train.cpo.simpo_gamma", 0.9),
    ("cpo", "train.cpo.label_smoothing", 0.2),
    ("kto", "train.kto.beta", 0.5),
    ("kto", "train.kto.desirable_weight", 2.0),
    ("kto", "train.kto.undesirable_weight", 2.0),
    ("kto", "train.kto.loss_type", "apo_zero_unpaired"),
    ("reward", "train.reward.center_rewards_coefficient", 0.5),
    ("grpo", "train.grpo.rewards.kind", [{"kind": "answer"}]),
    ("grpo", "train.grpo.rewards.name", [{**_LETTERS, "name": "letters"}, _LENGTH]),
    ("grpo", "train.grpo.rewards.weight", [{**_LETTERS, "weight": 0.1}, _LENGTH]),
    ("grpo", "train.grpo.rewards.pattern", [{**_LETTERS, "pattern": ".*[0-9].*"}, _LENGTH]),
    ("grpo", "train.grpo.rewards.soft_punish_cache", [_LETTERS, {**_LENGTH, "soft_punish_cache": 2}]),
    ("grpo", "train.grpo.num_generations", 4),
    ("grpo", "train.grpo.max_completion_length", 5),
    ("grpo", "train.grpo.temperature", 0.5),
    ("grpo", "train.grpo.top_p", 0.5),
    ("grpo", "train.grpo.beta", 0.5),
    ("grpo", "train.grpo.use_bias_correction_kl", False),
    ("grpo", "train.grpo.loss_type", "grpo"),
    ("grpo", "train.grpo.scale_rewards", "none"),
    ("grpo", "train.grpo.importance_sampling_level", "sequence"),
    ("grpo", "train.grpo.num_iterations", 1),
    ("grpo", "train.grpo.epsilon", 1e-5),
    ("grpo", "train.grpo.epsilon_high", 1e-5),
    ("grpo", "train.grpo.mask_truncated_completions", True),
    ("staged", "train.curriculum.by", "pass_rate"),
    ("staged", "train.curriculum.stages", 3),
    ("staged by rate", "train.curriculum.samples", 3),
    ("staged by rate", "train.curriculum.temperature", 0.2),
    ("staged by rate", "train.curriculum.top_p", 0.2),
    ("staged by rate", "train.curriculum.max_new_tokens", 3),
    ("staged by rate", "train.curriculum.drop.hopeless", 0.0),
    ("staged by rate", "train.curriculum.drop.solved", 1.0),
    ("sft", "train.orthogonality", 0.5),
    ("sft", "train.learning_rate", 2e-2),
    ("sft", "train.max_steps", 2),
    ("sft", "train.num_train_epochs", 1),
    ("sft", "train.per_device_train_batch_size", 2),
    ("sft", "train.gradient_accumulation_steps", 2),
    ("sft", "train.warmup_steps", 2),
    ("sft", "train.lr_scheduler_type", "constant"),
    ("sft", "train.weight_decay", 0.5),
    ("sft", "train.max_grad_norm", 0.01),
    ("sft", "train.optim", "adafactor"),
    ("sft", "train.neftune_noise_alpha", 5.0),
    ("sft", "train.loraplus_lr_ratio", 4.0),
    ("sft", "train.magnitude_lr_ratio", 4.0),
    ("sft", "train.train_sampling_strategy", "group_by_length"),
    ("sft", "train.trainer", "trl"),
    ("sft", "train.seed", 5),
    ("sft", "train.logging_steps", 2),
    ("sft", "train.movement_steps", 1),
    ("sft", "train.save_steps", 2),
    ("saving", "train.save_total_limit", 3),
    ("sft", "train.bf16", True),
    ("sft", "evaluation.enabled", False),
    ("sft", "evaluation.rows", 2),
    ("sft", "evaluation.max_new_tokens", 3),
    ("sft", "evaluation.batch_size", 1),
    ("sft", "evaluation.eval_steps", 1),
    ("impatient", "evaluation.early_stopping_patience", 1),
    ("patient", "evaluation.early_stopping_threshold", 50.0),
    ("watched", "evaluation.load_best_model_at_end", False),
]


MIXTURE = "SourceSection"
"""Rows may be named as a list of these: test_data_fields."""


def leaves(section: type[BaseModel], before: str = "") -> set[str]:
    """Every key, with its sections in front of it."""
    found = set()
    for name, field in section.model_fields.items():
        inner = [each for each in _types(field.annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
        inner = [each for each in inner if each.__name__ != MIXTURE]
        for each in inner:
            found |= leaves(each, f"{before}{name}.")
        if not inner:
            found.add(before + name)
    return found


def _types(annotation: object) -> list[object]:
    parts = [each for part in typing.get_args(annotation) for each in _types(part)]
    return [annotation, *parts]


def test_every_key_stands_in_one_table():
    tried = {key for _, key, _ in KEYS}
    assert not tried & set(NOT_HERE)
    assert tried | set(NOT_HERE) == leaves(RunConfig)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("every-key")
    save_tiny(folder / "model", attention_bias=True)
    save_tiny(folder / "other", attention_bias=True, seed=1)
    stops = {"eos_token_id": [256, *range(150, 180)], "pad_token_id": 257}  # many tokens end an answer
    for name in ("model", "other"):
        (folder / name / "generation_config.json").write_text(json.dumps(stops))
    for name, start, count in (("train", 0, 12), ("test", 50, 4)):
        rows = [
            {"prompt": "say it " * (1 + n % 3), "completion": f"{n}<|system|>!"} for n in range(start, start + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("general", "general_test"):
        texts = [f"{name} once upon a time {number}" for number in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def left_behind(config: dict, out: Path) -> dict[str, object]:
    """All of a run that no clock is in."""
    report = dude_peft.train({**config, "output_dir": str(out)})
    found: dict[str, object] = {"warnings": report.warnings, "trained": report.steps}
    found["scores"] = [None if score is None else (score, score.answers) for score in (report.before, report.after)]
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name.endswith(("adapter_model.safetensors", "rollouts.jsonl", "curriculum.jsonl")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            timed = ("seconds", "tokens_per_second", "memory_bytes")
            found[name] = [{key: value for key, value in line.items() if key not in timed} for line in lines]
        elif "tfevents" not in name:
            found[name] = True
    return found


def base_of(name: str) -> dict:
    """The run that a key is set in."""
    config: dict = {
        "model": {"name_or_path": "model", "dtype": "float32"},
        "adapter": {"r": 4, "lora_alpha": 8},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 256},
        "train": {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1},
        "evaluation": {"rows": 4, "max_new_tokens": 8},
    }
    for section, changes in copy.deepcopy(BASES[name]).items():
        config[section] |= changes
    return config


def with_key(config: dict, key: str, value: object) -> dict:
    """The same with a key at a value; that of one reward is the whole list."""
    section = config = copy.deepcopy(config)
    before, of_reward, _ = key.partition(".rewards.")
    *above, last = [*before.split("."), "rewards"] if of_reward else key.split(".")
    for name in above:
        if not isinstance(section.get(name), dict):
            section[name] = {}
        section = section[name]
    section[last] = value
    if key == "train.num_train_epochs":
        del config["train"]["max_steps"]
    return config


PLAIN: dict[str, dict[str, object]] = {}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "key", "value"), KEYS)
def test_a_key_changes_what_a_run_leaves_behind(place, tmp_path, monkeypatch, base, key, value):
    monkeypatch.chdir(place)
    config = base_of(base)
    if base not in PLAIN:
        PLAIN[base] = left_behind(config, tmp_path / "plain")
    assert left_behind(with_key(config, key, value), tmp_path / "run") != PLAIN[base]


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_without_a_key_nothing_changes(place, tmp_path, monkeypatch, base):
    monkeypatch.chdir(place)
    assert left_behind(base_of(base), tmp_path / "one") == left_behind(base_of(base), tmp_path / "two")
