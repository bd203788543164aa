"""The model card of an adapter or an export: what it is, how it was made, how well it does, where it runs.

Every text that comes from elsewhere (names, settings, warnings) is escaped for markdown and HTML; the front matter is
huggingface_hub's to write. Nothing in a data set or a model's name can add a heading, a link, a tag or a key.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from dude_peft.artifact.manifest import seal_of
from dude_peft.artifact.sealed import read_object, unsealed_of
from dude_peft.errors import ArtifactError
from dude_peft.exporting.adapter import SavedAdapter
from dude_peft.exporting.card_settings import settings_of
from dude_peft.exporting.card_usage import usage
from dude_peft.exporting.serving import PROGRAMS, serving_matrix
from dude_peft.folder.identity import NAME as RUN
from dude_peft.folder.record import ADAPTER, REPORT
from dude_peft.show import shown
from dude_peft.task_types import SCORES
from dude_peft.tuner.config import DudeConfig
from dude_peft.version import __version__

CARD = "README.md"
_MARKUP = re.compile(
    r"[\\`*|~$\[]"  # everywhere
    r"|(?<![^\W_])_|_(?![^\W_])"  # but not inside a word
    r"|\](?=[(\[:])"  # what would make a link of brackets
    r"|@(?=\w)|#(?=\d|\s*$)|:(?=//)|:(?=[\w+-]+:)|(?<=\bwww)\."  # GitHub's links, mentions, numbers, emoji
)
_LONGEST = 300

_TEMPLATE = """\
# {{ title }}

{{ method }} adapter of {{ base }}{{ revision }}, {{ rank }}, {{ layers }} layers. \
Made by dude-peft {{ version }}.
{% if mismatch %}

**Warning: this export uses a different base model from the one the adapter was trained on.**
{% endif %}
{% if python %}

## How to load it

```python
{{ python }}
```
{% if commands %}

```bash
{{ commands | join("\n") }}
```
{% endif %}
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

{% if serving %}

## Where it runs

| file | {{ programs | join(" | ") }} |
|---|{% for _ in programs %}---|{% endfor %}

{% for row in serving %}| {{ row.file }} | {{ row.answers | join(" | ") }} |
{% endfor %}
{% endif %}
"""


def escaped(value: object) -> str:
    """A text on one line, nothing in it meaning anything to markdown or HTML; what means nothing stays as it is."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    plain = shown(" ".join(text.split()), _LONGEST)
    return html.escape(_MARKUP.sub(lambda match: f"\\{match.group()}", plain), quote=False)


def model_card(
    adapter: SavedAdapter,
    report: Mapping[str, Any] | None = None,
    export: Mapping[str, Any] | None = None,
    picture: bool = False,
    place: str | None = None,
) -> str:
    """Markdown of a model card, front matter included.

    Args:
        adapter: what the card is about.
        report: report.json of the run that trained it, where there is one.
        export: what was exported and what its verification found (dude_export.json).
        picture: loss.png lies beside the card.
        place: folder or hub id where readers find what the card is about; None is the adapter's folder.
    """
    config = adapter.config
    base = config.base_model_name_or_path or "unknown"
    front = ModelCardData(
        base_model=shown(base, _LONGEST),
        library_name="transformers" if export and export.get("to") in ("merged", "gguf") else "peft",
        pipeline_tag="text-generation",
        tags=["dude", *(["lora"] if config.is_stock else []), "dude-peft"],
    )
    ranks = {config.spec.multiple * config.rank_and_alpha(layer)[0] for layer in adapter.base}
    report = report if report is not None else {}
    # No autoescape: what reaches the page is escaped for markdown as well, or is ours.
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE)
    settings = _mapping(report.get("config"))
    model = _mapping(settings.get("model"))
    architecture = str(_mapping(report.get("model")).get("class", ""))
    python, commands = usage(adapter, str(adapter.folder) if place is None else place, model, export, architecture)
    body = template.render(
        python=python,
        commands=commands,
        title=escaped(f"{config.method} on {base}"),
        method=escaped(config.method),
        base=escaped(base),
        revision=escaped(f", revision {config.revision}") if config.revision else "",
        rank=_rank(config, [config.rank_and_alpha(layer)[0] for layer in adapter.base]),
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
        settings=[
            (escaped(key), escaped(value)) for key, value in settings_of(settings, _mapping(report.get("budget")))
        ],
        programs=PROGRAMS,
        serving=[]
        if config.task_type == SCORES  # programs that serve language models
        else serving_matrix(
            config.spec,
            ranks or {config.r},
            stacks=bool(adapter.stacks),
            others=any(map(adapter.is_other, adapter.base)),
        ),
    )
    return f"---\n{front.to_yaml()}\n---\n\n{body}"


