"""JSON that says one thing: no key twice in an object, no NaN."""

import json

from dude_peft.doors import JsonError, without_duplicates


def _constant(name: str) -> None:
    raise JsonError(f"{name} is not JSON; write null or a number")


DECODER = json.JSONDecoder(object_pairs_hook=without_duplicates, parse_constant=_constant)
