"""A message of a conversation: who speaks, what is said, and what else a data set tells of it.

    role, content                 or ShareGPT's from, value; the roles are system, user, assistant and tool
    content                       text, or a list of parts: {"type": "text", "text"}, {"type": "image", "image": path}
    name, tool_call_id            as they are
    tool_calls                    [{"function": {"name", "arguments"}}, ...]; also function_call, OpenAI's or ShareGPT's
    reasoning_content             the thoughts before an answer; also thinking, reasoning
    weight, train, loss, ...      0 or false: the message is not learned (OpenAI; axolotl; ms-swift, LLaMA-Factory)

What stands beside role and content is for the chat template to write.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dude_peft.data.columns import REASONING, WEIGHTS, Record, is_nothing
from dude_peft.data.pictures import Picture, name_of, placed
from dude_peft.data.strict_json import DECODER
from dude_peft.data.suggest import mapping_for_turn
from dude_peft.doors import JsonError
from dude_peft.errors import DataError
from dude_peft.show import quoted

TEXT = "text"
"""Role of the one message of a row of plain text."""
PASSAGE = "passage"
"""Role of a piece of a longer text: no end token follows it."""

_NUL = re.compile(r"(?<!\\)(\\\\)*\\u0000")
_DETAIL = "train_detail"
_PARTS = '{"type": "text", "text": ...} or {"type": "image", "image": path}'

Find = Callable[[str, str], Picture]
"""The image that a path means, its place in words begins every error (`pictures.found`)."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    more: str = ""
    """What else a chat template may write of it, a JSON object: name, reasoning_content, tool_calls, tool_call_id."""
    trained: bool = True
    """False where the data set excludes it from the loss."""
    pictures: tuple[Picture, ...] = ()
    """Images that stand in the text, in order."""

    @property
    def fields(self) -> dict[str, Any]:
        """`more` as an object."""
        return json.loads(self.more) if self.more else {}

    @property
    def segments(self) -> list[str]:
        """The text, parted where images stand: one text more than there are images."""
        places = [0, *(picture.at for picture in self.pictures), len(self.content)]
        return [self.content[start:stop] for start, stop in itertools.pairwise(places)]

    def parts(self, *, named: bool = False) -> list[dict[str, str]]:
        """The content as a list of texts and images; `named` tells the images' paths."""
        found: list[dict[str, str]] = []
        for place, text in enumerate(self.segments):
            if place:
                found.append({"type": "image", **({"image": self.pictures[place - 1].name} if named else {})})
            if text:
                found.append({"type": "text", "text": text})
        return found

    @property
    def told(self) -> str:
        """The content for people to read, images by their paths."""
        return "".join(part.get("text") or f"[{part['image']}] " for part in self.parts(named=True)).rstrip()

    def as_dict(self) -> dict[str, Any]:
        """As rows have it, and chat templates take it; of images these get the place alone."""
        content = self.parts(named=True) if self.pictures else self.content
        return {"role": self.role, "content": content, **self.fields}


def text_of(value: Any, key: str, source: str, *, may_be_empty: bool = False) -> str:
    """`value`, if it is text that can be tokenised; DataError, beginning with `source`, that names the key if not."""
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


