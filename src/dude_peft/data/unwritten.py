"""What a template may leave out of a row without a word: the row without it, to see whether its text is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from dude_peft.data.formats import Row
from dude_peft.data.message import Message, json_text

CALLS = "tool_calls"
"""What an answer consists of where it calls tools: without it there is nothing to learn."""
FIXED = ("tools", "system")
"""Parts that stand in one place of a conversation: a template that wrote them once always does."""

ALTERED = "{} word for word"
"""Messages that the text does not hold as they are: left out, cut or changed."""


def altered(messages: Sequence[Message], text: str) -> tuple[str, ...]:
    """The same of what users and the system say, of which a text may trim the ends."""
    found: dict[str, None] = {}
    at = 0
    for message in messages:
        said = [segment.strip() for segment in message.segments]
        # Some templates write the system's words behind the first questions.
        if message.role == "system" and not all(segment in text for segment in said):
            found[ALTERED.format("system")] = None
        elif message.role == "user":
            for segment in said:
                place = text.find(segment, at)
                at = place + len(segment)
                if place < 0:
                    break
            if place < 0:
                found[ALTERED.format("messages[] of role user")] = None
                break
    return tuple(found)


def parts(row: Row) -> Iterator[tuple[str, Row]]:
    """(what, the row without it) of everything but the words of users and answers."""
    if row.is_text:
        return
    if row.tools:
        yield "tools", replace(row, tools="")
    for role in ("system", "tool"):
        if any(message.role == role and message.content.strip() for message in row.messages):
            what = role if role in FIXED else f"messages[] of role {role}"
            yield what, _changed(row, role, lambda message: replace(message, content=f"{message.content.strip()} ~"))
    fields = dict.fromkeys((message.role, key) for message in row.messages if message.more for key in message.fields)
    for role, key in fields:
        if key != CALLS:
            yield f"messages[].{key} of role {role}", _changed(row, role, _without(key))
    calls = max((len(message.fields.get(CALLS, ())) for message in row.messages if message.more), default=0)
    for number in range(calls):
        yield CALLS, _changed(row, "assistant", _without(CALLS, number))


def _changed(row: Row, role: str, change: Callable[[Message], Message]) -> Row:
    messages = (change(message) if message.role == role else message for message in row.messages)
    return replace(row, messages=tuple(messages))


def _without(key: str, number: int | None = None) -> Callable[[Message], Message]:
    """Takes a field from a message, or one entry of its list."""

    def change(message: Message) -> Message:
        fields: dict[str, Any] = message.fields
        if key not in fields:
            return message
        rest = [] if number is None else [each for place, each in enumerate(fields[key]) if place != number]
        kept = {name: rest if name == key else value for name, value in fields.items() if name != key or rest}
        return replace(message, more=json_text(kept, key, "row") if kept else "")

    return change
