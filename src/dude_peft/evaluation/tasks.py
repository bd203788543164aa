"""The names after --tasks become the harness's tasks: on local files, from the hub, or a YAML file of the user's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dude_peft.data.renderer import renew_document_time
from dude_peft.doors import read_file
from dude_peft.errors import ConfigError, DataError, DudeError
from dude_peft.evaluation.local_tasks import is_local, only, write_tasks
from dude_peft.evaluation.task_code import LARGEST_YAML_BYTES, UNSAFE, files_with_code, guarded
from dude_peft.evaluation.task_names import LLM_ADAPTERS, WORDMATH, is_yaml, unknown
from dude_peft.show import quoted, reason_of, shown


@dataclass(frozen=True)
class Chosen:
    """One of the names that were asked for, and the tasks that are behind it."""

    name: str
    tasks: dict[str, Any]
    """lm_eval Task of each leaf, by its name; several for a group."""
    by_task: frozenset[str] = frozenset()
    """Metrics that a group means over its tasks, each as heavy; other metrics are means over all items."""


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
    lost = next((name for name in names if name in LLM_ADAPTERS and data is None), None)
    if lost is not None:
        raise ConfigError(f"--tasks: {quoted(lost)} needs LLM-Adapters' files; give their folder with --data-dir")
    renew_document_time()
    local = write_local(names, data, folder)
    rest = [name for name in names if name not in local]
    known = _manager(folder if local else None, defaults=any(not is_yaml(name) for name in rest))
    chosen: list[Chosen] = []
    for name in names:
        if name not in local and not is_yaml(name) and name not in known.all_tasks:
            raise ConfigError(unknown(name, known.all_tasks))
        if name not in local:
            with _own_errors(name):
                _look_at_code(known, name)
        tasks, by_task = _loaded(known, name, local.get(name))
        twice = next((task for one in chosen for task in tasks if task in one.tasks), None)
        if twice is not None:
            raise ConfigError(f"--tasks: {quoted(twice)} is listed twice; list it, or a group that contains it, once")
        with _own_errors(name):
            for task_name, task in tasks.items():
                _refuse_what_we_cannot(task_name, task)
                _set_fewshot(task_name, task, num_fewshot)
        chosen.append(Chosen(name, tasks, by_task))
    return chosen


def write_local(names: Sequence[str], data: Path | None, folder: Path) -> dict[str, list[str]]:
    """Those of the names whose data lies here, written into `folder`: the names of the tasks behind each.

    Tasks that an earlier call wrote there and this one does not are removed: the harness finds all that lies there.

    Args:
        names: of tasks or groups, or paths of YAML files.
        data: the user's local files; None leaves `wordmath` alone.
        folder: where to.

    Raises:
        DataError: a file is missing or malformed.
        ResourceError: the folder cannot be written.
    """
    written = {n: write_tasks(n, data, folder) for n in names if n == WORDMATH or (data is not None and is_local(n))}
    asked = {Path(name).stem for name in names if is_yaml(name)}  # one of them may lie there
    only({task for tasks in written.values() for task in tasks} | asked, folder)
    return written


def _manager(folder: Path | None, *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    # Without the harness's thousands of YAML files it starts in a moment.
    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)


def _loaded(manager: Any, name: str, written: list[str] | None) -> tuple[dict[str, Any], frozenset[str]]:
    """(its tasks, the metrics that it means over tasks)."""
    if is_yaml(name) and not Path(name).is_file():
        raise ConfigError(
            f"--tasks: no file {shown(name, 300)}; give the path of a task's YAML file, or the name of a task"
        )
    with _own_errors(name), guarded():
        found = _found(manager, written or [name])
    tasks: dict[str, Any] = found["tasks"]
    of_group = {name: {task.task_name for task in group.get_all_tasks()} for name, group in found["groups"].items()}
    groups = [group for name, group in found["groups"].items() if of_group[name] == set(tasks)]
    listed = [one for group in groups[:1] for one in group.aggregate_metric_list or []]
    return tasks, frozenset(one.metric for one in listed if not one.weight_by_size)


@contextlib.contextmanager
def _own_errors(name: str) -> Iterator[None]:
    """Within: datasets, the hub client, jinja, the harness and a user's code each raise their own."""
    try:
        yield
    except DudeError:
        raise
    except Exception as error:
        reason = reason_of(error, 200)
        if is_yaml(name):
            raise ConfigError(f"--tasks: {shown(name, 300)} cannot be loaded as a task ({reason})") from error
        raise DataError(
            f"task {quoted(name)}: its data cannot be loaded ({reason}); give local files with --data-dir, or connect "
            "to the hub once"
        ) from error


def _look_at_code(manager: Any, name: str) -> None:
    """Before the harness loads a task: refuses one that runs a model's code, and says which file has code itself."""
    try:
        group = _group_in(Path(name)) if is_yaml(name) and Path(name).is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # for the harness to refuse
        group = None
    of_group = [] if group is None else files_with_code(_manager(Path(name).parent, defaults=True), [group])
    for file in sorted({*files_with_code(manager, [name]), *of_group}):
        warnings.warn(f"{shown(file, 300)} runs its own Python code (!function)", stacklevel=2)


def _found(manager: Any, names: list[str]) -> Any:
    """A group's file is loaded by the group's name: the harness's loader of files is for tasks alone."""
    group = _group_in(Path(names[0])) if is_yaml(names[0]) else None
    if group is None:
        return manager.load(names)
    # Of tasks in its own folder, or of the harness's.
    file, folder = Path(names[0]).resolve(), _manager(Path(names[0]).parent, defaults=True)
    known = folder.task_index.get(group)
    if known is None or known.yaml_path is None or Path(known.yaml_path).resolve() != file:
        other = "nowhere" if known is None else shown(known.yaml_path, 300)
        raise ConfigError(
            f"--tasks: {shown(file, 300)} is the group {quoted(group)}, which lm-eval already has in {other}; rename "
            "the group"
        )
    return folder.load([group])


def _group_in(file: Path) -> str | None:
    # Nothing is constructed: functions stay names.
    root = yaml.compose(read_file(file, LARGEST_YAML_BYTES), yaml.SafeLoader)
    keys = {key.value: value for key, value in root.value} if isinstance(root, yaml.MappingNode) else {}
    return str(keys["group"].value) if "group" in keys and "class" not in keys else None


def _refuse_what_we_cannot(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False) or task.get_config("unsafe_code"):
        raise ConfigError(UNSAFE.format(quoted(name)))
    if not task.get_config("metric_list") and not getattr(task, "_metric_fn_list", True):
        raise ConfigError(f"task {quoted(name)} has no metric, so it has no score; add one to its metric_list")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {quoted(name)} asks about images; choose text tasks")


def _set_fewshot(name: str, task: Any, wanted: int | None) -> None:
    """As the harness's own command does; what a task sets to zero stays zero."""
    own = task.get_config("num_fewshot")
    if wanted and own != 0 and (examples := task.fewshot_docs()) is not None and len(examples) < wanted:
        raise ConfigError(f"--num-fewshot {wanted}: task {quoted(name)} has {len(examples)} examples; give fewer")
    if wanted is not None and own != 0:
        task.set_config("num_fewshot", wanted)
    elif own is None:
        task.set_config(
            "num_fewshot", 5 if name.startswith("mmlu_") and task.get_config("output_type") == "multiple_choice" else 0
        )
