"""Texts of strangers on a page: whole, but nothing in them is a control character or goes on for ever."""

from __future__ import annotations

from dude_peft.show import shown, shown_lines

_LONGEST = 4000


def line(text: object) -> str:
    """On one line."""
    return shown(" ".join(str(text).split()), _LONGEST)


def lines(text: object) -> str:
    """Line breaks stay."""
    full = shown_lines(str(text).replace("\r\n", "\n"))
    return full if len(full) <= _LONGEST else f"{full[:_LONGEST]} … ({len(full) - _LONGEST:,} more characters)"
