"""What a row is, and the shapes of a JSON object (or a table's record) that become one.

    prompt, completion                       two strings, or two lists of messages as TRL has them
    messages                                 [{"role": "system" | "user" | "assistant" | "tool", "content": "..."}, ...]
    conversations                            [{"from": "system" | "human" | "gpt", "value": "..."}, ...], as ShareGPT
    instruction, [input], output             as Alpaca
    question, answer                         as GSM8K
    text                                     plain text, all of it trained

Preference data (`objectives.py`), of which two answers are judged against each other:

    prompt, chosen, rejected                 strings, or lists of messages; instruction or question in place of prompt
    chosen, rejected                         two whole conversations that share all messages before the answers
    prompt, completion, label                one answer; label is true where it is wanted, false where it is not

Beside all but text: `system`, the system message, and `tools`, what a model may call, both of the whole conversation;
beside pairs also `history`, [[question, answer], ...] before them, and `reasoning_content`, the thoughts before the
answer. `images`, paths of files, fill the places that messages keep for them, or stand before the first question. What
a message may have beside its text is in message.py.

Each row says by its keys which shape it has; what nobody reads is noted in `Row.left_out`, `text` beside a whole shape
among it, which tables often hold as the sum of the others. Two whole shapes in one row are refused: which of them is
trained would be a guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dude_peft.data.columns import IMAGES, PREFERENCE, STANDARD, Columns, Record, is_nothing
from dude_peft.data.message import (
    PASSAGE,
    TEXT,
    Message,
    image_of,
    json_text,
    read_message,
    reasoning,
    text_of,
    tools_text,
)
from dude_peft.data.objectives import PAIRED, Kind, objectives_for
from dude_peft.data.pairs import judged_apart, shared_beginning
from dude_peft.data.pictures import Picture, found
from dude_peft.data.suggest import closest, mapping_for, written
from dude_peft.errors import DataError
from dude_peft.show import quoted, shown

__all__ = ["PASSAGE", "TEXT", "Message", "Reading", "Row", "parse_row"]

FORMATS_HINT = (
    "use prompt + completion, messages, conversations, instruction + output, question + answer, or text, or name yours "
    "in data.columns"
)
LABELS_HINT = "use prompt + completion + label (true or false), or name yours in data.columns"
_MARK = "<image>"
"""What data sets of other tools write into a text where an image of the row stands."""
_ONE_TO_JUDGE = f"a label needs one question and one answer to judge; {LABELS_HINT}"
_LARGEST_MARGIN = 1e6
"""Far above the rewards that a model gives, far below where float32 loses their differences."""
PAIRS_HINT = "use prompt + chosen + rejected, or chosen + rejected as lists of messages, or name yours in data.columns"


@dataclass(frozen=True)
class Row:
    """A conversation whose LAST message is the assistant's answer, or one message of plain text.

    With `rejected` it is a pair: two such conversations that begin alike, of which this one is better.
    """

    messages: tuple[Message, ...]
    source: str
    """Where the row came from, as an error names it: `file.jsonl:12`."""
    shape: str = field(default="", compare=False)
    """The keys that it was made of: `prompt + completion`."""
    tools: str = ""
    """What the model may call, JSON text of a list; empty for nothing."""
    used: tuple[str, ...] = field(default=(), compare=False)
    """Columns, and keys of messages (`messages[].name`), that it was made of."""
    left_out: tuple[str, ...] = field(default=(), compare=False)
    """Those that nobody read."""
    rejected: tuple[Message, ...] = ()
    """Of a pair the worse conversation, as a whole."""
    label: bool | None = None
    """Of a labelled answer whether it is wanted; None for other rows."""
    margin: float | None = None
    """Of a pair to be scored, by how much the better score should be above the other; None where the row has none."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the answer; of a pair, those before both answers."""
        if self.rejected:
            return self.messages[: min(shared_beginning(self.messages, self.rejected), len(self.messages) - 1)]
        return self.messages[:-1]

    @property
    def sides(self) -> tuple[Row, ...]:
        """The conversations of a pair, the better one first; else the row itself."""
        if not self.rejected:
            return (self,)
        return tuple(replace(self, messages=messages, rejected=()) for messages in (self.messages, self.rejected))

    @property
    def answer(self) -> str:
        """The text of the last answer, or all of a plain text."""
        return self.messages[-1].content

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The images of all messages, in order."""
        return tuple(picture for message in self.messages for picture in message.pictures)

    @property
    def is_text(self) -> bool:
        """Whether the row is plain text, without a question and an answer."""
        return self.messages[-1].role in (TEXT, PASSAGE)

    @property
    def is_learned(self) -> bool:
        """Whether there is something to learn: plain text, or an answer that the data set does not exclude."""
        return self.is_text or any(self.messages[place].trained for place in self.answers)

    @property
    def answers(self) -> list[int]:
        """Places of the answers: what the assistant says once something was asked; a greeting before it is context."""
        return _answers(self.messages)


def _answers(messages: Sequence[Message]) -> list[int]:
    asked, places = False, []
    for place, message in enumerate(messages):
        if asked and message.role == "assistant":
            places.append(place)
        asked = asked or message.role in ("user", "tool")
    return places


class _Reader:
    """Reads one row: its record, and what was noted on the way."""

    def __init__(
        self, values: Mapping[str, Any], source: str, columns: Columns, questions: bool, folder: Path | None
    ) -> None:
        self.record = Record(values, columns)
        self.source = source
        self.questions = questions
        self.folder = folder
        self.columns = columns
        self.used: dict[str, None] = {}
        self.left_out: dict[str, None] = {}

    def text(self, ours: str, *, may_be_empty: bool = False) -> str:
        return text_of(self.record.get(ours), self.record.name(ours), self.source, may_be_empty=may_be_empty)

    def turns(self, ours: str, keys: str = "role and content") -> list[Message]:
        """The messages of a list."""
        values, name = self.record.get(ours), self.record.name(ours)
        if not isinstance(values, (list, tuple)):
            kind = "null" if values is None else type(values).__name__
            raise DataError(f"{self.source}: '{name}' is {kind}; write a list of objects with {keys}")
        return [self.message(value, name, place) for place, value in enumerate(values)]

    def message(self, value: Any, name: str, place: int) -> Message:
        record = Record(value if isinstance(value, Mapping) else {}, self.columns, name)
        how: dict[str, Any] = {"question": self.questions, "find": self.find}
        message = read_message(value, f"{name}[{place}]", self.source, record, **how)
        self.used |= dict.fromkeys(record.used)
        self.left_out |= dict.fromkeys(record.left_out())
        return message

    def find(self, name: str, where: str) -> Picture:
        picture = found(name, self.folder, where)
        if picture.animated:
            self.left_out["all but the first image of an animated file"] = None
        return picture

    def with_images(self, messages: list[Message]) -> list[Message]:
        """With the images of the row's own column where messages keep places for them, or before the first question."""
        ours = next((name for name in IMAGES if not is_nothing(self.record.peek(name))), None)
        images = [] if ours is None else self._images(ours)
        places = sum(not picture.is_found for message in messages for picture in message.pictures)
        if not places and not images:
            return messages
        if not places and not any(message.pictures for message in messages):
            if any(_MARK in message.content for message in messages):
                raise DataError(
                    f"{self.source}: {quoted(_MARK)} in a text is no place for an image; write the content as a list, "
                    'with {"type": "image"} where the image stands'
                )
            asked = next((place for place, each in enumerate(messages) if each.role == "user"), None)
            if asked is not None:
                messages = [*messages]
                messages[asked] = replace(messages[asked], pictures=tuple(images))
                return messages
        if places != len(images):
            named = "images" if ours is None else self.record.name(ours)
            raise DataError(
                f"{self.source}: '{named}' has {len(images)} images, and the messages keep {places} places for them; "
                'give each image one place, {"type": "image"}'
            )
        rest = iter(images)
        return [
            replace(
                message,
                pictures=tuple(each if each.is_found else replace(next(rest), at=each.at) for each in message.pictures),
            )
            for message in messages
        ]

    def _images(self, ours: str) -> list[Picture]:
        value, name = self.record.get(ours), self.record.name(ours)
        if isinstance(value, (list, tuple)):
            return [image_of(each, f"{name}[{place}]", self.source, self.find) for place, each in enumerate(value)]
        return [image_of(value, name, self.source, self.find)]

    def pair(self, question: str, answer: str) -> list[Message]:
        """A question and its answer, and what came before them."""
        prompt, completion = self.record.peek(question), self.record.peek(answer)
        if _is_list(prompt):  # TRL's rule: what stands in the prompt is never learned
            asked = [replace(each, trained=each.trained and each.role != "assistant") for each in self.turns(question)]
        else:
            asked = [Message("user", self.asked(question))]
        if _is_list(completion):
            answered = self.turns(answer)
        elif self.questions and (completion is None or not str(completion).strip()):
            answered = [Message("assistant", "")]
        else:
            answered = [self.answer(answer)]
        return [*self.history(), *asked, *answered]

    def asked(self, ours: str) -> str:
        prompt = self.text(ours)
        if ours != "instruction" or self.record.peek("input") is None:
            return prompt
        extra = self.text("input", may_be_empty=True)
        return f"{prompt}\n\n{extra}" if extra.strip() else prompt

    def answer(self, ours: str) -> Message:
        text, thoughts = self.text(ours), reasoning(self.record, "", self.source)
        more = json_text({"reasoning_content": thoughts}, ours, self.source) if thoughts else ""
        return Message("assistant", text, more)

    def history(self) -> list[Message]:
        value, name = self.record.get("history"), self.record.name("history")
        if is_nothing(value):
            return []
        if not isinstance(value, (list, tuple)):
            raise DataError(f"{self.source}: '{name}' is {type(value).__name__}; write [[question, answer], ...]")
        turns = []
        for place, pair in enumerate(value):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise DataError(f"{self.source}: {name}[{place}] is not a pair of texts; write [question, answer]")
            texts = [text_of(text, f"{name}[{place}][{i}]", self.source) for i, text in enumerate(pair)]
            turns += [Message("user", texts[0]), Message("assistant", texts[1])]
        return turns

    def plain(self) -> list[Message]:
        return [Message(TEXT, self.text("text"))]

    def finished(self, shape: _Shape) -> Row:
        messages, tools = self.with_images(shape.read(self)), ""
        if shape is not _PLAIN:
            self._check_turns(messages, shape.keys[0])
            messages = self._up_to_the_last_learned(self._with_system(messages), shape.keys[0])
            tools = self._tools()
        preference = {shown(name, 60) for name in PREFERENCE}
        rest = [f"{name} (preference data)" if name in preference else name for name in self.record.left_out()]
        if isinstance(label := self.record.peek("label"), bool):
            name = self.record.name("label")
            told = name if label else f"{name}: false, of an answer that is not wanted"
            rest = [f"{told} ({objectives_for('labels')} learns from it)" if each == name else each for each in rest]
        return Row(
            tuple(messages),
            self.source,
            " + ".join(self.record.name(key) for key in shape.keys),
            tools,
            (*self.record.used, *self.used),
            (*rest, *self.left_out),
        )

    def labelled(self, shape: _Shape) -> Row:
        """An answer and its label."""
        label, name = self.record.get("label"), self.record.name("label")
        if not isinstance(label, bool):
            value = "null" if label is None else quoted(label) if isinstance(label, str) else shown(label, 60)
            quotes = ", without quotes (a text table has no booleans: use .jsonl)" if isinstance(label, str) else ""
            raise DataError(
                f"{self.source}: '{name}' is {value}; write true for an answer that is wanted, false for one that is "
                f"not{quotes}"
            )
        row = self.finished(shape)
        return replace(row, label=label, shape=f"{row.shape} + {name}")

    def preferred(self, question: str | None, *, scored: bool = False) -> Row:
        """A pair; `question` is the column that asks, None where both conversations are whole.

        `scored` reads its margin, too.
        """
        asked = [] if question is None else self._asked_once(question)
        names = (self.record.name("chosen"), self.record.name("rejected"))
        first, second = (self._side(ours, asked, question) for ours in ("chosen", "rejected"))
        for messages, ours in ((first, "chosen"), (second, "rejected")):
            self._check_turns(messages, ours)
        chosen, rejected = judged_apart(self._with_system(first), self._with_system(second), self.source, names)
        keys = ("chosen", "rejected") if question is None else (question, "chosen", "rejected")
        margin = self._margin() if scored and "margin" in self.record else None
        keys = keys if margin is None else (*keys, "margin")
        return Row(
            chosen,
            self.source,
            " + ".join(self.record.name(key) for key in keys),
            self._tools(),
            (*self.record.used, *self.used),
            (*self.record.left_out(), *self.left_out),
            rejected,
            margin=margin,
        )

    def _margin(self) -> float | None:
        """By how much the better score should be above the other; null is none."""
        value, name = self.record.get("margin"), self.record.name("margin")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST_MARGIN:
            raise DataError(
                f"{self.source}: '{name}' is {quoted(value) if isinstance(value, str) else shown(value, 60)}; write a "
                f"number from -{_LARGEST_MARGIN:g} to {_LARGEST_MARGIN:g}, by which the chosen score should be higher"
            )
        return float(value)

    def _asked_once(self, question: str) -> list[Message]:
        if _is_list(self.record.peek(question)):
            return self.turns(question)
        return [*self.history(), Message("user", self.asked(question))]

    def _side(self, ours: str, asked: list[Message], question: str | None) -> list[Message]:
        """One of the two conversations, as a whole."""
        value, name = self.record.peek(ours), self.record.name(ours)
        if isinstance(value, Mapping):
            own = [self.message(self.record.get(ours), name, 0)]
        elif _is_list(value):
            own = self.turns(ours)
        elif question is None:
            raise DataError(
                f"{self.source}: '{name}' is no list of messages, and nothing asks; add a column prompt, or write both "
                "answers as whole conversations"
            )
        else:
            own = [Message("assistant", self.text(ours))]
        if not asked or own[0].role == "assistant":
            return [*asked, *own]
        if not any(each.role == asked[-1].role and each.content == asked[-1].content for each in own):
            raise DataError(
                f"{self.source}: '{name}' is a whole conversation without what '{self.record.name(question or '')}' "
                "asks; remove one of the two columns"
            )
        return own

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if is_nothing(self.record.peek("system")):
            return messages
        text = self.text("system", may_be_empty=True)
        if messages and messages[0].role == "system":
            if messages[0].content != text:
                name = self.record.name("system")
                raise DataError(f"{self.source}: '{name}' and the first message are two system messages; keep one")
            return messages
        return [Message("system", text), *messages]

    def _tools(self) -> str:
        names = ("tools", "functions")  # the second is OpenAI's older name
        found = {tools_text(self.record.get(name), self.record.name(name), self.source) for name in names} - {""}
        if len(found) > 1:
            raise DataError(f"{self.source}: 'tools' and 'functions' are two lists of tools; keep one")
        return found.pop() if found else ""

    def _check_turns(self, messages: list[Message], ours: str) -> None:
        name = self.record.name(ours)
        for place, message in enumerate(messages[1:], start=1):
            if message.role == "system":
                raise DataError(
                    f"{self.source}: {name}[{place}] is a system message; only the first message may be one"
                )
        if self.questions and messages and messages[-1].role != "assistant":
            messages.append(Message("assistant", ""))
        if not messages or messages[-1].role != "assistant":
            raise DataError(f"{self.source}: '{name}' has no answer: the last message must be the assistant's; add it")
        if not any(message.role in ("user", "tool") for message in messages):
            raise DataError(f"{self.source}: '{name}' has no user message before the answer; add it")

    def _up_to_the_last_learned(self, messages: list[Message], ours: str) -> list[Message]:
        """Without what follows the last answer that is learned, if one is: nothing of that reaches the loss."""
        if self.questions:
            return messages
        name = self.record.name(ours)
        learned = [place for place in _answers(messages) if messages[place].trained]
        if not learned:
            return messages
        if learned[-1] < len(messages) - 1:
            self.left_out[f"{shown(name, 60)}[] after the last answer that is learned"] = None
        return messages[: learned[-1] + 1]


