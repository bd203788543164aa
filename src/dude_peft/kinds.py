"""The kinds of a function's arguments, checked before it works with them: a wrong one is a line, not a traceback.

Annotations made of plain kinds are looked at (`int | None`, `str | Path`, `Sequence[str]`); others are left alone.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dude_peft.errors import ConfigError
from dude_peft.show import shown

_Function = TypeVar("_Function", bound=Callable[..., Any])
LONGEST_NAME, _LONGEST_PATH = 255, 4096
"""Bytes, on almost every file system."""
_KINDS: dict[str, Callable[[Any], bool]] = {
    "None": lambda value: value is None,
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "Path": lambda value: isinstance(value, Path),
    "Sequence[str]": lambda value: _all_of(value, str),
    "Sequence[float]": lambda value: _all_of(value, (int, float)),
    "Sequence[str | Path]": lambda value: _all_of(value, (str, Path)),
    "Mapping[str, str]": lambda value: (
        isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)
    ),
}


def unwrapped(value: Any) -> Any:
    """A number of NumPy or torch as Python's own; anything else as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def checked(function: _Function) -> _Function:
    """The function, which raises ConfigError for an argument of a wrong kind."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        bound = signature.bind(*given, **named)
        for name, value in bound.arguments.items():
            bound.arguments[name] = value = unwrapped(value)
            wanted = str(signature.parameters[name].annotation)
            kinds = [_KINDS.get(kind) for kind in re.split(r" \| (?![^\[]*\])", wanted)]
            if None not in kinds and not any(kind(value) for kind in kinds if kind is not None):
                raise ConfigError(f"{function.__name__}: {name} is {shown(repr(value), 60)}; give {wanted}")
            if "Path" in wanted:
                for path in value if isinstance(value, (list, tuple)) else [value]:
                    _check_path(f"{function.__name__}: {name}", path)
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def _check_path(where: str, path: Any) -> None:
    """Refuse what no file system can have: every function of Python's would say so in its own way."""
    if not isinstance(path, (str, Path)):
        return
    try:
        parts = os.fsencode(path).split(os.fsencode(os.sep))
    except UnicodeEncodeError:
        raise ConfigError(f"{where} {shown(path)} has a character that no file name can have; give another") from None
    if any(b"\0" in part for part in parts):
        raise ConfigError(f"{where} {shown(path)} has a NUL character; give a path without it")
    if max(map(len, parts)) > LONGEST_NAME or sum(map(len, parts)) + len(parts) > _LONGEST_PATH:
        raise ConfigError(f"{where} {shown(path, 40)} is longer than the file system allows; use a shorter name")


def _all_of(value: Any, kinds: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, bytes) and all(isinstance(one, kinds) for one in value)
