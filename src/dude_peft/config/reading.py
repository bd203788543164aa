"""Reads a run's configuration: YAML in, `RunConfig` out, every mistake as one line with its place.

YAML is read event by event into values that remember their line. That leaves out, by construction, what makes YAML
unsafe or surprising: tags (`!!python/object`), anchors (bombs), duplicate keys (the last one would win silently), and
YAML 1.1's guesses (`no` as false, `017` as 15, `1:30` as 90), which stay text and are refused where a number is due.
ruamel.yaml tells lines too, but follows aliases, and takes `017`, `0x10`, `1_000` for numbers and others for dates.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from dude_peft.config.grid import GridConfig
from dude_peft.config.meant import abbreviated, near, what_to_write
from dude_peft.config.schema import DECIMAL, RunConfig, Section
from dude_peft.config.trainer_fields import hint as trainer_hint
from dude_peft.doors import NoFileError, open_file
from dude_peft.errors import ConfigError
from dude_peft.kinds import unwrapped
from dude_peft.names import instead_of, our_key
from dude_peft.show import quoted, shown

QUICKSTART = "builtin:quickstart"
"""The name of the configuration that comes with the package."""

Key = tuple[str | int, ...]

# Two ways to say how long a run is.
_RIVALS: dict[Key, str] = {("train", "max_steps"): "num_train_epochs", ("train", "num_train_epochs"): "max_steps"}
_LARGEST_FILE_BYTES = 256 * 1024
_DEEPEST = 8
_DATA = (".jsonl", ".csv", ".tsv", ".parquet")

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False, "True": True, "False": False}

_INSIDE = {"model": "model.name_or_path", "adapter": "adapter.method", "data": "data.train", "train": "data.train"}
"""What the value is that stands where a section belongs."""


@dataclass
class _Tree:
    """A configuration as plain values, and the place where each key was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    top: str = ""
    """Place of what was not written."""
    kind: type[Section] = RunConfig
    """What the values are."""

    def place(self, key: Key) -> str:
        """Place of `key`, or of the nearest section around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.top)


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: list[str] | None = None,
    options: Mapping[str, str | None] | None = None,
) -> RunConfig:
    """The run that `source` describes, with other values written over it.

    Args:
        source: the YAML file, `builtin:quickstart`, or what a file would hold.
        overrides: "train.max_steps=80": a key, and its value as YAML.
        options: of the command: a key, and its value as it is; None leaves the key alone.

    Raises:
        ConfigError: the file is missing or unreadable, is not plain YAML, or a key or value is wrong.
    """
    tree = _tree_of(source) if isinstance(source, Mapping) else _read_tree(source)
    for override in overrides or []:
        _apply_override(override, tree)
    for name, value in (options or {}).items():
        if value is not None:
            _write_over(tuple(name.split(".")), value, f"option for {name}", tree)
    config: RunConfig = _validate(tree)
    return config


def load_grid(
    source: str | os.PathLike[str] | Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> tuple[GridConfig, RunConfig]:
    """The comparison that `source` describes, and its ordinary run.

    Args:
        source: the YAML file, or what a file would hold.
        options: of the command: a key, and its value as it is; None leaves the key alone.

    Raises:
        ConfigError: as `load_config`, for both.
    """
    tree = _tree_of(source) if isinstance(source, Mapping) else _read_tree(source)
    tree.kind = GridConfig
    for name, value in (options or {}).items():
        if value is not None:
            _write_over((name,), value, f"option for {name}", tree)
    grid: GridConfig = _validate(tree)
    run = _read_tree(grid.run) if isinstance(grid.run, str) else _part(tree, "run")
    run.values["output_dir"] = grid.output_dir
    return grid, _validate(run)


def check_key(name: str, where: str) -> None:
    """Raises ConfigError, with the closest one, where a run has no key of this name, as `train.max_steps`."""
    if "." in name and name in _known_keys():
        return
    closest = closest_key(tuple(name.split(".")))
    hint = f"closest: {closest!r}" if closest and "." in closest else "dude config explain lists them all"
    raise ConfigError(f"{where}: key {quoted(name)} is unknown; {hint}")


def with_values(config: RunConfig, values: Mapping[str, Any], where: str) -> RunConfig:
    """The run with other values, by keys as `train.max_steps`.

    Args:
        config: the run.
        values: by key.
        where: who asks for it, as errors name it.

    Raises:
        ConfigError: a key that does not exist, a value that it does not take, or two that contradict.
    """
    tree = _tree_of(config.model_dump(mode="json", exclude_unset=True))
    for name, value in values.items():
        _write_over(tuple(name.split(".")), _plain(value), where, tree)
    changed: RunConfig = _validate(tree)
    return changed


def _part(tree: _Tree, name: str) -> _Tree:
    """What stands under a key of a file, as a configuration of its own that knows its lines."""
    places = {key[1:]: place for key, place in tree.places.items() if key[0] == name and len(key) > 1}
    return _Tree(dict(tree.values[name]), places, tree.place((name,)))


def read_values(path: str | Path) -> dict[str, Any]:
    """A configuration's values as they are written, none of them checked.

    Raises:
        ConfigError: the file is missing or unreadable, or is not plain YAML.
    """
    return _read_tree(path).values


def _read_tree(path: str | os.PathLike[str]) -> _Tree:
    name = shown(path, 300)
    tree = _Tree(top=f"{name}:1")
    _read_yaml(_read_text(Path(path)), tree, lambda line: f"{name}:{line}")
    return tree


def _tree_of(values: Mapping[str, Any]) -> _Tree:
    return _Tree(_plain(values), top="configuration")


def _plain(value: Any, depth: int = 0) -> Any:
    """As a file would hold it: paths as text, NumPy's numbers as Python's."""
    if depth > _DEEPEST:
        raise ConfigError(f"configuration: nested deeper than {_DEEPEST} levels; no key needs that")
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, depth + 1) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else unwrapped(value)


def dump_config(config: RunConfig) -> str:
    """`config` as YAML that `load_config` reads back to the same run."""
    import yaml

    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read_text(path: Path) -> str:
    if str(path) == QUICKSTART:
        path = Path(__file__).with_name("quickstart.yaml")
    if path.suffix.lower() in _DATA:
        raise ConfigError(
            f"{shown(path, 300)}: this is a data file, not a configuration; write one with: dude config new "
            f"{shown(path, 300)} --model MODEL"
        )
    try:
        path = path.expanduser()
        if path.is_dir():
            raise ConfigError(f"{shown(path, 300)}: this is a folder; give the configuration file inside it")
        with open_file(path) as file:
            raw = file.read(_LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{shown(path, 300)}: no such file; write one with dude config new, or use {QUICKSTART}"
        ) from None
    except ConfigError:
        raise
    except NoFileError as error:
        raise ConfigError(f"{shown(path, 300)}: {error.strerror}; give a YAML file") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{shown(path, 300)}: cannot be read ({reason}); check the path") from None
    if len(raw) > _LARGEST_FILE_BYTES:
        limit = _LARGEST_FILE_BYTES // 1024
        raise ConfigError(f"{shown(path, 300)}: larger than {limit} KiB, too large for a configuration; check the path")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown(path, 300)}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _read_yaml(text: str, tree: _Tree, place: Any, *, at: Key = ()) -> Any:
    """Parses `text`; a mapping at the top fills `tree`, any other value is returned (for an override)."""
    import yaml

    events = _Events(text, place)
    try:
        event = events.take()
        if isinstance(event, yaml.StreamEndEvent):
            value: Any = None
        else:
            value = events.value(event, tree, at, depth=0)
            events.end()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{place(line)}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place(1)}: not valid YAML: {str(error).splitlines()[0]}") from None
    if at:
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{place(1)}: a configuration has sections with keys; dude config new writes one")
    tree.values = value
    return value


class _Events:
    """PyYAML's event stream, read one value at a time under limits."""

    def __init__(self, text: str, place: Any):
        import yaml

        self._yaml = yaml
        self._stream = yaml.parse(text, Loader=yaml.SafeLoader)
        self._place = place

    def take(self) -> Any:
        yaml = self._yaml
        for event in self._stream:
            if not isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent)):
                return event
        raise AssertionError("PyYAML ends every stream with an event")

    def end(self) -> None:
        """Refuses a second document."""
        yaml = self._yaml
        for event in self._stream:
            if isinstance(event, yaml.DocumentStartEvent):
                raise ConfigError(f"{self._at(event)}: a second YAML document begins here; keep one document per file")

    def _at(self, event: Any) -> str:
        return str(self._place(event.start_mark.line + 1))

    def value(self, event: Any, tree: _Tree, key: Key, depth: int) -> Any:
        yaml = self._yaml
        where = self._at(event)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise ConfigError(f"{where}: YAML anchors and aliases (& and *) are not supported; write the value out")
        if event.tag is not None:
            raise ConfigError(f"{where}: the YAML tag {shown(event.tag)} is not supported; write a plain value")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event.value) if event.implicit[0] else event.value
        if depth >= _DEEPEST:
            raise ConfigError(f"{where}: nested deeper than {_DEEPEST} levels; no key needs that")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(tree, key, depth)
        return self._mapping(tree, key, depth)

    def _list(self, tree: _Tree, key: Key, depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := self.take(), self._yaml.SequenceEndEvent):
            inner: Key = (*key, len(items))
            tree.places[inner] = self._at(event)
            items.append(self.value(event, tree, inner, depth + 1))
        return items

    def _mapping(self, tree: _Tree, key: Key, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := self.take(), self._yaml.MappingEndEvent):
            where = self._at(event)
            if not isinstance(event, self._yaml.ScalarEvent) or event.tag or event.anchor:
                raise ConfigError(f"{where}: a key must be a plain word")
            inner: Key = (*key, event.value)
            if event.value in items:
                first = tree.places[inner]
                raise ConfigError(f"{where}: key {_name(inner)} is written twice, first at {first}; keep one of them")
            tree.places[inner] = where
            items[event.value] = self.value(self.take(), tree, inner, depth + 1)
        return items