def _rank(config: DudeConfig, ranks: list[int]) -> str:
    """As in: r = 5, lora_alpha = 10; r = 2 to 9, where layers differ."""
    size = config.spec.size(*(ranks or [config.r]))
    return f"{size}, lora_alpha = {escaped(f'{config.lora_alpha:g}')}" if config.spec.ranked else size


def report_of(adapter: Path, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """report.json of the run that made the adapter and whose folder it lies in; None where there is none.

    Args:
        adapter: its folder.
        tell: hears of a report of another adapter, and of one without a seal, as early versions wrote it.

    Raises:
        ArtifactError: it is not as it was written, has lost its seal, or its scores cannot be read.
    """
    path, remedy = adapter.parent / REPORT, "restore it, or move it away"
    if not path.exists():
        return None
    report = read_object(path, remedy)
    if "sha256" in report or _seals_its_files(adapter.parent):
        report = unsealed_of(path, report, remedy)
    else:
        tell(f"{shown(path, 300)} has no checksum, so its numbers cannot be checked")
    try:
        _scores(report)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {shown(error)}"
        raise ArtifactError(f"{shown(path, 300)}: its scores cannot be read ({reason}); {remedy}") from error
    known = report.get("adapter_seal")  # of a report without, the name of the folder has to tell
    if seal_of(adapter) != known if known is not None else adapter.name != ADAPTER:
        tell(f"{shown(path, 300)} is about another adapter than {shown(adapter, 300)}, so it is left out of the card")
        return None
    return report


def _seals_its_files(run: Path) -> bool:
    """Whether run.json is of a version that seals what a run writes."""
    path = run / RUN
    return path.exists() and read_object(path, "restore it, or move it away").get("format_version") != 1


def _export_rows(export: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if export is None:
        return []
    rows = [("kind", escaped(export.get("to", "")))]
    if "rank" in export:
        rows.append(("rank", escaped(export["rank"])))
    difference = export.get("difference")
    if isinstance(difference, Mapping):
        rows += _proved(difference)
    else:
        rows.append(("verified", "no"))
    return rows


def _proved(difference: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How near the export is to the live adapter."""
    rows = []
    if "score" in difference:
        rows.append(("largest difference of scores, relative", f"{difference['score']:.1e}"))
    else:
        rows.append(("mean KL(tuned || export)", f"{difference['kl_tuned_export']:.1e} nats a token"))
        rows.append(("mean KL(tuned || base)", f"{difference['kl_tuned_base']:.1e} nats a token"))
        rows.append(("largest logit difference, relative", f"{difference['logits']:.1e}"))
    return rows


def _scores(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    pair = [_mapping(report.get(when)) for when in ("before", "after")]
    if not all(pair):
        return []
    losses = [f"{float(score['loss']):.3f}" for score in pair]
    judged = [_mapping(score.get("preference")) for score in pair]
    if all("pairs" in found for found in judged):
        shares = [
            f"{found['right']} of {found['pairs']} ({100 * found['interval'][0]:.1f} to "
            f"{100 * found['interval'][1]:.1f} %)"
            for found in judged
        ]
        margins = [f"{float(found['rewards/margins']):.3f}" for found in judged]
        return [
            ("held-out loss, a pair", escaped(losses[0]), escaped(losses[1])),
            ("pairs ranked right, 95 % interval", escaped(shares[0]), escaped(shares[1])),
            ("mean margin of the rewards", escaped(margins[0]), escaped(margins[1])),
        ]
    right = [
        f"{score['right']} of {score['rows']} ({100 * score['interval'][0]:.1f} to {100 * score['interval'][1]:.1f} %)"
        for score in pair
    ]
    return [
        ("held-out loss, nats a token", escaped(losses[0]), escaped(losses[1])),
        ("exact match, 95 % interval", escaped(right[0]), escaped(right[1])),
    ]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
