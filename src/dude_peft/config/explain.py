"""`dude config`: what a run's configuration may say, read from the configuration itself."""

from __future__ import annotations

from typing import Any

from dude_peft.config.grid import GridConfig
from dude_peft.config.reading import closest_key
from dude_peft.config.schema import LARGEST_COUNT, RunConfig
from dude_peft.errors import ConfigError
from dude_peft.names import instead_of, our_key
from dude_peft.show import quoted

_WORDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def schema() -> dict[str, Any]:
    """JSON schema of a run's configuration; editors check and complete YAML files with it."""
    found: dict[str, Any] = _standard(RunConfig.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def explain(key: str | None = None) -> list[tuple[str, str, str, str]]:
    """What one key means, or every key of a section; of all sections without one.

    Args:
        key: dotted, as in train.learning_rate, or a section, as in train.

    Returns:
        (key, values it takes, default, meaning) of each.

    Raises:
        ConfigError: there is no such key.
    """
    definitions = schema()
    rows = _rows(definitions, definitions, "")
    if key is None:
        return rows
    found = [row for row in rows if row[0] == key or row[0].startswith((f"{key}.", f"{key}[]"))]
    if not found:
        names = [row[0] for row in rows]
        word = key.rpartition(".")[2]
        # A key without its section is meant wherever it stands.
        places = [name for name in names if name.rpartition(".")[2] == word]
        meant = dict.fromkeys([our_key(word), *places] if places else [closest_key(tuple(key.split(".")))])
        closest = ", ".join(name for name in meant if name is not None)
        hint = instead_of(word) or (f"closest: {closest}" if closest else "dude config explain lists them all")
        raise ConfigError(f"unknown key {quoted(key)}; {hint}")
    return found


def explain_grid() -> list[tuple[str, str, str, str]]:
    """The same of every key of a comparison."""
    definitions = _standard(GridConfig.model_json_schema())
    return _rows(definitions, definitions, "")


def choices(key: str | None) -> list[str]:
    """A line for each thing that a key chooses among, where the configuration does not list them itself."""
    if key not in ("adapter.method", "train.learning_rate"):
        return []
    from dude_peft.methods import METHODS

    if key == "adapter.method":
        return [f"{name}: {method.summary} ({method.paper})" for name, method in METHODS.items()]
    return [f"{name}: {method.learning_rate:g}" for name, method in METHODS.items()]


def _standard(node: Any) -> Any:
    """With the limits under JSON schema's own names, which pydantic leaves as they are behind its own validators."""
    if isinstance(node, list):
        return [_standard(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    return {_LIMITS.get(key, key): _standard(entry) for key, entry in node.items() if key != "allow_inf_nan"}


def _rows(node: dict[str, Any], root: dict[str, Any], prefix: str) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, entry in node["properties"].items():
        section = _referred(entry, root)
        if section is not None:
            rows += _rows(section, root, f"{prefix}{name}.")
            continue
        default = "required" if name in node.get("required", ()) else _shown(entry.get("default"))
        meaning = " ".join(str(entry.get("description", "")).split())
        rows.append((f"{prefix}{name}", _values(entry), default, meaning))
        for form in entry.get("anyOf", [entry]):
            if inside := _listed(form, root):
                rows += _rows(inside, root, f"{prefix}{name}[].")
            elif inside := _referred(form, root):
                rows += _rows(inside, root, f"{prefix}{name}.")
    return rows


def _referred(entry: dict[str, Any], root: dict[str, Any]) -> dict[str, Any] | None:
    reference = entry.get("$ref")
    return root["$defs"][reference.rpartition("/")[2]] if reference else None


def _listed(entry: dict[str, Any], root: dict[str, Any]) -> dict[str, Any] | None:
    """The section of which an entry is a list."""
    return _referred(entry.get("items", {}), root)


def _values(entry: dict[str, Any] | bool) -> str:
    if isinstance(entry, bool) or not entry:
        return "any value"
    if "$ref" in entry:
        return "section"
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(_values(form) for form in entry["anyOf"]))
    if "enum" in entry:
        return ", ".join(map(str, entry["enum"]))
    kind = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    text = kind.get(entry.get("type", ""), str(entry.get("type", "")))
    if entry.get("type") == "array":
        return f"list of {_plural(_values(entry['items']))}"
    if entry.get("type") == "object":
        inner = entry["additionalProperties"]
        return "names -> " + ("any values" if inner is True else _values(inner))
    limits = [
        f"{limit} {entry[word]:,}"
        for word, limit in _WORDS.items()
        if word in entry and entry[word] != LARGEST_COUNT  # which no run comes near to
    ]
    return f"{text} {', '.join(limits)}".strip()


def _plural(kind: str) -> str:
    """Of what a list holds: sections, whole numbers at least 0; texts and words stay as they are."""
    return next((kind.replace(one, f"{one}s", 1) for one in ("section", "number") if one in kind), kind)


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)