@dataclass(frozen=True)
class _Shape:
    keys: tuple[str, ...]
    """Columns that it needs; the first one alone is a question."""
    read: Callable[[_Reader], list[Message]]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) for each in value)


_SHAPES = (
    _Shape(("prompt", "completion"), lambda reader: reader.pair("prompt", "completion")),
    _Shape(("messages",), lambda reader: reader.turns("messages")),
    _Shape(("conversations",), lambda reader: reader.turns("conversations", "from and value")),
    _Shape(("instruction", "output"), lambda reader: reader.pair("instruction", "output")),
    _Shape(("question", "answer"), lambda reader: reader.pair("question", "answer")),
)
_ASKING = ("prompt", "instruction", "question")
"""Columns that may ask what a pair answers."""
_PLAIN = _Shape(("text",), lambda reader: reader.plain())


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read."""

    columns: Columns = STANDARD
    """What it calls its columns."""
    questions: bool = False
    """Rows need no answer: they are asked, not learned."""
    kind: Kind = "answers"
    """What rows hold to learn."""
    folder: Path | None = None
    """Where the images of the rows are; None of rows that come from no local file."""
    streaming: bool = False
    """Data sets on the hub are read as they come, with no copy of them on this disk."""

    def row(self, record: Mapping[str, Any], source: str, unread: Sequence[str] = ()) -> Row:
        """The row that a decoded JSON object (or a data set's record) stands for.

        `unread` are names of columns that are not in the record because nobody reads them.

        Raises DataError, beginning with `source`, where the answer or the question is missing, empty or not text.
        """
        reader = _Reader(record, source, self.columns, self.questions, self.folder)
        if self.kind != "answers":
            self._refuse_images(reader.record, source)
        if self.kind in PAIRED:
            question = self._question_of_pair(reader.record, f"{source}:")
            row = reader.preferred(question, scored=self.kind == "scores")
        elif self.kind == "labels":
            row = reader.labelled(self._shape_with_label(reader.record, source))
        else:
            row = reader.finished(self._shape(reader.record, source))
        return replace(row, left_out=(*row.left_out, *unread)) if unread else row

    def _refuse_images(self, record: Record, source: str) -> None:
        """What is judged has no images; neither columns of them, nor parts of messages."""
        columns = [name for name in IMAGES if not is_nothing(record.peek(name))]
        lists = [value for value in record.values().values() if isinstance(value, (list, tuple))]
        turns = [turn for turn in itertools.chain.from_iterable(lists) if isinstance(turn, Mapping)]
        contents = [turn.get(record.columns.name("content") or "") for turn in turns]
        parts = itertools.chain.from_iterable(each for each in contents if isinstance(each, (list, tuple)))
        if columns or any(isinstance(part, Mapping) and part.get("type") != "text" for part in parts):
            raise DataError(
                f"{source}: the row has images, which train.objective: sft learns from; preferences are learned of "
                "text alone: remove them"
            )

    def check_columns(self, names: Sequence[str], where: str) -> None:
        """Raises DataError, beginning with `where`, where a table's columns hold no whole shape of a row."""
        record = Record(dict.fromkeys(names), self.columns)
        if self.kind in PAIRED:
            self._question_of_pair(record, where)
        elif self.kind == "labels":
            self._check_label(record, where)
        elif not self._whole(record) and "text" not in record:
            raise DataError(f"{where} {self._unknown(record, 'columns')}")

    def _question_of_pair(self, record: Record, where: str) -> str | None:
        """The column that asks what the two answers of a pair answer; None where there is none."""
        missing = [name for name in ("chosen", "rejected") if name not in record]
        if not missing:
            asking = [key for key in _ASKING if key in record]
            return next((key for key in asking if not is_nothing(record.peek(key))), next(iter(asking), None))
        if len(missing) == 1:
            there = record.name("rejected" if missing == ["chosen"] else "chosen")
            raise DataError(f"{where} '{there}' without '{record.name(missing[0])}'; {PAIRS_HINT}")
        if "label" in record and self._whole(record):
            raise DataError(
                f"{where} labelled answers, not pairs, which fit {objectives_for('labels')}; else {PAIRS_HINT}"
            )
        if self._whole(record) or "text" in record:
            raise DataError(
                f"{where} rows of answers, not of pairs, which fit {objectives_for('answers')}; else {PAIRS_HINT}"
            )
        listed = ", ".join(quoted(name) for name in record.names()[:6]) or "none"
        raise DataError(f"{where} no pair of answers in the columns ({listed}); {PAIRS_HINT}")

    def _check_label(self, record: Record, where: str) -> None:
        """Raises DataError where the columns hold no question, one answer and its label."""
        asks = [shape for shape in self._whole(record) if shape.keys[0] in _ASKING]
        if "label" in record and asks:
            return
        if all(name in record for name in ("chosen", "rejected")):
            raise DataError(f"{where} pairs of answers, which fit {objectives_for('pairs')}; else {LABELS_HINT}")
        if "label" in record and (self._whole(record) or "text" in record):
            raise DataError(f"{where} {_ONE_TO_JUDGE}")
        if asks or self._whole(record) or "text" in record:
            raise DataError(
                f"{where} rows of answers without '{record.name('label')}', which fit {objectives_for('answers')}; "
                f"else {LABELS_HINT}"
            )
        listed = ", ".join(quoted(name) for name in record.names()[:6]) or "none"
        raise DataError(f"{where} no labelled answer in the columns ({listed}); {LABELS_HINT}")

    def _shape_with_label(self, record: Record, source: str) -> _Shape:
        """The shape of a labelled row; DataError where a table's other columns hold what it says."""
        self._check_label(record, f"{source}:")
        shape = self._shape(record, source)
        if shape.keys[0] not in _ASKING:
            raise DataError(f"{source}: {_ONE_TO_JUDGE}")
        return shape

    def _shape(self, record: Record, source: str) -> _Shape:
        whole = self._whole(record)
        if len(whole) > 1:
            # A table joined from several files has every column in every row, null where it does not apply.
            whole = [shape for shape in whole if any(record.peek(key) is not None for key in shape.keys)] or whole[:1]
        if len(whole) > 1:  # what is mapped is meant
            mapped = self.columns.mapping
            whole = [shape for shape in whole if any(key in mapped for key in shape.keys)] or whole
        if len(whole) > 1:
            names = " and as ".join(" + ".join(record.name(key) for key in shape.keys) for shape in whole)
            raise DataError(f"{source}: the row can be read as {names}; keep the columns of one")
        if "text" in record and (not whole or all(record.peek(key) is None for key in whole[0].keys)):
            return _PLAIN
        if whole:
            return whole[0]
        raise DataError(f"{source}: {self._incomplete(record) or self._unknown(record, 'keys')}")

    def _whole(self, record: Record) -> list[_Shape]:
        whole = [shape for shape in _SHAPES if all(key in record for key in shape.keys)]
        return whole or [shape for shape in _SHAPES if self.questions and shape.keys[0] in record]

    def _incomplete(self, record: Record) -> str | None:
        """What is missing of the shape of which a part is there."""
        if any(key in record for key in PREFERENCE):
            return _preference(record)
        for shape in _SHAPES:
            missing = [key for key in shape.keys if key not in record]
            if not missing or len(missing) == len(shape.keys):
                continue
            there = next(record.name(key) for key in shape.keys if key in record)
            if self.columns.name(missing[0]) is None:  # another of ours has taken its name
                return f"'{missing[0]}' is mapped to another of our names; map {missing[0]} in data.columns, too"
            near = closest(record.name(missing[0]), [name for name in record.names() if name != there])
            known = {record.name(key) for key in shape.keys}
            meant = written({missing[0]: near}) if near and near not in known else None
            found = meant or mapping_for(record.names(), record.values())
            hint = f"closest: {found}" if found else FORMATS_HINT
            if not found and record.name(missing[0]) != missing[0]:
                hint = (
                    f"data.columns names it for {missing[0]}; the row has {', '.join(map(quoted, record.names()[:6]))}"
                )
            return f"'{there}' without '{record.name(missing[0])}'; {hint}"
        return None

    def _unknown(self, record: Record, kind: str) -> str:
        names = record.names()
        if any(key in record for key in PREFERENCE):
            return _preference(record)
        found = mapping_for(names, record.values())
        if absent := self.columns.absent(names):
            ours, theirs = absent[0]
            near = closest(theirs, names)
            meant = written({ours: near}) if near else found
            listed = ", ".join(quoted(name) for name in names[:6]) or "none"
            hint = f"closest: {meant}" if meant else f"name one of the data's own ({listed})"
            return f"no column is called {quoted(theirs)}, which data.columns names for {ours}; {hint}"
        listed = ", ".join(quoted(name) for name in names[:6]) or "none"
        if found is None:
            texts = [name for name, value in record.values().items() if value is None or isinstance(value, str)]
            example = written(dict(zip(("prompt", "completion"), texts, strict=False))) if len(texts) > 1 else None
            meant = f": if {quoted(texts[0])} asks and {quoted(texts[1])} answers, {example}" if example else ""
            found = FORMATS_HINT + meant
        else:
            found = f"closest: {found}"
        return f"no known format in the {kind} ({listed}); {found}"


def _preference(record: Record) -> str:
    there = [record.name(key) for key in PREFERENCE if key in record]
    chosen = record.peek("chosen")
    how = "messages" if isinstance(chosen, (list, tuple)) else "completion"
    return (
        f"{', '.join(there)}: preference data, which fit {objectives_for('pairs')} (dude data check and config new: "
        f"--objective dpo); to train on the chosen answers only, set {written({how: 'chosen'})}"
    )


_STANDARD = Reading()


def parse_row(row: Mapping[str, Any], source: str) -> Row:
    """`Reading.row` of a row with an answer, under our own names."""
    return _STANDARD.row(row, source)
