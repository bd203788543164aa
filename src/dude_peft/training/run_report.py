"""The report of a run, from everything that it found."""

from __future__ import annotations

from typing import Any

from dude_peft.artifact.manifest import seal_of
from dude_peft.config.schema import AdapterSection
from dude_peft.folder.record import ADAPTER, RunReport, Score
from dude_peft.machine.environment import hardware, versions
from dude_peft.model.load import gguf_note
from dude_peft.training.context import RunContext
from dude_peft.training.fit import Fit
from dude_peft.training.loading import Base
from dude_peft.training.run_data import RunData
from dude_peft.training.stages import Stages


def report_of(
    context: RunContext,
    base: Base,
    model: Any,
    data: RunData,
    fitted: Fit,
    before: Score | None,
    after: Score | None,
    tasks: dict[str, Any] | None,
    *,
    parameters: tuple[int, int],
    asked: AdapterSection | None,
    stages: Stages | None,
) -> RunReport:
    """What a finished run records.

    Args:
        context: of the run.
        base: what is known of the base model.
        model: adapted and trained.
        data: the rows of the run.
        fitted: the optimisation.
        before: score of the held-out rows before training, where there are any.
        after: the same after it.
        tasks: scores of evaluation.tasks.
        parameters: of the model, how many train, and how many there are.
        asked: the adapter section with a budget, where the run has one.
        stages: of the training rows, where there are any.
    """
    config, folder = context.config, context.folder
    trainable, total = parameters
    return RunReport(
        method=config.adapter.method,
        seed=config.train.seed,
        config=config.model_dump(mode="json"),
        versions=versions(),
        hardware=hardware(model.device),
        model={
            "name_or_path": config.model.name_or_path,
            "class": type(model.get_base_model()).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "note": gguf_note(config.model) or "",
            **({} if base.head is None else {"head": base.head}),
        },
        data=data.record,
        trainable_parameters=trainable,
        total_parameters=total,
        steps=fitted.steps,
        tokens=fitted.tokens,
        tokens_per_second=round(fitted.tokens_per_second, 1),
        before=before,
        after=after,
        seconds=context.seconds,
        warnings=context.warnings,
        best_step=fitted.best_step,
        tasks=tasks,
        files=folder.listed(),
        adapter_seal=seal_of(folder.path / ADAPTER) if folder.writes else None,
        budget=None if asked is None or asked.budget is None else asked.budget.model_dump(mode="json"),
        curriculum=None if stages is None else stages.record(),
    )
