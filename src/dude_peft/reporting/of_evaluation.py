"""The page of an evaluation: scores with intervals, what changed question by question, second opinions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dude_peft.doors import open_file, parse_json, read_json
from dude_peft.errors import ArtifactError
from dude_peft.evaluation.forgetting import TextScore
from dude_peft.evaluation.record import RESULTS, SAMPLES, Evaluation, Measure, facts_of
from dude_peft.measure.intervals import Comparison
from dude_peft.reporting.curves import bars_figure
from dude_peft.reporting.document import (
    Block,
    Cell,
    Commands,
    Document,
    Number,
    Sample,
    Samples,
    Section,
    Table,
    facts,
    number,
    table,
)
from dude_peft.show import shown
from dude_peft.terminal.next_steps import beside, word

_MOST_SAMPLES = 6
"""Of each kind and task."""
_LONGEST_LINE = 16 << 20
_NO_NUMBER = {"value", "difference", "loss", "perplexity"}
"""Keys that are null where a metric has no number."""


def document_of_evaluation(folder: Path) -> Document:
    """Everything that an evaluation's folder tells.

    Raises:
        ArtifactError: a file in it is damaged.
    """
    found = _read(folder / RESULTS)
    sections = [
        Section("Scores", tuple(_scores("Tasks", found.measures))),
        Section("Parts of tasks", tuple(_scores("Groups and subjects", found.parts))),
        Section("What was forgotten", tuple(_text(found.text))),
        Section("What changed, question by question", tuple(_changes(folder / SAMPLES))),
        Section("Counts to know", tuple(_counts(found))),
        Section("Second opinions", tuple(_opinions(found))),
        Section("Provenance", (facts("How it was made", found.provenance),)),
        Section("What comes next", (_next(found),)),
    ]
    return Document(
        f"An evaluation: {found.model}", tuple(_answer(found)), tuple(section for section in sections if section.blocks)
    )


def _read(path: Path) -> Evaluation:
    try:
        return TypeAdapter(Evaluation).validate_python(_with_numbers(read_json(path)))
    except (OSError, ValueError) as error:  # pydantic's is a ValueError
        reason = "it is not as dude eval writes it" if isinstance(error, ValidationError) else error
        raise ArtifactError(
            f"{shown(path, 300)} is damaged ({shown(reason)}); run dude eval again with --overwrite"
        ) from error


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: float("nan") if inner is None and key in _NO_NUMBER else _with_numbers(inner)
            for key, inner in value.items()
        }
    return [_with_numbers(inner) for inner in value] if isinstance(value, list) else value


def _answer(found: Evaluation) -> Iterator[str]:
    if not found.measures and found.text is None:
        yield "Nothing was measured."
    for name, told in facts_of(found):
        yield f"{name}: {told}."
    if any(measure.comparison is not None for measure in found.measures):
        yield "It compares one adapter with its base model on the same questions: it tells nothing of other seeds."
    if any(measure.items < measure.of for measure in found.measures):
        yield "Samples of tasks were asked; all questions would give narrower intervals."


def _scores(title: str, measures: Sequence[Measure]) -> Iterator[Block]:
    if not measures:
        return
    if len(measures) <= 40:
        bars = [
            (_name(one) + who, value.value, value.interval)
            for one in measures
            for who, value in ((": model", one.model), (": base", one.base))
            if value is not None and value.value == value.value
        ]
        if bars:
            best = max(measures, key=lambda one: one.items)
            alt = f"Values with 95 % intervals of {len(measures)} measures; {_name(best)} has the most questions."
            yield bars_figure(f"{title}, with 95 % intervals", alt, bars, x="value")
    rows: list[tuple[Cell, ...]] = []
    for one in measures:
        rows.append(
            (
                _name(one),
                number(one.items),
                number(one.of),
                *_value(one.model),
                *_value(one.base),
                *_compared(one.comparison),
            )
        )
    header = ("task", "items", "of", "model", "95 % from", "to", "base", "95 % from", "to", *_COMPARED)
    yield table(title, header, rows)


_COMPARED = ("difference", "95 % from", "to", "p", "won", "lost", "tied", "verdict")


def _name(one: Measure) -> str:
    return f"{one.task} {one.metric}" + ("" if one.filter == "none" else f" ({one.filter})")


def _value(value: Any) -> tuple[Cell, ...]:
    if value is None:
        return (Number(None, "-"),) * 3
    low, high = value.interval or (None, None)
    return number(value.value), number(low), number(high)


def _compared(found: Comparison | None) -> tuple[Cell, ...]:
    if found is None:
        return (*(Number(None, "-"),) * 7, "-")
    low, high = found.interval or (None, None)
    counts = (number(found.wins), number(found.losses), number(found.ties))
    return (
        number(found.difference, "+.4g"),
        number(low, "+.4g"),
        number(high, "+.4g"),
        number(found.p_value),
        *counts,
        found.verdict,
    )


def _text(text: TextScore | None) -> Iterator[Block]:
    if text is None:
        return
    rows: list[tuple[Cell, ...]] = [
        ("loss, nats a token", number(text.loss, ".4f"), *_ends(text.interval)),
        ("perplexity", number(text.perplexity, ".4f"), *_ends(None)),
        ("base model's loss", number(text.base_loss, ".4f"), *_ends(None)),
        ("KL(tuned || base)", number(text.kl_tuned_base), *_ends(text.kl_tuned_base_interval)),
        ("KL(base || tuned)", number(text.kl_base_tuned), *_ends(text.kl_base_tuned_interval)),
    ]
    if text.comparison is not None:
        rows.append(("difference of losses", number(text.comparison.difference), *_ends(text.comparison.interval)))
    yield table(f"{text.tokens:,} tokens of {text.file}", ("what", "value", "95 % from", "to"), rows)


def _ends(ends: tuple[float, float] | None) -> tuple[Cell, ...]:
    return (number(None), number(None)) if ends is None else (number(ends[0]), number(ends[1]))


def _changes(folder: Path) -> Iterator[Block]:
    """Questions that one of the two models alone answers right, as the files have them."""
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
        won: list[Sample] = []
        lost: list[Sample] = []
        counts: dict[tuple[str, str], list[int]] = {}
        for line in _lines(path):
            model, base = line["model"], line.get("base")
            metric = next((key for key in model if key not in ("responses", "filtered")), None)
            if not isinstance(base, dict) or metric is None:
                continue
            pair = (model.get(metric), base.get(metric))
            if not all(isinstance(one, (int, float)) for one in pair):
                continue
            way = (pair[0] > pair[1]) - (pair[0] < pair[1])
            counts.setdefault((f"{line.get('task', '')} {metric}", str(line.get("filter", ""))), [0, 0, 0])[way] += 1
            kept = won if way > 0 else lost
            if way and len(kept) < _MOST_SAMPLES:
                answers = tuple((who, _said(one)) for who, one in (("base model", base), ("tuned model", model)))
                kept.append(Sample(_question(line.get("doc")), str(line.get("target", "")), answers))
        if counts:
            rows = [(*name, number(three[1]), number(three[-1]), number(three[0])) for name, three in counts.items()]
            header = ("task and metric", "filter", "model higher", "base higher", "equal")
            yield table(f"{path.stem}: questions that changed", header, rows)
        for title, samples in (("where the tuned model is better", won), ("where the base model is better", lost)):
            if samples:
                yield Samples(f"{path.stem}, {title}: the first {len(samples)}", tuple(samples))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open_file(path) as file:
            while raw := file.readline(_LONGEST_LINE):
                line = parse_json(raw)
                if not isinstance(line, dict) or not isinstance(line.get("model"), dict):
                    raise ValueError("a line is no sample")
                yield line
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{shown(path, 300)} is damaged ({shown(error)}); run dude eval again with --overwrite"
        ) from error


def _question(document: Any) -> str:
    if isinstance(document, dict):
        for key in ("question", "instruction", "query", "prompt"):
            if isinstance(document.get(key), str):
                return str(document[key])
    return str(document)


def _said(answer: dict[str, Any]) -> str:
    """What was generated, or for choices the log-likelihoods."""
    value = answer.get("responses")
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else str(value)


def _counts(found: Evaluation) -> Iterator[Block]:
    rows: list[tuple[Cell, ...]] = [
        (f"{who}: {what}", task, number(count))
        for who, counts in found.counts.items()
        for what, by_task in (
            ("prompts that were cut", counts.cut_prompts),
            ("generations that never stopped", counts.unstopped),
            ("empty generations", counts.empty),
        )
        for task, count in by_task.items()
    ]
    if rows:
        yield table("Answers that are wrong for other reasons", ("what", "task", "questions"), rows)


def _opinions(found: Evaluation) -> Iterator[Table]:
    for task, opinions in (found.second_opinion or {}).items():
        rows: list[tuple[Cell, ...]] = [
            (
                f"{one.doc_id} ({one.filter})", "right" if one.harness else "wrong",
                "right" if one.math_verify else "wrong", one.extracted, one.expected, one.end,
            )
            for one in opinions
        ]  # fmt: skip
        header = ("question", "harness", "math-verify", "extracted", "expected", "end of the answer")
        yield table(f"{task}: answers that math-verify judges differently", header, rows)


def _next(found: Evaluation) -> Commands:
    commands = [["chat", found.model]]
    if found.adapted:
        commands.append(["export", found.model, "--to", "merged", "-o", beside(found.model, "-merged")])
    return Commands(tuple(f"dude {' '.join(map(word, words))}" for words in commands))
