"""What to write in place of a value that a key does not take: what was probably meant, or how the right kind looks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from dude_peft.show import quoted, shown

_SPELT_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%")


def near(word: str, names: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The name of which `word` is a misspelling; of two or three letters every word is."""
    found = difflib.get_close_matches(word, [name for name in names if len(name) > 3], n=1, cutoff=cutoff)
    return found[0] if found else None


def abbreviated(word: str, names: Sequence[str]) -> str | None:
    """The first name of which `word` is the initials, or a part."""
    of_initials = [name for name in names if "_" in name and "".join(part[0] for part in name.split("_")) == word]
    return next(iter(of_initials or [name for name in names if len(word) > 3 and word in name]), None)


def what_to_write(expected: str, came: Any, keys: Sequence[str] = ()) -> str:
    """What to do next about a value of the wrong kind; empty where the message says it already.

    Args:
        expected: as the message has it.
        came: the value.
        keys: of the section that belongs there, if one does.
    """
    if came is None:
        return "give a value, or delete the line"
    if expected.startswith("one of "):
        return _choice(came, re.findall(r"'([^']*)'", expected))
    if expected == "true or false":
        meant = _SPELT_BOOLS.get(str(came).lower())
        return "" if meant is None else f"write {str(meant).lower()}"
    if expected == "text" and isinstance(came, (bool, int, float)):
        return f"write '{str(came).lower()}', in quotes"
    if isinstance(came, (list, dict)) and expected in ("text", "a number", "a whole number", "a finite number"):
        return "write one value, without brackets"
    if "section" in expected and keys:
        return f"its keys: {', '.join(keys)}"
    if expected == "keys and values":
        return "write {KEY: VALUE}"
    if not isinstance(came, str):
        whole = expected == "a whole number" and isinstance(came, float) and came.is_integer() and abs(came) < 1e15
        return f"write {came:.0f}" if whole else ""
    if expected == "a list":
        return f"write [{shown(came)}]"
    return _number(expected, came)


def _choice(came: Any, names: Sequence[str]) -> str:
    if not isinstance(came, str):
        return ""
    spelt = {name.lower(): name for name in names}
    word = came.lower()
    begun = next((name for name in spelt if len(word) > 3 and name.startswith(word)), None)
    swapped = next((name for name in spelt if len(name) == 3 and sorted(name) == sorted(word)), None)
    # Between fp16 and float16 is more than the usual bound; among a few names it is near enough.
    close = (
        word if word in spelt else begun or swapped or near(word, list(spelt), 0.5) or abbreviated(word, list(spelt))
    )
    return "" if close is None else f"closest: {quoted(spelt[close])}"


def _number(expected: str, came: str) -> str:
    if "number" not in expected:
        return ""
    whole = "whole" in expected
    if not whole and (found := _PERCENT.fullmatch(came.strip())):
        return f"write {float(found[1]) / 100:g}"
    is_word = not re.search(r"\d", came)
    return f"write a plain decimal number, such as {'16' if whole else '3e-4'}" + (
        ", or delete the line" if is_word else ""
    )
