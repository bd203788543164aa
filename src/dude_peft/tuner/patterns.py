"""Regular expressions of a configuration: valid, quick on the names they are for, and the same in every order.

A repetition inside a repeated group, as in `(a+)+b`, can keep the matcher busy for years, a row of repetitions for
hours, and nothing can interrupt it. Whatever has more than one repetition is tried first in a process that can be
ended. Every door passes here: `get_peft_model`, `load_adapter`, `dude init`, and all that read an adapter's files.

Where two patterns match one layer, the first of the dictionary counts, here as in PEFT. JSON files are written with
sorted keys, by PEFT too, so what goes into a file has to mean the same in any order.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from peft.utils.other import get_pattern_key

from dude_peft.errors import ConfigError
from dude_peft.show import quoted, shown

_LONGEST_SECONDS = 2
"""Of a processor's time: on a busy machine the process may have to wait for one."""
_LONGEST_WAIT_SECONDS = 60.0
_LONGEST_PATTERN, _LONGEST_NAME, _MOST_MATCHES = 100_000, 1_000, 4_000_000
_MEMORY_BYTES = 1 << 30
_Value = TypeVar("_Value", int, float)
_TRIAL = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({_LONGEST_SECONDS}, {_LONGEST_SECONDS}))
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY_BYTES}, {_MEMORY_BYTES}))
except (ImportError, ValueError, OSError):
    pass
wanted = json.load(sys.stdin)
for expression in wanted["expressions"]:
    compiled = re.compile(expression)
    for name in wanted["names"]:
        compiled.match(name)
    print(flush=True)
"""


class _Pattern(NamedTuple):
    key: str
    text: str
    """As the user wrote it."""
    expression: str
    """As it is matched, from the beginning of a name."""


def check_patterns(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse patterns of a configuration that do not compile, or do not end on these names.

    Args:
        config: PEFT's names -> values, as in DudeConfig or adapter_config.json.
        names: of the modules that they are for.

    Raises:
        ConfigError: one is no regular expression, or takes longer than two seconds.
    """
    patterns, names = list(_patterns_of(config)), list(names)
    for pattern in patterns:
        _check_expression(pattern)
    if any(len(name) > _LONGEST_NAME for name in names):
        raise ConfigError(f"a layer's name is longer than {_LONGEST_NAME} characters; no model has such layers")
    if len(patterns) * len(names) > _MOST_MATCHES:
        raise ConfigError(
            f"{patterns[0].key}: {len(patterns):,} patterns for {len(names):,} layers take too long to match; write "
            "fewer patterns, each for several layers"
        )
    if risky := [pattern for pattern in patterns if _is_risky(pattern.text)]:
        _try(risky, names)


def check_quantization(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """The same for how a model is quantised: each library keeps patterns of names under keys of its own.

    Args:
        config: transformers' settings of a quantisation.
        names: of the modules that they are for.

    Raises:
        ConfigError: a pattern takes longer than two seconds.
    """
    texts = [re.sub(r"^(re|[+-]):", "", text) for text in _texts(config) if len(text) <= _LONGEST_PATTERN]
    patterns = [_Pattern("quantization_config", text, text) for text in texts if _is_risky(text) and _compiles(text)]
    if patterns:
        _try(patterns, [name[:_LONGEST_NAME] for name in names])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _texts(inner)


def _compiles(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _patterns_of(config: Mapping[str, Any]) -> Iterator[_Pattern]:
    for key in ("target_modules", "exclude_modules"):
        text = config.get(key)
        if isinstance(text, str):
            yield _Pattern(key, text, rf"(?:{text})\Z")
    for key in ("rank_pattern", "alpha_pattern"):
        for text in config.get(key) or ():
            yield _Pattern(key, text, rf"(.*\.)?({text})$")
    for text in config.get("modules_to_save") or ():
        yield _Pattern("modules_to_save", text, rf"(^|.*\.){text}($|\..*)")
    layers = config.get("layers_pattern")
    for text in [layers] if isinstance(layers, str) else layers or ():
        yield _Pattern("layers_pattern", text, rf"(?:^|.*?\.){text}\.(\d+)\.")


def _check_expression(pattern: _Pattern) -> None:
    if len(pattern.text) > _LONGEST_PATTERN:
        raise ConfigError(f"{pattern.key}={quoted(pattern.text)} is longer than {_LONGEST_PATTERN:,} characters")
    try:
        re.compile(pattern.text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{pattern.key}={quoted(pattern.text, 120)} is not a valid regular expression: {shown(error)}"
        ) from error


def _is_risky(text: str) -> bool:
    """Whether it has more than one repetition, one of a group, or a reference to what was matched before."""
    plain = re.sub(r"\\[^0-9]", "", text)
    return "\\" in plain or "(?" in plain or len(re.findall(r"[*+?{]", plain)) > 1 or bool(re.search(r"\)[*+{]", plain))


def _try(patterns: list[_Pattern], names: list[str]) -> None:
    wanted = {"expressions": [pattern.expression for pattern in patterns], "names": names}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL],
            input=json.dumps(wanted).encode(),
            timeout=_LONGEST_WAIT_SECONDS,
            check=False,
            capture_output=True,
        )
        tried, failed = done.stdout, bool(done.returncode)
    except subprocess.TimeoutExpired as error:
        tried, failed = error.stdout or b"", True
    if not failed:
        return
    guilty = patterns[min(tried.count(b"\n"), len(patterns) - 1)]
    raise ConfigError(
        f"{guilty.key}={quoted(guilty.text)} takes longer than {_LONGEST_SECONDS} s on this model's names; remove "
        "the repetition inside a repeated group"
    )


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
