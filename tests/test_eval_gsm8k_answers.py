"""How GSM8K's answers are read: the harness's two filters, and math-verify, on strings checked by hand.

gsm8k_answers.jsonl: [kind, text, what a reader takes for the answer, strict-match's extract, flexible-extract's], null
where there is none. The filters are the harness's own; the table says what they do, good or bad.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the filters are lm_eval's, which is not installed here")

from eval_data import write_data
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters import build_filter_ensemble

from dude_peft.evaluation import second_opinion
from dude_peft.evaluation.tasks import load_tasks

ROWS = [json.loads(line) for line in Path(__file__).with_name("gsm8k_answers.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    (chosen,) = load_tasks(["gsm8k"], write_data(folder / "data"), folder / "tasks")
    return chosen.tasks["gsm8k"]


def extracted(task, name, text):
    (settings,) = [one for one in task.get_config("filter_list") if one["name"] == name]
    steps = [[step["function"], {k: v for k, v in step.items() if k != "function"}] for step in settings["filter"]]
    from lm_eval.api.instance import Instance

    instance = Instance("generate_until", {}, ("", {}), 0, resps=[text])
    build_filter_ensemble(name, steps).apply([instance])
    found = instance.filtered_resps[name]
    return None if found == "[invalid]" else found


def is_right(task, found, expected):
    settings = {k: v for k, v in task.get_config("metric_list")[0].items() if k not in ("metric", "aggregation")}
    del settings["higher_is_better"]
    score = exact_match_hf_evaluate(predictions=[found or "[invalid]"], references=[f"#### {expected}"], **settings)
    return bool(score["exact_match"])


def test_the_table_is_large_and_of_every_kind():
    assert len(ROWS) >= 200
    assert len({text for _, text, *_ in ROWS}) == len(ROWS)
    kinds = Counter(kind for kind, *_ in ROWS)
    assert (
        min(kinds[kind] for kind in ("commas", "units", "negative", "fractions", "several numbers", "no answer")) >= 15
    )


@pytest.mark.parametrize(("name", "column"), [("strict-match", 3), ("flexible-extract", 4)])
def test_the_harness_filters_read_what_the_table_says(task, name, column):
    other = {row[1]: found for row in ROWS if (found := extracted(task, name, row[1])) != row[column]}
    assert not other


def test_how_often_the_filters_are_wrong(task):
    """These strings are hard on purpose: the counts say what the filters cannot do, not how often models write so."""
    plain = [row for row in ROWS if row[2] is not None and row[2].removeprefix("-").replace(".", "", 1).isdigit()]
    marked = [row for row in plain if "#### " in row[1]]
    assert len(plain) == 227
    assert sum(not is_right(task, strict, meant) for _, _, meant, strict, _ in marked) == 38
    assert sum(not is_right(task, flexible, meant) for _, _, meant, _, flexible in plain) == 64
    without = [row for row in ROWS if row[2] is None]
    assert (len(without), sum(flexible is not None for *_, flexible in without)) == (31, 7)


def test_disagreements_are_those_of_the_verdicts(monkeypatch):
    monkeypatch.setattr(second_opinion, "is_right", lambda text, expected: text.endswith(expected))
    samples = [
        {"doc_id": n, "filter": kept, "resps": [[text]], "target": "work\n#### 18", "exact_match": right}
        | {"filtered_resps": [text[-2:]]}
        for n, (text, rights) in enumerate([("it is 18", (0.0, 1.0)), ("it is 19", (0.0, 0.0)), ("none", (1.0, 0.0))])
        for kept, right in zip(("strict-match", "flexible-extract"), rights, strict=True)
    ]
    found = second_opinion.disagreements(samples)
    assert [(one.doc_id, one.filter, one.harness, one.math_verify) for one in found] == [
        (0, "strict-match", False, True), (2, "strict-match", True, False),
    ]  # fmt: skip
    assert found[0].expected == "18"


def test_math_verify_reads_fractions_units_and_words_around():
    pytest.importorskip("math_verify", reason="math-verify is not installed here")
    for text, expected in [
        ("#### 12/4", "3"), ("so it is 1/2", "0.5"), ("#### $1,250.00", "1250"), ("#### 18 eggs", "18"),
        ("\\boxed{18}", "18"), ("#### -5", "-5"),
    ]:  # fmt: skip
        assert second_opinion.is_right(text, expected), text
    for text in ("", "none", "#### 20", "18 or 20"):
        assert not second_opinion.is_right(text, "18"), text