def _scalar(text: str) -> Any:
    """A plain scalar by YAML 1.2's rules; whatever is not clearly a number or constant stays text."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if DECIMAL.fullmatch(text) and not text.lstrip("+-").isdigit():
        return float(text)
    return text


def _apply_override(override: str, tree: _Tree) -> None:
    name, equals, text = override.partition("=")
    name = name.strip()
    where = f"--set {shown(override, 120)}"
    if not equals or not all(name.split(".")):
        raise ConfigError(f"{where}: this is not KEY=VALUE; write for example --set train.max_steps=80")
    if not text.strip():  # most likely a shell variable that is not set
        raise ConfigError(f"{where}: no value; give one, or {shown(name, 80)}=null for the default")
    key: Key = tuple(name.split("."))
    for known in [known for known in tree.places if known[: len(key)] == key]:
        del tree.places[known]
    _write_over(key, _read_yaml(text, tree, lambda line: where, at=key), where, tree)


def _write_over(key: Key, value: Any, where: str, tree: _Tree) -> None:
    train = tree.values.get("train")
    if value is not None and key in _RIVALS and isinstance(train, dict):
        rival = _RIVALS[key]
        if not tree.places.get(("train", rival), "").startswith("--set"):  # two of the command's own contradict
            train.pop(rival, None)  # what the command says replaces what the file says of the same thing
    *sections, last = map(str, key)
    tree.places[key] = where
    section = tree.values
    for depth, part in enumerate(sections, start=1):
        if part not in section:
            tree.places[key[:depth]] = where
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{where}: {quoted(part)} is a value, not a section; see `dude config explain`")
        section = inner
    section[last] = value


def _validate(tree: _Tree) -> Any:
    """What the tree describes, of its kind."""
    from pydantic import ValidationError

    # A section whose keys are all commented out reads as null; it means the defaults.
    sections = {name for name, kind in tree.kind.model_fields.items() if _is_section(kind.annotation)}
    values = {key: {} if value is None and key in sections else value for key, value in tree.values.items()}
    try:
        return tree.kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key explains a missing one (a typo causes both), so it is told first.
        problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
        more = len({_real_key(tree, problem["loc"])[:2] for problem in problems}) - 1
        tail = f" (and {more} more error{'s' if more > 1 else ''})" if more > 0 else ""
        if more > 2 and problems[0]["type"] == "extra_forbidden":
            tail += "; docs/coming-from.md lists the keys of other tools"
        raise ConfigError(_explain(problems, tree) + tail) from None


def _explain(problems: list[Any], tree: _Tree) -> str:
    """The first problem in one line: place, key, what was expected, what came."""
    problem = problems[0]
    key = _real_key(tree, problem["loc"])
    where, name = tree.place(key), _name(key)
    if problem["type"] == "extra_forbidden":
        closest = None if (hint := instead_of(str(key[-1]))) else closest_key(key, tree.kind)
        if hint is None and key[:1] == ("train",) and our_key(str(key[-1])) is None:
            hint = trainer_hint(str(key[-1]))
        hint = hint or (f"closest: {closest!r}" if closest else f"known here: {', '.join(_siblings(key, tree.kind))}")
        return f"{where}: key {name} is unknown; {hint}"
    if problem["type"] == "missing":
        return f"{where}: key {name} is missing; add it"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    # A field with several forms (text or a list) gives one problem a form. One inside the list is the closest to
    # what was meant; otherwise all forms are told.
    inner = [
        each
        for each in problems
        if len(deeper := _real_key(tree, each["loc"])) > len(key) and deeper[: len(key)] == key
    ]
    if inner:
        return _explain(inner, tree)
    same = [each for each in problems if _real_key(tree, each["loc"]) == key]
    expected = " or ".join(dict.fromkeys(_expected(each) for each in same))
    came = problem["input"]
    if key == ("data", "test") and isinstance(came, dict) and list(came) == ["share"]:  # as it was read
        came, hint = came["share"], "write a share, such as 0.1"
    elif problem["type"] == "model_type" and len(key) == 1 and (meant := _INSIDE.get(str(key[0]))):
        hint = f"closest: {meant!r}"
    elif key == ("train", "objective") and (told := _OF_OTHER_NAMES.get(str(came).lower())):
        hint = told
    else:
        section = _section_at(key, tree.kind)
        hint = what_to_write(expected, came, [] if section is None else list(section.model_fields))
    hint = hint and f"; {hint}"
    return f"{where}: key {name}: expected {expected}, got {_as_yaml(came)}{hint}"


_OF_OTHER_NAMES = {
    "rft": "rejection sampling is dude generate --as-rows --keep correct, and then sft on what it wrote",
    "simpo": "it is cpo with train.cpo.loss_type: simpo",
    "ipo": "it is dpo with train.dpo.loss_type: ipo",
}
"""Objectives that others name, and how a run says them."""


def _expected(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        return f"one of {context['expected']}"
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        sign = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}[bounds[kind]]
        return f"a number {sign} {context[bounds[kind]]}"
    return {
        "int_type": "a whole number",
        "int_parsing_size": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "string_too_short": "text that is not empty",
        "too_short": "a list that is not empty",
        "list_type": "a list",
        "dict_type": "keys and values",
        "model_type": "a section with keys",
        "model_attributes_type": "a section with keys",
    }.get(kind, str(problem["msg"]).lower())


def _real_key(tree: _Tree, loc: tuple[str | int, ...]) -> Key:
    """`loc` without the names that pydantic adds for the forms of a union ("str", "list[...]")."""
    value: Any = tree.values
    key: list[str | int] = []
    section: type[Section] | None = tree.kind
    for part in loc:
        is_field = section is not None and part in section.model_fields
        inside = part in value if isinstance(value, dict) else isinstance(part, int) and isinstance(value, list)
        if not (is_field or inside):
            continue
        key.append(part)
        section = _inside(section, part)
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
    return tuple(key)


def _inside(section: type[Section] | None, part: str | int) -> type[Section] | None:
    """The section that a key of `section` holds, itself or in a list; a list's number leaves it where it is."""
    if isinstance(part, int) or section is None:
        return section
    field = section.model_fields.get(part)
    return None if field is None else _section_in(field.annotation)


