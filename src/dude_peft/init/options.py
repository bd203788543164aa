"""The command's options as fields of DudeConfig."""

from __future__ import annotations

import re
from typing import Any

from dude_peft.doors import parse_json
from dude_peft.errors import ConfigError
from dude_peft.show import shown

_NAME = re.compile(r"[\w.]+")


def module_names(text: str | None) -> list[str] | str | None:
    """all-linear, a list of name endings separated by commas, or else one regular expression."""
    if text is None or text.lower() == "all-linear":
        return text
    parts = [part.strip() for part in text.split(",")]
    return parts if all(_NAME.fullmatch(part) for part in parts) else text


def int_if_whole(value: float) -> int | float:
    """16.0 as 16, which is how a configuration in Python is written and saved."""
    return int(value) if value.is_integer() else value


def pattern(option: str, text: str | None) -> dict[str, Any]:
    """A JSON object, as in {"q_proj": 8}.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{option}: {shown(text)} is not a JSON object; write '{{\"q_proj\": 8}}'")
    return found
