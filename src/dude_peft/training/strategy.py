"""What a run in several processes cannot do, told before it starts; `dude plan` asks the same."""

from __future__ import annotations

from dude_peft.config.schema import BITSANDBYTES, RunConfig
from dude_peft.errors import ConfigError
from dude_peft.machine.processes import count, is_first
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL


def check_strategy(config: RunConfig, strategy: str, processes: int, *, scored: bool) -> list[str]:
    """Refuses what several processes cannot do together.

    Args:
        config: of the run.
        strategy: ddp, fsdp2 or zero3.
        processes: how many; one can do everything.
        scored: whether evaluation.tasks are scored during the run.

    Returns:
        Warnings.

    Raises:
        ConfigError: a setting that needs one process, or a whole model in each.
    """
    if processes == 1:
        return []
    if config.train.torch_compile:
        raise ConfigError("train.torch_compile works in one process; leave it, or --launch, out")
    if config.train.curriculum is not None and config.train.curriculum.by == "pass_rate":
        raise ConfigError(
            "train.curriculum: pass rates are measured in one process; leave --launch out, or set "
            "train.curriculum.by: length"
        )
    if config.train.dpo is not None and config.train.dpo.precompute_ref_log_probs:
        raise ConfigError("train.dpo.precompute_ref_log_probs measures in one process; leave it, or --launch, out")
    if strategy == "ddp":
        return []
    if config.train.use_liger_kernel:
        raise ConfigError(f"train.use_liger_kernel: it reads whole weights, and {strategy} splits them; choose ddp")
    if config.train.rewarded is not None:
        raise ConfigError(f"train.objective: grpo: {strategy} splits the model, which has to answer whole; choose ddp")
    if config.train.task_type != CAUSAL:
        raise ConfigError(f"train.objective: {config.train.objective}: {strategy} does not split its head; choose ddp")
    if config.adapter.foreign:
        raise ConfigError(f"{strategy} does not split {config.adapter.method}; choose ddp")
    if config.train.orthogonality:
        raise ConfigError(
            f"train.orthogonality: it needs whole weights, and {strategy} splits them; use --launch ddp, or leave it "
            "out"
        )
    if config.adapter.target_parameters:
        raise ConfigError(
            f"adapter.target_parameters: it needs whole weights, and {strategy} splits them; use --launch ddp"
        )
    if config.train.movement_steps is not None:
        raise ConfigError(
            f"train.movement_steps: it needs whole weights, and {strategy} splits them; use --launch ddp, or leave it "
            "out (dude report has the movement of a finished run)"
        )
    if scored:
        raise ConfigError(
            f"evaluation.tasks: a model split by {strategy} cannot be scored during the run; leave it out, and use "
            "dude eval --processes on the adapter"
        )
    if strategy == "zero3":
        return ["zero3 writes no checkpoints, because DeepSpeed does not share its optimizer state; fsdp2 writes them"]
    return []


def check_packed(strategy: str, processes: int, method: str) -> None:
    """Looks at a quantised base that would be split.

    Args:
        strategy: ddp, fsdp2 or zero3.
        processes: how many.
        method: of its quantisation, as `model.quantization` calls it.

    Raises:
        ConfigError: the strategy does not split this format.
    """
    if strategy == "ddp" or processes == 1:
        return
    if strategy == "zero3":
        raise ConfigError("--launch zero3: a quantised base model cannot be split; use --launch fsdp2 or ddp")
    if method not in BITSANDBYTES:
        raise ConfigError(
            f"--launch {strategy}: a base model in {shown(method)} cannot be split; use --launch ddp, or "
            f"model.quantization: {' or '.join(BITSANDBYTES)}"
        )


def is_split(strategy: str) -> bool:
    """Whether each process of the run has a share of the model, which the first one loads."""
    return strategy == "fsdp2" and count() > 1


def has_whole(strategy: str) -> bool:
    """Whether this process loads the model."""
    return not is_split(strategy) or is_first()


def shares_base(config: RunConfig, strategy: str, processes: int, *, gpu: bool, quantised: bool) -> bool:
    """Whether the processes of a machine have one base model in memory, which the first of them loads.

    Args:
        config: of the run.
        strategy: ddp, fsdp2 or zero3.
        processes: how many.
        gpu: whether GPUs train; each has memory of its own.
        quantised: whether the base model is quantised, or stored so.
    """
    plain = not quantised and not config.model.trust_remote_code and config.train.task_type == CAUSAL
    return strategy == "ddp" and processes > 1 and plain and not gpu
