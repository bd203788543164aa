"""An evaluation at a terminal or in a log."""

from __future__ import annotations

from dude_peft.evaluation.forgetting import TextScore
from dude_peft.evaluation.local_tasks import GSM8K
from dude_peft.evaluation.record import Evaluation, Measure, Value
from dude_peft.measure.intervals import Comparison
from dude_peft.terminal.display import Display
from dude_peft.terminal.facts import show_facts


def show(display: Display, evaluation: Evaluation) -> None:
    """Prints scores, differences and what one should know of them; subjects are in results.json alone."""
    show_facts(display, f"{evaluation.model}: 95 % intervals", facts_of(evaluation))
    for whose, counts in evaluation.counts.items():
        for what, by_task in (
            ("prompts longer than the model reads, cut at their beginning", counts.cut_prompts),
            ("generations that never stopped", counts.unstopped),
            ("empty generations", counts.empty),
        ):
            for task, count in by_task.items():
                display.warn(f"{task}, {whose}: {count} {what}")
    if evaluation.second_opinion is None and any(measure.task in GSM8K for measure in evaluation.measures):
        display.say("no second opinion on GSM8K's answers: pip install 'dude-peft[math]'")
    for task, found in (evaluation.second_opinion or {}).items():
        display.say(
            f"{task}: math-verify judges {len({one.doc_id for one in found})} answers otherwise; see results.json"
        )


def facts_of(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Scores and differences, each a name and a line; subjects are in results.json alone."""
    rows = [*evaluation.measures, *(part for part in evaluation.parts if "/" in part.task)]
    facts = [(_name(measure), _line(measure)) for measure in rows]
    if evaluation.text is not None:
        facts += _text(evaluation.text)
    elif evaluation.adapted:
        facts.append(("forgetting on general text", "not measured; give a text with --text"))
    return facts


def _name(measure: Measure) -> str:
    kept = "" if measure.filter == "none" else f" ({measure.filter})"
    return f"{measure.task} {measure.metric}{kept}"


def _line(measure: Measure) -> str:
    items = f"{measure.items:,} items"
    if measure.items < measure.of:
        items = f"a sample of {measure.items:,} of {measure.of:,} items"
    if measure.base is None:
        return f"{_number(measure.model)}; {items}"
    compared = f"; {_difference(measure.comparison)}" if measure.comparison is not None else ""
    return f"{_number(measure.model)}, base {_number(measure.base)}{compared}; {items}"


def _number(value: Value) -> str:
    if value.interval is None:
        return f"{value.value:.4f}"
    low, high = value.interval
    if low >= 0 and high <= 1 and value.value <= 1:
        return f"{value.value:.1%} ({low:.1%} to {high:.1%})"
    return f"{value.value:.4f} ({low:.4f} to {high:.4f})"


def _difference(comparison: Comparison, scale: float = 100) -> str:
    unit = " points" if scale == 100 else " nats"
    digits = 1 if scale == 100 else 4
    known = []
    if comparison.interval is not None:
        low, high = comparison.interval
        known.append(f"{scale * low:+.{digits}f} to {scale * high:+.{digits}f}")
    if comparison.p_value is not None:
        known.append(f"McNemar p = {comparison.p_value:.2g}")
    return (
        f"difference {scale * comparison.difference:+.{digits}f}{unit} ({', '.join(known) or 'one item'}): "
        f"{comparison.verdict}; {comparison.wins} won, {comparison.losses} lost, {comparison.ties} tied"
    )


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"


def _text(text: TextScore) -> list[tuple[str, str]]:
    loss = f"{text.loss:.4f} nats a token{_between(text.interval)}, perplexity {text.perplexity:.2f}"
    tokens = f"{text.tokens:,} tokens of {text.file}"
    if text.base_loss is None or text.comparison is None or text.kl_tuned_base is None:
        return [("general text, loss", f"{loss}; {tokens}")]
    base = f"base {text.base_loss:.4f}, perplexity {text.base_perplexity:.2f}"
    moved = f"{text.kl_tuned_base:.4f} nats a token{_between(text.kl_tuned_base_interval)}"
    lost = f"{text.kl_base_tuned:.4f} nats a token{_between(text.kl_base_tuned_interval)}"
    return [
        ("forgetting, loss on general text", f"{loss}; {base}; {_difference(text.comparison, 1)}; {tokens}"),
        ("forgetting, KL(tuned || base) there", moved),
        ("forgetting, KL(base || tuned) there", lost),
    ]
