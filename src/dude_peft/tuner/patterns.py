"""Regular expressions of a configuration: valid, quick on the names they are for, and the same in every order.

A repetition inside a repeated group, as in `(a+)+b`, can keep the matcher busy for years, and nothing can interrupt
it. Such patterns, and only such, are tried first in a process that can be ended.

Where two patterns match one layer, the first of the dictionary counts, here as in PEFT. JSON files are written with
sorted keys, by PEFT too, so what goes into a file has to mean the same in any order.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from typing import TypeVar

from peft.utils.other import get_pattern_key

from dude_peft.errors import ConfigError
from dude_peft.show import quoted

_REPEATED_GROUP = re.compile(r"\)[*+{]")
_LONGEST_SECONDS = 2.0
_Value = TypeVar("_Value", int, float)
_TRIAL = (
    "import json, re, sys; wanted = json.load(sys.stdin); "
    "[re.fullmatch(wanted['pattern'], name) for name in wanted['names']]"
)


def check_pattern(key: str, pattern: str, names: Iterable[str], around: str = "{}") -> None:
    """Refuse a pattern that does not compile, or does not end on these names.

    Args:
        key: of the configuration, for the message.
        pattern: matched against whole names.
        names: modules of the model.
        around: the whole expression, with `{}` where the pattern stands in it.

    Raises:
        ConfigError: it is no regular expression, or takes longer than two seconds.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}={pattern!r} is no regular expression: {error}") from error
    if not _REPEATED_GROUP.search(pattern):
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL],
            input=json.dumps({"pattern": around.format(pattern), "names": list(names)}).encode(),
            timeout=_LONGEST_SECONDS,
            check=False,
            capture_output=True,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{key}={quoted(pattern)} takes longer than {_LONGEST_SECONDS:.0f} s on this model's names; write it "
            "without a repetition inside a repeated group"
        ) from error


def exactly(name: str) -> str:
    """The pattern that PEFT matches with the layer of this name and with no other one."""
    return f"^{re.escape(name)}"


def overlapping(patterns: dict[str, _Value], names: Iterable[str]) -> tuple[str, list[str]] | None:
    """A layer on which the order of the patterns decides, and those that match it; None where there is none."""
    if len(set(patterns.values())) < 2:
        return None
    for name in names:
        keys = _matching(patterns, name)
        if len({patterns[key] for key in keys}) > 1:
            return name, keys
    return None


def in_any_order(patterns: dict[str, _Value], names: Collection[str]) -> dict[str, _Value]:
    """The patterns as they are, or layer by layer where their order decides: the same values, sorted or not.

    Args:
        patterns: rank_pattern or alpha_pattern; the first that matches a layer counts.
        names: the adapted layers.
    """
    if overlapping(patterns, names) is None:
        return patterns
    first = {name: get_pattern_key(list(patterns), name) for name in names}
    return {exactly(name): patterns[key] for name, key in first.items() if key in patterns}


def _matching(patterns: Iterable[str], name: str) -> list[str]:
    """Those that match a layer, as `peft.utils.other.get_pattern_key` tells."""
    return [key for key in patterns if get_pattern_key([key], name) == key]
