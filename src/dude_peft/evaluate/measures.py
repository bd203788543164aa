"""From the harness's samples to numbers with intervals, and to one JSON line a question."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dude_peft.evaluate.intervals import bootstrap_mean, compare
from dude_peft.evaluate.local_tasks import mmlu_category
from dude_peft.evaluate.record import Measure, Value
from dude_peft.evaluate.tasks import Chosen
from dude_peft.train.score import wilson_interval

Scored = Mapping[str, Any]
"""What `lm_eval.evaluate` returns: `samples` and `results`, by task."""


def measures_of(
    chosen: Sequence[Chosen], sizes: Mapping[str, int], model: Scored, base: Scored | None, seed: int
) -> tuple[list[Measure], list[Measure]]:
    """(one measure a name, metric and filter; the same for the parts of groups).

    Args:
        chosen: the names that were asked for.
        sizes: items that each task has.
        model: how the model was scored.
        base: how its base was, on the same items.
        seed: of bootstraps.
    """
    whole: list[Measure] = []
    parts: list[Measure] = []
    for one in chosen:
        whole += _measures(one.name, one.tasks, sizes, model, base, seed)
        if len(one.tasks) > 1:
            for name, tasks in _parts(one).items():
                parts += _measures(name, tasks, sizes, model, base, seed)
    return whole, parts


def _parts(one: Chosen) -> dict[str, dict[str, Any]]:
    by_category: dict[str, dict[str, Any]] = {}
    for name, task in one.tasks.items():
        if category := mmlu_category(name):
            by_category.setdefault(f"{one.name}/{category}", {})[name] = task
    return {**by_category, **{name: {name: task} for name, task in one.tasks.items()}}


def _measures(
    name: str,
    tasks: Mapping[str, Any],
    sizes: Mapping[str, int],
    model: Scored,
    base: Scored | None,
    seed: int,
) -> Iterator[Measure]:
    scored = [task for task in tasks if task in model["samples"]]  # a small --limit leaves subjects out
    if not scored:
        return
    of = sum(sizes[task] for task in tasks)
    first = model["samples"][scored[0]]
    for metric, kept in dict.fromkeys((metric, s["filter"]) for s in first for metric in s["metrics"]):
        tuned = _values(model, scored, metric, kept)
        task = tasks[scored[0]]
        better = bool(task.higher_is_better().get(metric, True))
        if tuned is None or not _is_mean(task, metric):
            if len(scored) == 1:
                key = f"{metric},{kept}"
                numbers = [
                    None if s is None else Value(float(s["results"][scored[0]][key]), None) for s in (model, base)
                ]
                assert numbers[0] is not None
                items = len({s["doc_id"] for s in first})
                yield Measure(name, metric, kept, items, of, numbers[0], numbers[1], None, better)
            continue
        before = None if base is None else _values(base, scored, metric, kept)
        yield Measure(
            name,
            metric,
            kept,
            len(tuned),
            of,
            _value(tuned, seed),
            None if before is None else _value(before, seed),
            None if before is None else compare(tuned, before, higher_is_better=better, seed=seed),
            better,
        )


def _values(scored: Scored, tasks: Sequence[str], metric: str, kept: str) -> list[float] | None:
    """Of each item, in order; None where they are no numbers."""
    found = []
    for task in tasks:
        for sample in sorted(scored["samples"][task], key=lambda s: int(s["doc_id"])):
            if sample["filter"] == kept and metric in sample:
                try:
                    found.append(float(sample[metric]))
                except (TypeError, ValueError):
                    return None
    return found if found and all(map(math.isfinite, found)) else None


def _value(values: Sequence[float], seed: int) -> Value:
    mean = sum(values) / len(values)
    if all(value in (0, 1) for value in values):
        return Value(mean, wilson_interval(round(sum(values)), len(values)))
    return Value(mean, bootstrap_mean(values, seed=seed))


def _is_mean(task: Any, metric: str) -> bool:
    from lm_eval.api.metrics import mean

    return task.aggregation().get(metric) is mean


def sample_lines(one: Chosen, model: Scored, base: Scored | None, scrub: Callable[[Any], Any] = str) -> Iterator[str]:
    """One JSON line a question and filter: the harness's hashes, what was wanted, what each model made of it."""
    for task in one.tasks:
        before = {(s["doc_id"], s["filter"]): s for s in base["samples"].get(task, [])} if base is not None else {}
        for sample in model["samples"].get(task, []):
            line = {
                "task": task,
                **{key: sample[key] for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash", "filter", "doc")},
                "target": sample["target"],
                "model": _answer(sample),
            }
            if before:
                line["base"] = _answer(before[sample["doc_id"], sample["filter"]])
            yield json.dumps(line, ensure_ascii=False, default=scrub) + "\n"


def _answer(sample: Mapping[str, Any]) -> dict[str, Any]:
    scores = {metric: sample[metric] for metric in sample["metrics"] if metric in sample}
    return {"responses": sample["resps"], "filtered": sample["filtered_resps"], **scores}