def _section_in(annotation: Any) -> type[Section] | None:
    if _is_section(annotation):
        return annotation  # type: ignore[no-any-return]
    return next((found for form in get_args(annotation) if (found := _section_in(form))), None)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _known_keys(kind: type[Section] = RunConfig) -> list[str]:
    names: list[str] = []
    for name, info in kind.model_fields.items():
        names.append(name)
        if _is_section(info.annotation):
            names += [f"{name}.{inner}" for inner in info.annotation.model_fields]  # type: ignore[union-attr]
    return names


def _deeper(kind: type[Section]) -> dict[str, str]:
    """The words of sections inside sections, each with the first key that has it: beta is train.dpo.beta."""
    found: dict[str, str] = {}
    for name in kind.model_fields:
        outer = _inside(kind, name)
        for inner in [] if outer is None else outer.model_fields:
            section = _inside(outer, inner)
            for word in [] if section is None else section.model_fields:
                found.setdefault(word, f"{name}.{inner}.{word}")
    return found


def _section_at(key: Key, kind: type[Section]) -> type[Section] | None:
    """The section that stands at a key, itself or in a list; None where a value does."""
    section: type[Section] | None = kind
    for part in key:
        section = _inside(section, part)
    return section


def is_key(name: str) -> bool:
    """Whether a run has a key of this name, as `train.dpo.beta`; a layer in rank_pattern, say, is none."""
    *outer, last = name.split(".")
    section = _section_at(tuple(outer), RunConfig)
    return section is not None and last in section.model_fields


