"""JSON that says one thing: no key twice in an object, no NaN."""

import json
from typing import Any

from dude_peft.show import quoted


class JsonError(ValueError):
    """Valid for Python's json module, not for us: duplicate keys, NaN."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {quoted(key)} appears twice in one object; keep one")
            seen.add(key)
    return result


def _constant(name: str) -> None:
    raise JsonError(f"{name} is not JSON; write null or a number")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
