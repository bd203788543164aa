"""Which of a data set's names is probably meant by ours, where no format fits: a line for `data.columns`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from dude_peft.show import shown

_MEANT = {
    "prompt": (
        "prompt", "query", "question", "input", "instruction", "request", "problem", "user", "human", "customer",
        "source", "ask", "src",
    ),
    "completion": (
        "completion", "response", "reply", "answer", "output", "target", "solution", "assistant", "agent", "bot", "tgt",
    ),
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns", "thread"),
    "role": ("role", "from", "speaker", "author", "sender", "who", "actor"),
    "content": ("content", "value", "text", "message", "body", "utterance", "said"),
    "text": ("text", "body", "document", "passage", "content", "article"),
}  # fmt: skip
_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")


def closest(name: str, names: Sequence[str]) -> str | None:
    """The one of `names` that `name` is probably a misspelling of."""
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    return near[0] if near else None


def mapping_for(names: Sequence[str], values: Mapping[str, Any] | None = None) -> str | None:
    """`data.columns: {...}` that would make a known format of columns with these names; None where none is near.

    Args:
        names: of the columns.
        values: of one row, where there is one: a list of objects is a conversation.
    """
    for name, value in (values or {}).items():
        turns = [turn for turn in value if isinstance(turn, Mapping)] if isinstance(value, (list, tuple)) else []
        if turns and (found := _turn([str(key) for key in turns[0]])):
            return written({"messages": str(name), **found})
    prompt = _meant("prompt", names)
    completion = _meant("completion", [name for name in names if name != prompt])
    if prompt and completion:
        return written({"prompt": prompt, "completion": completion})
    messages = _meant("messages", names)
    text = _meant("text", names) if len(names) == 1 else None
    return written({"messages": messages}) if messages else written({"text": text}) if text else None


def mapping_for_turn(keys: Sequence[str]) -> str | None:
    """The same for the keys of a message."""
    found = _turn(keys)
    return written(found) if found else None


def _turn(keys: Sequence[str]) -> dict[str, str] | None:
    role = _meant("role", keys)
    content = _meant("content", [key for key in keys if key != role])
    return {"role": role, "content": content} if role and content else None


def _meant(ours: str, names: Sequence[str]) -> str | None:
    """The name that has a word of those that mean `ours`, the most usual word first; then a misspelt one."""
    words = {name: [part.lower() for part in _PART.findall(name)] for name in names}
    for word in _MEANT[ours]:
        found = next((name for name in names if word in words[name]), None)
        if found is not None:
            return found
    for word in _MEANT[ours]:
        found = next((name for name in names if get_close_matches(word, words[name], n=1, cutoff=0.8)), None)
        if found is not None:
            return found
    return None


def written(mapping: Mapping[str, str]) -> str | None:
    """The mapping as a line of a configuration, and as options of the commands that need none."""
    pairs = {ours: shown(theirs, 40) for ours, theirs in mapping.items() if ours != theirs}
    line = ", ".join(f"{ours}: {theirs}" for ours, theirs in pairs.items())
    options = " ".join(f"--column {shlex.quote(f'{ours}={theirs}')}" for ours, theirs in pairs.items())
    return f"data.columns: {{{line}}} (without a configuration: {options})" if pairs else None
