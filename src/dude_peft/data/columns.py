"""What a data set calls its columns, its messages' keys and their roles (`data.columns`), and which of them were read.

A name that is mapped is read in place of ours: with {completion: reply}, a column `completion` is not looked at. The
same map serves columns, keys of messages and roles, whose names do not clash. Every key that is read of a `Record` is
noted, so that what nobody reads can be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from dude_peft.errors import ConfigError
from dude_peft.show import quoted, shown

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the thoughts before an answer."""
WEIGHTS = ("weight", "loss_scale", "train", "training", "train_on", "loss")
"""Keys of a message that tell whether it is learned."""
IMAGES = ("images", "image")
"""Columns of the images that a row's messages show: a list, or one."""
PREFERENCE = ("chosen", "rejected", "rejected_response")
"""Columns of preference data: two answers, of which one is better."""

_COLUMNS = (
    "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "question", "answer", "text",
    "system", "history", "tools", "functions", *REASONING[:2], "chosen", "rejected", "label", "margin", *IMAGES,
)  # fmt: skip
_KEYS = (
    "role", "content", "from", "value", "name", "tool_calls", "function_call", "tool_call_id", *REASONING, *WEIGHTS,
)  # fmt: skip
_SPEAKERS = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
"""Roles by the names that data sets give them; a `function_call` is an assistant's message that is a call as JSON."""
_ROLES = ("system", "user", "assistant", "tool")


class Columns:
    """The names of one data set.

    Raises ConfigError for a name of ours that does not exist, or one of theirs that is given twice.
    """

    def __init__(self, mapping: Mapping[str, str] | None = None) -> None:
        """`mapping`: our name -> theirs."""
        self.mapping = dict(mapping or {})
        known = [*_COLUMNS, *_KEYS, *_ROLES]
        for ours, theirs in self.mapping.items():
            if not ours or not isinstance(theirs, str) or not theirs:
                raise ConfigError(
                    f"data.columns: {quoted(ours)} is {quoted(theirs)}; map our name to the data set's own name, as in "
                    "{prompt: query} or --column prompt=query"
                )
            if ours not in known:
                near = get_close_matches(str(ours), known, n=1, cutoff=0.5)
                hint = f"closest: {near[0]}" if near else f"known: {', '.join(dict.fromkeys(known))}"
                if theirs in known:
                    hint = f"our name comes first: {{{theirs}: {shown(ours, 40)}}}"
                raise ConfigError(f"data.columns: {quoted(ours)} is not one of our names; {hint}")
            if sum(name == theirs for name in self.mapping.values()) > 1:
                raise ConfigError(f"data.columns: {quoted(theirs)} stands for two of our names; keep one")
        self._taken = set(self.mapping.values())
        self._roles = {
            **{name: role for name, role in _SPEAKERS.items() if role not in self.mapping and name not in self._taken},
            **{theirs: ours for ours, theirs in self.mapping.items() if ours in _ROLES},
        }

    def name(self, ours: str) -> str | None:
        """Theirs for a name of ours; None where another one has taken it."""
        return self.mapping.get(ours, None if ours in self._taken else ours)

    def role(self, theirs: Any) -> str | None:
        """system, user, assistant, tool or function_call; None where it is none of them."""
        return self._roles.get(theirs) if isinstance(theirs, str) else None

    def known(self) -> set[str]:
        """Their names of all columns that a row can be made of, or that tell what it is."""
        return {name for ours in _COLUMNS if (name := self.name(ours)) is not None}

    def absent(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """(Ours, theirs) of every mapped column that is not among `names`; a key of messages is none."""
        columns = [pair for pair in self.mapping.items() if pair[0] in _COLUMNS and pair[0] not in _KEYS]
        return [(ours, theirs) for ours, theirs in columns if theirs not in names]

    def unread(self, used: Mapping[str, int]) -> list[str]:
        """Of the names in the map those that no row had; `used` are the keys that were read."""
        read = {name.rpartition("[].")[2] for name in used}
        names = {ours: shown(theirs, 60) for ours, theirs in self.mapping.items()}
        return [f"{name} ({ours})" for ours, name in names.items() if not {name, f"role {name}"} & read]


STANDARD = Columns()
"""Our own names."""


class Record:
    """A row's or a message's JSON object under its own names; what is read of it is noted."""

    def __init__(self, values: Mapping[str, Any], columns: Columns = STANDARD, inside: str = "") -> None:
        """`inside`: the list that holds the object, for the names in `used` and `left_out`."""
        self.columns = columns
        self.used: list[str] = []
        self._values = values
        self._read: set[str] = set()
        self._notes: list[str] = []
        self._inside = f"{inside}[]." if inside else ""

    def __contains__(self, ours: str) -> bool:
        """Whether the key is there, null or not."""
        return self.columns.name(ours) in self._values

    def get(self, ours: str) -> Any:
        """The value of a key, which counts as read; None where it is not there."""
        theirs = self.columns.name(ours)
        if theirs is None or theirs not in self._values:
            return None
        value = self._values[theirs]
        if theirs not in self._read:
            self._read.add(theirs)
            if not is_nothing(value):
                self.used.append(self._inside + shown(theirs, 60))
        return value

    def peek(self, ours: str) -> Any:
        """The value of a key, which does not count as read."""
        return self._values.get(self.columns.name(ours) or "")

    def note_role(self, theirs: str) -> None:
        """Notes a role that the map names."""
        if theirs in self.columns.mapping.values():
            self.used.append(f"{self._inside}role {shown(theirs, 60)}")

    def note_left_out(self, what: str) -> None:
        """Notes something of the object, beside whole keys, that is not used."""
        self._notes.append(self._inside + what)

    def name(self, ours: str) -> str:
        """Theirs, for messages about it."""
        return shown(self.columns.name(ours) or ours, 60)

    def names(self) -> list[str]:
        """All keys."""
        return [str(name) for name in self._values]

    def values(self) -> Mapping[str, Any]:
        """The object itself."""
        return self._values

    def left_out(self) -> Iterator[str]:
        """Keys that hold something and were not read, and what was noted."""
        yield from self._notes
        for name, value in self._values.items():
            if name not in self._read and not is_nothing(value):
                yield self._inside + told(name)


def told(name: str) -> str:
    """A column as a list names it; one without a name is told as ''."""
    return shown(name, 60) or "''"


def is_nothing(value: Any) -> bool:
    """Whether a value says nothing: null, or empty, as tables fill what a row does not have."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)
