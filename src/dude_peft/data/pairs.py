"""Two answers to one question, of which one is better: two conversations that begin alike and differ in their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dude_peft.data.message import Message
from dude_peft.errors import DataError


def shared_beginning(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many messages two conversations have in common, from the first; whether they are learned does not count."""
    pairs = zip(chosen, rejected, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if _said(a) != _said(b)), min(len(chosen), len(rejected)))


def judged_apart(
    chosen: Sequence[Message], rejected: Sequence[Message], source: str, names: tuple[str, str]
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Both conversations, with what they share excluded from the loss: their own answers alone are judged.

    Where they are the same from end to end, their last answers are judged.

    Raises DataError, beginning with `source`, where one of them has no answer of its own, or they ask different things.
    """
    shared, both = shared_beginning(chosen, rejected), (chosen, rejected)
    if shared == len(chosen) == len(rejected):
        shared -= 1
    for name, other, own in zip(names, reversed(names), both, strict=True):
        if shared == len(own):
            raise DataError(f"{source}: all of '{name}' is the beginning of '{other}'; give each an answer of its own")
    for name, own in zip(names, both, strict=True):
        if own[shared].role != "assistant":
            raise DataError(
                f"{source}: '{names[0]}' and '{names[1]}' differ before the answer, in message {shared} of '{name}'; "
                "they must share all messages before the answers"
            )
    if not any(message.role in ("user", "tool") for message in chosen[:shared]):
        raise DataError(f"{source}: '{names[0]}' and '{names[1]}' share no user message before the answers; add it")
    first, second = (
        tuple(replace(each, trained=each.trained and place >= shared) for place, each in enumerate(own)) for own in both
    )
    return first, second


def _said(message: Message) -> tuple[str, str, str]:
    return message.role, message.content, message.more
