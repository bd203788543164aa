"""An evaluation at a terminal or in a log."""

from __future__ import annotations

from dude_peft.evaluation.record import Evaluation, facts_of
from dude_peft.evaluation.task_names import GSM8K
from dude_peft.installing import install
from dude_peft.terminal.display import Display
from dude_peft.terminal.facts import show_facts


def show(display: Display, evaluation: Evaluation) -> None:
    """Prints scores, differences and what one should know of them; subjects are in results.json alone."""
    show_facts(display, f"{evaluation.model}: 95 % intervals", facts_of(evaluation))
    for whose, counts in evaluation.counts.items():
        for one, many, by_task in (
            ("prompt longer", "prompts longer", counts.cut_prompts),
            ("generation that never stopped", "generations that never stopped", counts.unstopped),
            ("empty generation", "empty generations", counts.empty),
        ):
            cut = " than the model reads, cut at the beginning" if by_task is counts.cut_prompts else ""
            for task, count in by_task.items():
                display.warn(f"{task}, {whose}: {count} {one if count == 1 else many}{cut}")
    if evaluation.second_opinion is None and any(measure.task in GSM8K for measure in evaluation.measures):
        display.say(f"no second opinion on GSM8K's answers: {install('math-verify')}")
    for task, found in (evaluation.second_opinion or {}).items():
        display.say(
            f"{task}: math-verify judges {len({one.doc_id for one in found})} answers differently; see results.json"
        )
