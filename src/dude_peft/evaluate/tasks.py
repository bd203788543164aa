"""The names after --tasks become the harness's tasks: on local files, from the hub, or a YAML file of the user's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_peft.errors import ConfigError, DataError, DudeError
from dude_peft.evaluate.local_tasks import GROUPS, GSM8K, WORDMATH, is_local, write_tasks
from dude_peft.show import quoted, shown


@dataclass(frozen=True)
class Chosen:
    """One of the names that were asked for, and the tasks that are behind it."""

    name: str
    tasks: dict[str, Any]
    """lm_eval Task of each leaf, by its name; several for a group."""


def load_tasks(
    names: Sequence[str], data: Path | None, folder: Path, *, num_fewshot: int | None = None
) -> list[Chosen]:
    """Load every task.

    Args:
        names: of tasks or groups, or paths of YAML files.
        data: the user's local files; None takes data from where the harness does, the hub.
        folder: where tasks on local files are written.
        num_fewshot: examples in the prompt; None takes each task's own number.

    Raises:
        ConfigError: an unknown name, with the closest ones, a YAML file that is no task, or a task that two names hold.
        DataError: data that is missing or malformed, or that cannot be had.
    """
    local = write_local(names, data, folder)
    rest = [name for name in names if name not in local]
    known = _manager(folder if local else None, defaults=any(not _is_yaml(name) for name in rest))
    chosen: list[Chosen] = []
    for name in names:
        if name not in local and not _is_yaml(name) and name not in known.all_tasks:
            raise ConfigError(_unknown(name, known.all_tasks))
        tasks = _loaded(known, name, local.get(name))
        twice = next((task for one in chosen for task in tasks if task in one.tasks), None)
        if twice is not None:
            raise ConfigError(f"--tasks: {quoted(twice)} is asked for twice; name it, or a group that holds it, once")
        for task_name, task in tasks.items():
            _set_fewshot(task_name, task, num_fewshot)
        chosen.append(Chosen(name, tasks))
    return chosen


def write_local(names: Sequence[str], data: Path | None, folder: Path) -> dict[str, list[str]]:
    """Those of the names whose data lies here, written into `folder`: the names of the tasks behind each.

    Args:
        names: of tasks or groups, or paths of YAML files.
        data: the user's local files; None leaves `wordmath` alone.
        folder: where to.

    Raises:
        DataError: a file is missing or malformed.
        ResourceError: the folder cannot be written.
    """
    return {n: write_tasks(n, data, folder) for n in names if n == WORDMATH or (data is not None and is_local(n))}


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _manager(folder: Path | None, *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    # Without the harness's thousands of YAML files it starts in a moment.
    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)


def _loaded(manager: Any, name: str, written: list[str] | None) -> dict[str, Any]:
    if _is_yaml(name) and not Path(name).is_file():
        raise ConfigError(f"--tasks: no file {shown(name, 300)}; give the path of a task's YAML, or a task's name")
    try:
        found: dict[str, Any] = manager.load(list(written or [name]))["tasks"]
    except DudeError:
        raise
    except Exception as error:  # datasets, the hub client, jinja and the harness each raise their own
        reason = f"{type(error).__name__}: {shown(' '.join(str(error).split()), 200)}"
        if _is_yaml(name):
            raise ConfigError(f"--tasks: {shown(name, 300)} cannot be loaded as a task ({reason})") from error
        raise DataError(
            f"task {quoted(name)}: its data cannot be had ({reason}); give local files with --data-dir, or connect to "
            "the hub once"
        ) from error
    return found


def _unknown(name: str, known: Sequence[str]) -> str:
    names = [*GROUPS, *GSM8K, WORDMATH, *known]
    close = dict.fromkeys(difflib.get_close_matches(name, names, n=4, cutoff=0.5))
    hint = f"did you mean {', '.join(map(quoted, close))}?" if close else "`lm-eval ls tasks` lists the harness's"
    return f"--tasks: there is no task {quoted(name)}; {hint}"


def _set_fewshot(name: str, task: Any, wanted: int | None) -> None:
    """As the harness's own command does; what a task sets to zero stays zero."""
    own = task.get_config("num_fewshot")
    if wanted is not None and own != 0:
        task.set_config("num_fewshot", wanted)
    elif own is None:
        task.set_config(
            "num_fewshot", 5 if name.startswith("mmlu_") and task.get_config("output_type") == "multiple_choice" else 0
        )