def _siblings(key: Key, kind: type[Section]) -> list[str]:
    section = _section_at(key[:-1], kind)
    return _known_keys(kind) if section is None else list(section.model_fields)


def closest_key(key: Key, kind: type[Section] = RunConfig) -> str | None:
    """The known key that was probably meant: what other tools call so, the same word elsewhere, or one that is near."""
    prefix, last = ".".join(map(str, key[:-1])), str(key[-1])
    siblings = _siblings(key, kind)
    if any(isinstance(part, int) for part in key):
        return None  # the few keys of a list's sections: they are all told
    elsewhere = {known.rpartition(".")[2]: known for known in _known_keys(kind)}
    if meant := (our_key(last) if kind is RunConfig else None) or elsewhere.get(last):
        return meant
    if meant := _deeper(kind).get(last):
        return meant
    if name := near(last, siblings) or abbreviated(last, siblings):
        return f"{prefix}.{name}" if prefix else name
    found = near(last, list(elsewhere)) or abbreviated(last, list(elsewhere))
    return elsewhere[found] if found else None


def _as_yaml(value: Any) -> str:
    constants = {None: "null", True: "true", False: "false"}
    return constants[value] if value is None or isinstance(value, bool) else shown(repr(value), 120)


def _name(key: Key) -> str:
    return repr(shown(".".join(map(str, key)), 120))
