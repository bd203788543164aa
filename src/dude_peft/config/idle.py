"""Keys that are set in a run and change nothing in it, because another key leaves them without a part to play.

A key at its default asks for nothing. `evaluation.enabled: false` is a switch of its own: what it switches off may
stay.
"""

from __future__ import annotations

from typing import Any

_OF_TASKS = ("tasks_data_dir", "tasks_limit", "tasks_chat", "tasks_num_fewshot")
_OF_ANSWERS = ("rows", "max_new_tokens", "samples")
_BY_GRADIENT = ("gradient", "fisher")


def idle_key(config: Any, judged: tuple[str, ...]) -> str | None:
    """One line on the first such key of a run, and what to do; None where every key counts.

    Args:
        config: a RunConfig.
        judged: the metrics that held-out preferences alone have.
    """
    adapter, data, train, evaluation = config.adapter, config.data, config.train, config.evaluation
    idle = {
        "train.warmup_steps": (
            train.lr_scheduler_type == "constant" and train.warmup_steps > 0 and _is_set(train, "warmup_steps"),
            "train.lr_scheduler_type: constant; set that to constant_with_warmup",
        ),
        "train.liger_kernel_config": (
            train.liger_kernel_config is not None and not train.use_liger_kernel,
            "a run without Liger's kernels; set train.use_liger_kernel: true",
        ),
        "data.general_share": (
            train.objective != "mol" and _is_set(data, "general_share"),
            f"train.objective: {train.objective}; set that to mol",
        ),
        "data.test_split": (
            hasattr(data.test, "share") and _is_set(data, "test_split"),
            "a share of the training rows; name rows in data.test",
        ),
        "adapter.budget.calibration_rows": (
            adapter.budget is not None
            and adapter.budget.by not in _BY_GRADIENT
            and _is_set(adapter.budget, "calibration_rows"),
            f"{'' if adapter.budget is None else adapter.budget.by}, which looks at no rows; set adapter.budget.by to "
            "gradient or fisher",
        ),
        "evaluation.early_stopping_threshold": (
            evaluation.early_stopping_patience is None and evaluation.early_stopping_threshold > 0,
            "a run without patience; set evaluation.early_stopping_patience",
        ),
        "evaluation.metric_for_best_model": (
            evaluation.metric_for_best_model in judged and (evaluation.eval_steps is None or not evaluation.enabled),
            "a run that measures before and after alone; set evaluation.eval_steps",
        ),
        **{
            f"evaluation.{name}": (
                not evaluation.tasks and _is_set(evaluation, name),
                "a run without tasks; name them in evaluation.tasks",
            )
            for name in _OF_TASKS
        },
        **{
            f"evaluation.{name}": (
                evaluation.enabled and train.objective == "reward" and _is_set(evaluation, name),
                "train.objective: reward, whose model answers nothing; choose another objective",
            )
            for name in _OF_ANSWERS
        },
    }
    found = next(((key, why) for key, (there, why) in idle.items() if there), None)
    return None if found is None else f"key '{found[0]}' has no effect on {found[1]}, or leave it out"


def _is_set(section: Any, name: str) -> bool:
    return bool(getattr(section, name) != type(section).model_fields[name].default)
