"""What code a task may bring: the harness's own, that of the user's task files, and none of the current folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dude_peft.data.renderer import RenderError, render_document
from dude_peft.doors import read_file
from dude_peft.errors import ConfigError
from dude_peft.evaluation.task_names import harness_tasks
from dude_peft.show import quoted, shown

LARGEST_YAML_BYTES = 1 << 20
UNSAFE = (
    "task {} runs code that the model writes, which dude eval never does; merge the adapter, and use "
    "`lm-eval run --confirm_run_unsafe_code` in a sandbox"
)
_FUNCTION = "!function"


@dataclass
class _File:
    """What a YAML file says, without any of its functions loaded."""

    unsafe: bool = False
    functions: bool = False
    included: list[Path] = field(default_factory=list)


def files_with_code(manager: Any, names: list[str]) -> list[Path]:
    """The user's own YAML files behind tasks, groups and tags, and those that they include, that run Python code.

    Nothing of them is loaded.

    Args:
        manager: the harness's TaskManager.
        names: that it knows, or paths of YAML files.

    Raises:
        ConfigError: a task runs code that the model writes.
    """
    harness = harness_tasks().resolve()
    waiting, seen, found = [*_behind(manager, names)], set(), []
    while waiting:
        task, path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        file = _read(path)
        if file.unsafe:
            raise ConfigError(UNSAFE.format(quoted(task)))
        if file.functions and not path.is_relative_to(harness):
            found.append(path)
        waiting += [(task, one) for one in file.included]
    return sorted(found)


def _behind(manager: Any, names: list[str]) -> Iterator[tuple[str, Path]]:
    waiting: list[Any] = list(names)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if isinstance(name, dict):  # a member of a group, with settings of its own
            waiting += [
                name.get("group"),
                *(name["task"] if isinstance(name.get("task"), list) else [name.get("task")]),
            ]
        elif isinstance(name, str) and name not in seen:
            seen.add(name)
            entry = manager.task_index.get(name)
            if entry is None:
                if Path(name).is_file():
                    yield name, Path(name).resolve()
                continue
            if entry.yaml_path is not None:
                yield name, Path(entry.yaml_path).resolve()
            members = (entry.cfg or {}).get("task")
            waiting += [*(members if isinstance(members, list) else []), *sorted(entry.tags if members is None else ())]


def _read(path: Path) -> _File:
    """Nothing is constructed: functions stay names. What is no YAML, or is missing, is for the harness to refuse."""
    import yaml

    file = _File()
    try:
        waiting = [yaml.compose(read_file(path, LARGEST_YAML_BYTES), getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
    except (OSError, ValueError, yaml.YAMLError):
        return file
    seen: set[int] = set()  # an anchor may hold itself
    top = waiting[0]
    while waiting:
        node = waiting.pop()
        if id(node) in seen or node is None:
            continue
        seen.add(id(node))
        file.functions |= node.tag == _FUNCTION
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                waiting += [key, value]
                if key.value == "unsafe_code":  # of the file, or of a member of its group
                    file.unsafe |= str(value.value).lower() not in ("false", "no", "off", "null", "~", "")
                elif key.value == "include" and node is top:
                    parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    file.included += [(path.parent / str(part.value)).resolve() for part in parts]
    return file


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within: no metric comes from the current folder, and tasks' templates run in `data.renderer`'s process.

    Raises:
        ConfigError: a metric is a Python file of the current folder.
        TemplateError: a template fails, or takes too much time or memory.
    """
    import evaluate
    import lm_eval.utils

    load: Any = evaluate.load
    refused: list[str] = []

    def load_from_hub(path: str, *args: Any, **kwargs: Any) -> Any:
        if (local := _script(str(path))) is not None:
            refused.append(
                f"{shown(local.absolute(), 300)} has the name of the metric {quoted(path)} and would be run in its "
                "place; rename it, or start dude eval in another folder"
            )
            raise ConfigError(refused[0])
        return load(path, *args, **kwargs)

    own: Any = lm_eval.utils.env
    evaluate.load, lm_eval.utils.env = load_from_hub, _Environment()
    try:
        yield
    finally:
        evaluate.load, lm_eval.utils.env = load, own
        if refused:  # the harness logs the error of a metric, and goes on without it
            raise ConfigError(refused[0])


class _Environment:
    """In place of the harness's jinja environment."""

    def from_string(self, source: str) -> _Template:
        return _Template(source)


@dataclass(frozen=True)
class _Template:
    source: str

    def render(self, **document: Any) -> str:
        try:
            return render_document(self.source, document)
        except RenderError as error:  # as jinja's own, in which the harness's callers name the task
            raise TemplateError(str(error)) from error


def _script(name: str) -> Path | None:
    """The file that `evaluate.load` would run instead of the hub's."""
    path = Path(name)
    paths = [path] if path.suffix == ".py" else [path / f"{path.name}.py"]
    return next((one for one in paths if one.is_file()), None)
