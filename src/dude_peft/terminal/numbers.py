"""Numbers on the command line: ASCII decimals without leading zeros, as everybody reads them.

Python's `int` also takes other scripts' digits, underscores and blanks, and 010, which is eight elsewhere.
"""

from __future__ import annotations

import re

import typer

from dude_peft.show import quoted

_LARGE = re.compile(r"[-+]?[1-9][0-9]{18,}")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?|inf|nan)")


def integer(text: str | int) -> int:
    """A whole number as it is typed; typer.BadParameter for anything else."""
    if isinstance(text, str) and _LARGE.fullmatch(text):
        raise typer.BadParameter(f"{quoted(text)} is too large; write a whole number of at most 18 digits")
    if isinstance(text, str) and not _INTEGER.fullmatch(text):
        raise typer.BadParameter(f"{quoted(text)} is not a whole number; write plain digits without leading zeros")
    return int(text)


def numbers(text: str | int | list[float]) -> int | list[float]:
    """One whole number, or decimal numbers with commas between them."""
    if isinstance(text, str) and "," in text:
        return [number(part) for part in text.split(",")]
    return text if isinstance(text, list) else integer(text)


def number(text: str | float) -> float:
    """A decimal number as it is typed; typer.BadParameter for anything else."""
    if isinstance(text, str) and not _NUMBER.fullmatch(text):
        raise typer.BadParameter(f"{quoted(text)} is not a decimal number; write plain digits without leading zeros")
    return float(text)