def read_message(
    value: Any, key: str, source: str, record: Record, *, question: bool = False, find: Find | None = None
) -> Message:
    """The message that `value` stands for; `record` is the object, of which what is read is noted.

    Args:
        value: what the list holds.
        key: its place, as `messages[3]`.
        source: of the row.
        record: `value` as a Record.
        question: an empty answer will do.
        find: finds images; None refuses them.

    Raises:
        DataError: a role or a value that cannot be used.
    """
    spoken = "role" not in record and ("from" in record or "value" in record)
    if not isinstance(value, Mapping):
        keys = "from and value" if key.startswith("conversations") else "role and content"
        raise DataError(f"{source}: {key} is {type(value).__name__}; write an object with {keys}")
    who, what = ("from", "value") if spoken else ("role", "content")
    theirs = record.get(who)
    role = record.columns.role(theirs)
    if role is None:
        known = "system, human, gpt, function_call or observation" if spoken else "system, user, assistant or tool"
        meant = mapping_for_turn(record.names()) if theirs is None else None
        hint = f"closest: {meant}" if meant else f"use {known}, or name yours in data.columns"
        raise DataError(f"{source}: {key}.{record.name(who)} is {_named(theirs)}; {hint}")
    record.note_role(theirs)
    more = _more(record, role, key, source)
    content = record.get(what)
    place = f"{key}.{record.name(what)}"
    if role == "function_call":
        more["tool_calls"] = _calls(_decoded(text_of(content, place, source), place, source), place, source)
        role, content = "assistant", ""
    if role != "assistant" and "tool_calls" in more:
        raise DataError(f"{source}: {key} has role {role} but calls a tool; only an assistant's message may do that")
    may_be_empty = role in ("system", "tool") or "tool_calls" in more or (question and role == "assistant")
    content = "" if content is None and may_be_empty and role != "system" else content
    pictures: tuple[Picture, ...] = ()
    if isinstance(content, (list, tuple)) and any(isinstance(part, Mapping) for part in content):
        content, pictures = placed(list(_parts(content, place, source, record, find)))
    if pictures and role == "assistant":
        raise DataError(f"{source}: {place} has an image, but answers are text; move it into the question")
    text = text_of(content, place, source, may_be_empty=may_be_empty or bool(pictures))
    trained = _is_trained(record, key, source)
    if trained and role != "assistant" and (flag := next((name for name in WEIGHTS if record.peek(name)), None)):
        record.note_left_out(f"{flag} of a message that is not an answer")
    return Message(role, text, json_text(more, key, source) if more else "", trained, pictures)


def _parts(values: Any, place: str, source: str, record: Record, find: Find | None) -> Iterator[str | Picture]:
    """Texts and images of a content that is a list."""
    for number, part in enumerate(values):
        key = f"{place}[{number}]"
        if not isinstance(part, Mapping):
            raise DataError(f"{source}: {key} is {type(part).__name__}; write {_PARTS}")
        there = {name: value for name, value in part.items() if value is not None and name != "type"}
        kind = part.get("type")
        if kind == "text":
            yield text_of(there.pop("text", None), f"{key}.text", source, may_be_empty=True)
        elif kind == "image":
            named = next((name for name in ("image", "path", "url") if name in there), None)
            yield Picture(0, "") if named is None else image_of(there.pop(named), f"{key}.{named}", source, find)
        else:
            told = "missing" if kind is None else quoted(kind)
            raise DataError(f"{source}: {key}.type is {told}, but messages hold texts and images; write {_PARTS}")
        for name in there:
            record.note_left_out(f"{record.name('content')}[].{quoted(name)}")


def image_of(value: Any, key: str, source: str, find: Find | None) -> Picture:
    """The image that a value of a row means; DataError, beginning with `source`, where there is none."""
    name = name_of(value)
    if name is None:
        kind = "null" if value is None else "bytes" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{source}: {key} is {kind}; save the image beside the data, and give its path")
    name = text_of(name, key, source)
    if find is None:
        raise DataError(f"{source}: {key}: images are no part of such rows; remove it")
    return find(name, f"{source}: {key}")


def _more(record: Record, role: str, key: str, source: str) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if not is_nothing(name := record.get("name")):
        more["name"] = text_of(name, f"{key}.{record.name('name')}", source)
    if role in ("assistant", "function_call") and (thoughts := reasoning(record, key, source)):
        more["reasoning_content"] = thoughts
    if not is_nothing(calls := record.get("tool_calls")):
        more["tool_calls"] = _calls(_decoded(calls, f"{key}.tool_calls", source), f"{key}.tool_calls", source)
    elif not is_nothing(call := record.get("function_call")):
        more["tool_calls"] = _calls([call], f"{key}.function_call", source)
    if not is_nothing(call_id := record.get("tool_call_id")):
        more["tool_call_id"] = text_of(call_id, f"{key}.tool_call_id", source)
    return more


