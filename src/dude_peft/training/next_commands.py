"""The commands that take a run's adapter up."""

from __future__ import annotations

from pathlib import Path

from dude_peft.config.schema import ModelSection, RunConfig
from dude_peft.data.objectives import KINDS, PAIRED
from dude_peft.data.rows import local_file
from dude_peft.folder.record import ADAPTER, RunReport
from dude_peft.task_types import SCORES
from dude_peft.terminal.next_steps import beside, tell_next
from dude_peft.training.context import RunContext


def next_commands(config: RunConfig, folder: Path, report: RunReport) -> list[list[str]]:
    """The words behind `dude` of each; none for a model whose own code no other command runs."""
    if config.model.trust_remote_code:
        return []
    adapter, gguf_file = str(folder / ADAPTER), config.model.gguf_file
    base = [] if gguf_file is None else ["--gguf-file", gguf_file]
    last = ["merge", adapter] if config.adapter.foreign else ["export", adapter, *base, "--to", "merged"]
    if config.train.task_type == SCORES:
        return [["verify", adapter], [*last, "-o", beside(folder, "-merged")]]
    base += _placed(config.model)
    return [
        ["chat", adapter, *base],
        *_ways_to_judge(config, folder, adapter, base, report),
        [*last, "-o", beside(folder, "-merged")],
    ]


def tell_next_of(context: RunContext, report: RunReport, *, paged: bool) -> None:
    """Shows the commands that take the adapter up, and the one that writes the page, where there is none (`paged`)."""
    config, folder = context.config, context.folder.path
    if config.model.trust_remote_code:
        context.display.say(
            "note: only dude train and dude plan run a model's own code; in Python, use transformers for the "
            f"base model and {'peft.PeftModel' if config.adapter.foreign else 'dude_peft.load_adapter'} for the adapter"
        )
    page = [] if paged else [["report", str(folder), "-o", beside(folder, ".html")]]
    tell_next(context.display, *next_commands(config, folder, report), *page)


def _placed(section: ModelSection) -> list[str]:
    """A model that was spread is spread again; these commands find a place for every module themselves."""
    if not section.is_hooked:
        return []
    found = ["--device-map", section.device_map if isinstance(section.device_map, str) else "auto"]
    for device, size in (section.max_memory or {}).items():
        found += ["--max-memory", f"{device}={size}"]
    return found


def _ways_to_judge(
    config: RunConfig, folder: Path, adapter: str, base: list[str], report: RunReport
) -> list[list[str]]:
    """The commands that try the adapter on what the run names: its tasks, the questions of its held-out file."""
    data, settings = config.data, config.evaluation
    found = []
    asks = KINDS[config.train.objective] not in PAIRED  # what generate reads
    if asks and isinstance(data.test, str) and local_file(data.test) is not None and report.after and report.after.rows:
        columns = [word for ours, theirs in data.columns.items() for word in ("--column", f"{ours}={theirs}")]
        found.append(["generate", adapter, *base, "--file", data.test, *columns, "--limit", "3", "--base-too"])
    if settings.tasks:
        options = ["--tasks", ",".join(settings.tasks)]
        options += [] if settings.tasks_data_dir is None else ["--data-dir", settings.tasks_data_dir]
        options += [] if settings.tasks_num_fewshot is None else ["--num-fewshot", str(settings.tasks_num_fewshot)]
        options += ["--chat"] if settings.tasks_chat else []
        found.append(["eval", adapter, *base, *options, "-o", beside(folder, "-scores")])
    return found
