"""JSON that we write: every number in it is one. NaN and Inf, which JSON has not, are refused, or told as null."""

from __future__ import annotations

import json
import math
from typing import Any

from dude_peft.errors import NumericsError
from dude_peft.show import shown


def json_text(value: Any, **options: Any) -> str:
    """`json.dumps`, options included.

    Raises:
        NumericsError: a number is NaN or Inf.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as error:
        places = with_nulls(value)[1]
        if not places:
            raise
        raise NumericsError(f"'{shown(places[0], 200)}' is NaN or Inf, which JSON cannot hold") from error


def with_nulls(value: Any, place: str = "") -> tuple[Any, list[str]]:
    """(the value with None for every NaN and Inf, where these are: `measures.3.model.value`)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, [place]
    if isinstance(value, dict):
        found = {key: with_nulls(inner, f"{place}.{key}" if place else str(key)) for key, inner in value.items()}
        return {key: inner for key, (inner, _) in found.items()}, [
            one for _, places in found.values() for one in places
        ]
    if isinstance(value, (list, tuple)):
        items = [with_nulls(inner, f"{place}.{index}" if place else str(index)) for index, inner in enumerate(value)]
        return [inner for inner, _ in items], [one for _, places in items for one in places]
    return value, []
