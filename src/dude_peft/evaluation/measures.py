"""From the harness's samples to numbers with intervals, and to one JSON line a question."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dude_peft.artifact.json_text import json_text, with_nulls
from dude_peft.evaluation.local_tasks import mmlu_category
from dude_peft.evaluation.record import Measure, Value
from dude_peft.evaluation.tasks import Chosen
from dude_peft.measure.intervals import (
    SHARE,
    bootstrap_mean,
    bootstrap_mean_of_means,
    compare,
    mean_of_means,
    wilson_interval,
)

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
        whole += _measures(one.name, one.tasks, sizes, model, base, seed, one.by_task)
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
    by_task: frozenset[str] = frozenset(),
) -> Iterator[Measure]:
    scored = [task for task in tasks if task in model["samples"]]  # a small --limit leaves subjects out
    ways = {
        task: dict.fromkeys((m, s["filter"]) for s in model["samples"][task] for m in s["metrics"]) for task in scored
    }
    for metric, kept in dict.fromkeys(way for task in scored for way in ways[task]):
        having = [task for task in scored if (metric, kept) in ways[task]]
        of = sum(sizes[task] for task in tasks if task in having or task not in scored)
        first = tasks[having[0]]
        better = bool(first.higher_is_better().get(metric, True))
        tuned = _values(model, having, metric, kept)
        if tuned is None or not _is_mean(first, metric):
            if len(having) == 1:
                key = f"{metric},{kept}"
                numbers = [
                    None if s is None else Value(float(s["results"][having[0]][key]), None) for s in (model, base)
                ]
                assert numbers[0] is not None
                items = len({s["doc_id"] for s in model["samples"][having[0]]})
                yield Measure(name, metric, kept, items, of, numbers[0], numbers[1], None, better)
            continue
        before = None if base is None else _values(base, having, metric, kept)
        groups = [len(_values(model, [task], metric, kept) or ()) for task in having] if metric in by_task else None
        yield Measure(
            name,
            metric,
            kept,
            len(tuned),
            of,
            _value(tuned, seed, groups),
            None if before is None else _value(before, seed, groups),
            None if before is None else compare(tuned, before, higher_is_better=better, seed=seed, sizes=groups),
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


def _value(values: Sequence[float], seed: int, groups: Sequence[int] | None) -> Value:
    """`groups`: items of each task, where the mean is over tasks."""
    shares = all(value in (0, 1) for value in values)
    if groups is not None:
        interval = bootstrap_mean_of_means(values, groups, more=SHARE if shares else {}, seed=seed)
        if interval is not None and shares:
            interval = (max(0.0, interval[0]), min(1.0, interval[1]))
        return Value(mean_of_means(values, groups), interval)
    mean = sum(values) / len(values)
    return Value(
        mean, wilson_interval(round(sum(values)), len(values)) if shares else bootstrap_mean(values, seed=seed)
    )


def _is_mean(task: Any, metric: str) -> bool:
    from lm_eval.api.metrics import mean

    return task.aggregation().get(metric) is mean


def sample_lines(one: Chosen, model: Scored, base: Scored | None, scrub: Callable[[Any], Any] = str) -> Iterator[str]:
    """One JSON line a question and filter: the harness's hashes, what was wanted, what each model made of it.

    A log-likelihood of -inf (a token that the model rules out) is null.
    """
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
            yield json_text(with_nulls(line)[0], ensure_ascii=False, default=scrub) + "\n"


def _answer(sample: Mapping[str, Any]) -> dict[str, Any]:
    scores = {metric: sample[metric] for metric in sample["metrics"] if metric in sample}
    return {"responses": sample["resps"], "filtered": sample["filtered_resps"], **scores}