def reasoning(record: Record, key: str, source: str) -> str:
    """The thoughts before an answer, under any of their names; DataError where two names have other ones."""
    found = {
        text_of(value, f"{key}.{name}".lstrip("."), source, may_be_empty=True)
        for name in REASONING
        if not is_nothing(value := record.get(name))
    }
    if len(found) > 1:
        raise DataError(f"{source}: {key or 'the row'} has two different texts of thoughts under two names; keep one")
    return found.pop() if found else ""


def _is_trained(record: Record, key: str, source: str) -> bool:
    trained = True
    for name in WEIGHTS:
        if (value := record.get(name)) is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"{source}: {key}.{name} is {quoted(value)}; write 1 or true to learn the message, 0 or false to skip "
                "it"
            )
        trained = trained and bool(value)
    if _DETAIL in record and not is_nothing(record.peek(_DETAIL)):
        raise DataError(
            f"{source}: {key}.{_DETAIL} excludes parts of a message, but only whole messages can be excluded; split it"
        )
    return trained


def _calls(value: Any, key: str, source: str) -> list[dict[str, Any]]:
    calls = value if isinstance(value, (list, tuple)) else [value]
    return [_call(call, f"{key}[{i}]" if len(calls) > 1 else key, source) for i, call in enumerate(calls)]


def _call(value: Any, key: str, source: str) -> dict[str, Any]:
    """A tool call as chat templates take it: the arguments an object, where OpenAI writes them as JSON text."""
    if not isinstance(value, Mapping):
        raise DataError(f"{source}: {key} is {type(value).__name__}; write an object with name and arguments")
    outer = {name: part for name, part in value.items() if part is not None}
    inner = outer.pop("function", None)
    if inner is None:
        inner = {name: outer.pop(name) for name in list(outer) if name not in ("id", "type", "index")}
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise DataError(f"{source}: {key} names no function; write an object with name and arguments")
    arguments = inner.get("arguments")
    arguments = {} if is_nothing(arguments) else _decoded(arguments, f"{key}.arguments", source)
    if not isinstance(arguments, Mapping):
        raise DataError(f"{source}: {key}.arguments is {type(arguments).__name__}; write an object")
    return {**outer, "type": "function", "function": {**inner, "arguments": dict(arguments)}}


def tools_text(value: Any, key: str, source: str) -> str:
    """The tools that a model may call, as JSON text of a list of schemas; empty where there are none."""
    tools = _decoded(value, key, source)
    if is_nothing(tools):
        return ""
    if not isinstance(tools, (list, tuple)):
        raise DataError(f"{source}: '{key}' is {type(tools).__name__}; write a list of tools, or JSON text of one")
    schemas = []
    for i, each in enumerate(tools):
        tool = _decoded(each, f"{key}[{i}]", source)
        if not isinstance(tool, Mapping):
            raise DataError(f"{source}: {key}[{i}] is {type(tool).__name__}; write an object with name and parameters")
        function = tool if (inner := tool.get("function")) is None else inner
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{source}: {key}[{i}] names no function; write an object with name and parameters")
        schemas.append(tool if function is inner else {"type": "function", "function": function})
    return json_text(schemas, key, source)


def _decoded(value: Any, key: str, source: str) -> Any:
    """`value`, or what it says where it is JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return DECODER.decode(value)
    except JsonError as error:
        raise DataError(f"{source}: '{key}': {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: '{key}' is text but not JSON; write an object, or valid JSON") from error


def json_text(value: Any, key: str, source: str) -> str:
    """`value` as JSON text that can be tokenised; DataError where it holds anything else."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{source}: '{key}' has a value that JSON cannot hold, or is nested too deep; write plain values"
        ) from error
    if _NUL.search(text):
        raise DataError(f"{source}: '{key}' holds a NUL character; remove it")
    return text_of(text, key, source)


def _named(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else "missing" if value is None else type(value).__name__
