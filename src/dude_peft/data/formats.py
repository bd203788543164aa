"""What a row is, and the shapes of a JSON object (or a table's record) that become one.

    prompt, completion                       two strings
    messages                                 [{"role": "system" | "user" | "assistant", "content": "..."}, ...]
    conversations                            [{"from": "system" | "human" | "gpt", "value": "..."}, ...], as ShareGPT
    instruction, [input], output             as Alpaca
    question, answer                         as GSM8K
    text                                     plain text, all of it trained

Each row says by its keys which shape it has; other columns beside a whole shape are ignored, `text` among them, which
tables often hold as the sum of the others. Two whole shapes in one row are refused: which of them is trained would be a
guess.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dude_peft.errors import DataError
from dude_peft.show import quoted

ROLES = ("system", "user", "assistant")
FORMATS_HINT = "use prompt + completion, messages, conversations, instruction + output, question + answer, or text"
TEXT = "text"
"""Role of the one message of a row of plain text."""
PASSAGE = "passage"
"""Role of a piece of a longer text: no end token follows it."""

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """A conversation whose LAST message is the assistant's answer, or one message of plain text."""

    messages: tuple[Message, ...]
    source: str
    """Where the row came from, as an error names it: `file.jsonl:12`."""
    shape: str = field(default="", compare=False)
    """The keys that it was made of: `prompt + completion`."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last answer, or all of a plain text."""
        return self.messages[-1].content

    @property
    def is_text(self) -> bool:
        """Whether the row is plain text, without a question and an answer."""
        return self.messages[-1].role in (TEXT, PASSAGE)


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


def _plain_text(row: Mapping[str, Any], source: str) -> tuple[Message, ...]:
    return (Message(TEXT, _text(row["text"], "text", source)),)


def _message(value: Any, key: str, source: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{source}: {key} is {type(value).__name__}; write an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        raise DataError(f"{source}: {key}.role is {_named(role)}; use system, user or assistant")
    if value.get("tool_calls") or value.get("function_call"):
        raise DataError(f"{source}: {key} calls a tool, which cannot be trained here; remove the row")
    content = _text(value.get("content"), f"{key}.content", source, may_be_empty=role == "system")
    return Message(role, content)


def _spoken(value: Any, key: str, source: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{source}: {key} is {type(value).__name__}; write an object with from and value")
    if "from" not in value and "role" in value:
        return _message(value, key, source)
    speaker = value.get("from")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{source}: {key}.from is {_named(speaker)}; use system, human or gpt")
    return Message(role, _text(value.get("value"), f"{key}.value", source, may_be_empty=role == "system"))


def _named(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else "missing" if value is None else type(value).__name__


def _messages(row: Mapping[str, Any], source: str) -> tuple[Message, ...]:
    return _conversation(row, "messages", "role and content", _message, source)


def _sharegpt(row: Mapping[str, Any], source: str) -> tuple[Message, ...]:
    return _conversation(row, "conversations", "from and value", _spoken, source)


def _conversation(
    row: Mapping[str, Any], column: str, keys: str, read: Callable[[Any, str, str], Message], source: str
) -> tuple[Message, ...]:
    values = row[column]
    if not isinstance(values, (list, tuple)):
        kind = "null" if values is None else type(values).__name__
        raise DataError(f"{source}: '{column}' is {kind}; write a list of objects with {keys}")
    messages = tuple(read(value, f"{column}[{i}]", source) for i, value in enumerate(values))
    for i, message in enumerate(messages[1:], start=1):
        if message.role == "system":
            raise DataError(f"{source}: {column}[{i}] is a system message; only the first one may be")
    if not messages or messages[-1].role != "assistant":
        raise DataError(f"{source}: '{column}' has no answer: its last message must be the assistant's; add it")
    if len(messages) < 2 or messages[-2].role != "user":
        raise DataError(f"{source}: '{column}' has no user message right before the answer; add it")
    return messages


_FORMATS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], tuple[Message, ...]]], ...] = (
    (("prompt", "completion"), _prompt_completion),
    (("messages",), _messages),
    (("conversations",), _sharegpt),
    (("instruction", "output"), _alpaca),
    (("question", "answer"), _question_answer),
)


_PLAIN = (("text",), _plain_text)


def known_columns() -> set[str]:
    """The names of all columns that a row can be made of."""
    return {"input", "text", *(key for keys, _ in _FORMATS for key in keys)}


def check_columns(names: Sequence[str], where: str) -> None:
    """Raises DataError, beginning with `where`, where a table's columns hold no whole shape of a row."""
    if not any(all(key in names for key in keys) for keys, _ in (*_FORMATS, _PLAIN)):
        raise DataError(f"{where} no known format in the columns ({_listed(names)}); {FORMATS_HINT}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(quoted(name) for name in names[:6]) or "none"


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
    if "text" in row and (not whole or all(row[key] is None for key in whole[0][0])):
        whole = [_PLAIN]
    if whole:
        keys, read = whole[0]
        return Row(read(row, source), source, " + ".join(keys))
    for keys, _ in _FORMATS:
        missing = [key for key in keys if key not in row]
        if len(missing) < len(keys):
            there = next(key for key in keys if key in row)
            raise DataError(f"{source}: '{there}' without '{missing[0]}'; {FORMATS_HINT}")
    raise DataError(f"{source}: no known format in the keys ({_listed(list(row))}); {FORMATS_HINT}")
