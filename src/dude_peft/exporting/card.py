"""The model card of an adapter or an export: what it is, how it was made, how well it does, where it runs.

Every text that comes from elsewhere (names, settings, warnings) is escaped for markdown and HTML; the front matter is
written by a YAML writer. Nothing in a data set or a model's name can add a heading, a link, a tag or a key.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dude_peft.artifact.sealed import read_json, read_sealed
from dude_peft.errors import ArtifactError
from dude_peft.exporting.adapter import SavedAdapter
from dude_peft.exporting.serving import PROGRAMS, serving_matrix
from dude_peft.folder.record import REPORT
from dude_peft.show import shown
from dude_peft.version import __version__

CARD = "README.md"
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>$:@/])")
_LONGEST = 300

_TEMPLATE = """\
# {{ title }}

{{ method }} adapter of {{ base }}{{ revision }}, r = {{ r }}, lora\\_alpha = {{ alpha }}, {{ layers }} layers. \
Made by dude\\-peft {{ version }}.
{% if mismatch %}

**Warning: this was made for another base model than the adapter was trained on.**
{% endif %}
{% if export %}

## What was exported

{% for name, value in export %}- {{ name }}: {{ value }}
{% endfor %}
{% endif %}
{% if scores %}

## Evaluation

| | before | after |
|---|---|---|
{% for name, before, after in scores %}| {{ name }} | {{ before }} | {{ after }} |
{% endfor %}
{% endif %}
{% if picture %}

![Loss during training](loss.png)
{% endif %}
{% if data %}

## Data

| set | examples | sha256 |
|---|---|---|
{% for name, rows, digest in data %}| {{ name }} | {{ rows }} | {{ digest }} |
{% endfor %}
{% endif %}
{% if settings %}

## Settings

| key | value |
|---|---|
{% for key, value in settings %}| {{ key }} | {{ value }} |
{% endfor %}
{% endif %}

## Where it runs

| file | {{ programs | join(" | ") }} |
|---|{% for _ in programs %}---|{% endfor %}

{% for row in serving %}| {{ row.file }} | {{ row.answers | join(" | ") }} |
{% endfor %}
"""


def escaped(value: object) -> str:
    """A text on one line, nothing in it meaning anything to markdown or HTML."""
    return _SPECIAL.sub(r"\\\1", html.escape(shown(" ".join(str(value).split()), _LONGEST), quote=True))


def model_card(
    adapter: SavedAdapter,
    report: Mapping[str, Any] | None = None,
    export: Mapping[str, Any] | None = None,
    picture: bool = False,
) -> str:
    """Markdown of a model card, front matter included.

    Args:
        adapter: what the card is about.
        report: report.json of the run that trained it, where there is one.
        export: what was exported and what its verification found (dude_export.json).
        picture: loss.png lies beside the card.
    """
    config = adapter.config
    base = config.base_model_name_or_path or "unknown"
    front = {
        "base_model": shown(base, _LONGEST),
        "library_name": "transformers" if export and export.get("to") in ("merged", "gguf") else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["dude", "lora", "dude-peft"],
    }
    ranks = {(2 if config.spec.principal else 1) * config.rank_and_alpha(layer)[0] for layer in adapter.base}
    report = report if report is not None else {}
    # No autoescape: what reaches the page is escaped for markdown as well, or is ours.
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE)
    body = template.render(
        title=escaped(f"{config.method} on {base}"),
        method=escaped(config.method),
        base=escaped(base),
        revision=escaped(f", revision {config.revision}") if config.revision else "",
        r=config.r,
        alpha=escaped(f"{config.lora_alpha:g}"),
        layers=len(adapter.base),
        version=escaped(__version__),
        mismatch=bool(export and export.get("base_mismatch_allowed")),
        export=_export_rows(export),
        scores=_scores(report),
        picture=picture,
        data=[
            (escaped(name), escaped(part.get("examples", part.get("rows", ""))), escaped(part.get("sha256", "")))
            for name, part in _mapping(report.get("data")).items()
            if isinstance(part, Mapping)
        ],
        settings=[(escaped(key), escaped(value)) for key, value in _flat(_mapping(report.get("config")))],
        programs=PROGRAMS,
        serving=serving_matrix(config.spec, ranks or {config.r}),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=False)}---\n\n{body}"


def report_of(adapter: Path) -> dict[str, Any] | None:
    """report.json of the run whose folder the adapter lies in; None where there is none.

    Raises:
        ArtifactError: it is not as it was written, or its scores cannot be read.
    """
    path, remedy = adapter.parent / REPORT, "restore it, or move it away"
    if not path.exists():
        return None
    sealed = "sha256" in read_json(path, remedy)  # early versions did not seal theirs
    report = read_sealed(path, remedy) if sealed else read_json(path, remedy)
    try:
        _scores(report)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {shown(error)}"
        raise ArtifactError(f"{shown(path, 300)}: its scores cannot be read ({reason}); {remedy}") from error
    return report


def _export_rows(export: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if export is None:
        return []
    rows = [("kind", escaped(export.get("to", "")))]
    if "rank" in export:
        rows.append(("rank", escaped(export["rank"])))
    difference = export.get("difference")
    if isinstance(difference, Mapping):
        rows.append(("mean KL from the live adapter", f"{difference['kl']:.1e} nats a token"))
        rows.append(("the same of the base model", f"{difference['kl_base']:.1e} nats a token"))
        rows.append(("largest logit difference, relative", f"{difference['logits']:.1e}"))
    else:
        rows.append(("verified", "no"))
    return rows


def _scores(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    pair = [_mapping(report.get(when)) for when in ("before", "after")]
    if not all(pair):
        return []
    losses = [f"{float(score['loss']):.3f}" for score in pair]
    right = [
        f"{score['right']} of {score['rows']} ({100 * score['interval'][0]:.1f} to {100 * score['interval'][1]:.1f} %)"
        for score in pair
    ]
    return [
        ("held-out loss, nats a token", escaped(losses[0]), escaped(losses[1])),
        ("exact match, 95 % interval", escaped(right[0]), escaped(right[1])),
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", value))
    return rows


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
