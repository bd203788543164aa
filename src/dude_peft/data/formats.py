"""What a row is, and the four shapes of a JSON object that become one.

    prompt, completion                       two strings
    messages                                 [{"role": "system" | "user" | "assistant", "content": "..."}, ...]
    instruction, [input], output             as Alpaca
    question, answer                         as GSM8K

Each row says by its keys which shape it has; other columns beside a whole shape are ignored. Two whole shapes in one
row are refused: which of them is trained would be a guess.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dude_peft.errors import DataError
from dude_peft.show import quoted

ROLES = ("system", "user", "assistant")
FORMATS_HINT = "use prompt + completion, messages, instruction + output, or question + answer"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """A conversation whose LAST message is the assistant's answer, the only part that is trained."""

    messages: tuple[Message, ...]
    source: str
    """Where the row came from, as an error names it: `file.jsonl:12`."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the answer to be learned."""
        return self.messages[-1].content


def _text(value: Any, key: str, source: str, *, may_be_empty: bool = False) -> str:
    if value is None:
        raise DataError(f"{source}: '{key}' is null; fill it in or remove the row")
    if not isinstance(value, str):
        raise DataError(f"{source}: '{key}' is {type(value).__name__}, not a string; write it as text")
    if not may_be_empty and not value.strip():
        raise DataError(f"{source}: '{key}' is empty; fill it in or remove the row")
    if "\0" in value:
        raise DataError(f"{source}: '{key}' holds a NUL character; remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: '{key}' holds half a surrogate pair at character {error.start}; repair the text's encoding"
        ) from error
    return value


def _prompt_completion(row: Mapping[str, Any], source: str) -> tuple[Message, ...]:
    prompt = _text(row["prompt"], "prompt", source)
    return Message("user", prompt), Message("assistant", _text(row["completion"], "completion", source))


def _question_answer(row: Mapping[str, Any], source: str) -> tuple[Message, ...]:
    question = _text(row["question"], "question", source)
    return Message("user", question), Message("assistant", _text(row["answer"], "answer", source))


def _alpaca(row: Mapping[str, Any], source: str) -> tuple[Message, ...]:
    prompt = _text(row["instruction"], "instruction", source)
    if row.get("input") is not None:
        extra = _text(row["input"], "input", source, may_be_empty=True)
        prompt = f"{prompt}\n\n{extra}" if extra.strip() else prompt
    return Message("user", prompt), Message("assistant", _text(row["output"], "output", source))


def _message(value: Any, key: str, source: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{source}: {key} is {type(value).__name__}; write an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        named = quoted(role) if isinstance(role, str) else "missing" if role is None else type(role).__name__
        raise DataError(f"{source}: {key}.role is {named}; use system, user or assistant")
    if value.get("tool_calls") or value.get("function_call"):
        raise DataError(f"{source}: {key} calls a tool, which cannot be trained here; remove the row")
    content = _text(value.get("content"), f"{key}.content", source, may_be_empty=role == "system")
    return Message(role, content)


def _messages(row: Mapping[str, Any], source: str) -> tuple[Message, ...]:
    values = row["messages"]
    if not isinstance(values, (list, tuple)):
        kind = "null" if values is None else type(values).__name__
        raise DataError(f"{source}: 'messages' is {kind}; write a list of objects with role and content")
    messages = tuple(_message(value, f"messages[{i}]", source) for i, value in enumerate(values))
    for i, message in enumerate(messages[1:], start=1):
        if message.role == "system":
            raise DataError(f"{source}: messages[{i}] is a system message; only the first one may be")
    if not messages or messages[-1].role != "assistant":
        raise DataError(f"{source}: 'messages' has no answer: its last message must be the assistant's; add it")
    if len(messages) < 2 or messages[-2].role != "user":
        raise DataError(f"{source}: 'messages' has no user message right before the answer; add it")
    return messages


_FORMATS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], tuple[Message, ...]]], ...] = (
    (("prompt", "completion"), _prompt_completion),
    (("messages",), _messages),
    (("instruction", "output"), _alpaca),
    (("question", "answer"), _question_answer),
)


def parse_row(row: Mapping[str, Any], source: str) -> Row:
    """The row that a decoded JSON object (or a data set's record) stands for.

    Raises DataError, beginning with `source`, where the answer or the question is missing, empty or not text.
    """
    whole = [(keys, read) for keys, read in _FORMATS if all(key in row for key in keys)]
    if len(whole) > 1:
        # A table joined from several files has every column in every row, null where it does not apply.
        whole = [(keys, read) for keys, read in whole if any(row[key] is not None for key in keys)] or whole[:1]
    if len(whole) > 1:
        names = " and as ".join(" + ".join(keys) for keys, _ in whole)
        raise DataError(f"{source}: the row can be read as {names}; keep the columns of one")
    if whole:
        return Row(whole[0][1](row, source), source)
    for keys, _ in _FORMATS:
        missing = [key for key in keys if key not in row]
        if len(missing) < len(keys):
            there = next(key for key in keys if key in row)
            raise DataError(f"{source}: '{there}' without '{missing[0]}'; {FORMATS_HINT}")
    names = ", ".join(quoted(key) for key in list(row)[:6]) or "none"
    raise DataError(f"{source}: no known format in the keys ({names}); {FORMATS_HINT}")
