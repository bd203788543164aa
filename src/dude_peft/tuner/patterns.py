"""Regular expressions of a configuration: valid, and quick on the names they are for.

A repetition inside a repeated group, as in `(a+)+b`, can keep the matcher busy for years, and nothing can interrupt
it. Such patterns, and only such, are tried first in a process that can be ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable

from dude_peft.errors import ConfigError
from dude_peft.show import quoted

_REPEATED_GROUP = re.compile(r"\)[*+{]")
_LONGEST_SECONDS = 2.0
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
