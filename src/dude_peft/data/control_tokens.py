"""Control tokens, and texts of users that only spell them: <|im_start|> in a question is twelve characters, no token.

Users' texts pass through a template before they are tokenised, and then the two can no longer be told apart by looking.
Therefore what spells a control token is hidden first: in a row that does, its characters are replaced, one by one, by
characters of Unicode's private use that occur nowhere in that row. A template carries these like any others, and
whatever spells a control token in what it wrote is its own. For the tokenizer the text is again as it was, but the
template's tokens stand there in spellings that no text has (`respelt.py`).

Control tokens are the special ones, and of the other added tokens those that the chat template writes (<think>,
<tool_response>). The latter remain tokens in the assistant's own messages, which is where models write them, and so do
special ones of that kind: marks of thoughts and tool calls that the chat template writes.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dude_peft.data.formats import Message, Row
from dude_peft.data.respelt import respelt
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("text", "allow")
"""What a special token that a user's text spells is: text, or the token itself."""

Spans = Sequence[tuple[int, int]]
"""Where a text has control tokens that are meant."""

_PRIVATE = range(0xF0000, 0xFFFFE)
_MARKUP = re.compile(r"[^\w\s]\S*[^\w\s]")
_OWN = re.compile("think|thought|reason|tool_call", re.IGNORECASE)


@dataclass(frozen=True)
class Hidden:
    """A row in which the spellings of control tokens are hidden; texts keep their lengths."""

    row: Row
    token: str
    """One that it spells; empty where only its edges could, together with what a template writes beside them."""
    revealed: Mapping[int, int]

    def reveal(self, text: str) -> str:
        """A text of the row, or made of it, as it is without hiding."""
        return text.translate(self.revealed)


class ControlTokens:
    """Those of a tokenizer, which texts only spell; with special_tokens="allow" they become the tokens.

    Raises ConfigError for another word than `text` and `allow`.
    """

    def __init__(
        self, tokenizer: Any, special_tokens: str = "text", *, chat_template: str = "", ends: Collection[str] = ()
    ) -> None:
        """`chat_template` may write control tokens of its own; `ends` are those that no message may spell as tokens."""
        if special_tokens not in SPECIAL_TOKENS:
            raise ConfigError(f"special_tokens is {quoted(special_tokens)}; use {', '.join(SPECIAL_TOKENS)}")
        self._tokenizer = tokenizer
        self._ends_of_answers = ends
        # A tokenizer that never reads special tokens in a text needs no help.
        self.allowed = special_tokens == "allow" or bool(getattr(tokenizer, "split_special_tokens", False))
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        # One character is text: a newline that ends answers, the letter that pads where no token does.
        special = {name for name in special if len(name) > 1}
        # Words and white space can be added tokens too; these are no markup.
        markup = {token.content for token in added if _MARKUP.fullmatch(token.content)}
        declared = set(getattr(tokenizer, "chat_control_tokens", None) or ())
        written = {name for name in special | markup if name in chat_template or name in declared}
        self._names = special | written
        own = {name for name in special & written if _OWN.search(name)}
        self._special, self._any = _pattern(special - own), _pattern(self._names)
        self._beginnings = {name[:n] for name in self._names for n in range(1, len(name))}
        self._ends = {name[n:] for name in self._names for n in range(1, len(name))}
        self._longest = max(map(len, self._names), default=0)

    def __contains__(self, token: str) -> bool:
        """Whether it is one that texts cannot spell."""
        return not self.allowed and token in self._names

    def spelt(self, row: Row) -> str:
        """The first control token that a row spells; empty for none."""
        found = (pattern.search(text) for text, pattern in self._texts(row))
        return next((match.group() for match in found if match), "")

    def hide(self, row: Row) -> Hidden | None:
        """The row with its spellings hidden; None where there is nothing to hide."""
        if self.allowed:
            return None
        texts = list(self._texts(row))
        if not any(pattern.search(text) or any(self._edges(text.strip())) for text, pattern in texts):
            return None
        taken = set[str]().union(*(text for text, _ in texts))
        real = sorted({ord(character) for name in self._names for character in name})
        table = dict(zip(real, (code for code in _PRIVATE if chr(code) not in taken), strict=False))

        def concealed(text: str, pattern: re.Pattern[str]) -> str:
            text = pattern.sub(lambda match: match.group().translate(table), text)
            core = text.strip()
            head, tail = self._edges(core)
            middle = core[head : len(core) - tail]
            inner = core[:head].translate(table) + middle + core[len(core) - tail :].translate(table)
            return text.replace(core, inner, 1)

        changes: dict[str, Any] = {
            name: tuple(_changed(each, concealed, self._pattern_of(each.role)) for each in value)
            if name == "messages"
            else _changed(value, concealed, self._any)
            for name, value in _texts_of(row)
        }
        hidden = replace(row, **changes)
        return Hidden(hidden, self.spelt(row), {private: character for character, private in table.items()})

    def broken(self, row: Row) -> Row:
        """The row without a character that begins a special token: of these, nothing made of it can spell one."""
        taken = set[str]().union(*(text for text, _ in self._texts(row)))
        other = next(chr(code) for code in _PRIVATE if chr(code) not in taken)
        table = {ord(name[0]): other for name in self._names}
        changes: dict[str, Any] = {
            name: _changed(value, lambda text, _: text.translate(table), self._any) for name, value in _texts_of(row)
        }
        return replace(row, **changes)

    def specials(self, text: str) -> int:
        """How many special tokens a text spells."""
        return sum(1 for _ in self._special.finditer(text))

    def spans(self, text: str) -> Spans:
        """Where a text spells control tokens: in what a template made of a hidden row, those that are meant."""
        return [match.span() for match in self._any.finditer(text)]

    def ids(self, text: str, meant: Spans, where: str, *, framed: bool = False) -> list[int]:
        """Token ids of a text with control tokens at the places `meant`, and nowhere else.

        `framed` adds what the tokenizer puts around a text. Raises DataError, beginning with `where`, where this
        tokenizer has no other way to write a spelt token than the token.
        """
        ordinary = list(self._tokenizer(text, add_special_tokens=framed, verbose=False)["input_ids"])
        if self.allowed or (self.spans(text) == list(meant) and self.heard(text, ordinary, framed=framed)):
            return ordinary
        found = self.apart(text, meant, framed=framed)
        if found is None or found.count(self._tokenizer.unk_token_id) > ordinary.count(self._tokenizer.unk_token_id):
            raise self._unwritable(text, meant, where)
        return found

    def apart(self, text: str, meant: Spans, *, framed: bool = False) -> list[int] | None:
        """The ids of the respelt tokenizer; None where there is none, or it does not find what is meant."""
        if self._respelt is None:
            return None
        parts, at = list[str](), 0
        for start, stop in meant:
            parts += [text[at:start], self._unheard[text[start:stop]]]
            at = stop
        encoded = self._respelt.encode("".join([*parts, text[at:]]), add_special_tokens=framed)
        ids: list[int] = encoded.ids
        expected = [self._tokenizer.convert_tokens_to_ids(text[start:stop]) for start, stop in meant]
        expected = [token for token in expected if token in self._control_ids]
        inner = [token for token, frame in zip(ids, encoded.special_tokens_mask, strict=True) if not frame]
        return ids if [token for token in inner if token in self._control_ids] == expected else None

    def heard(self, text: str, ids: Sequence[int], *, framed: bool = False) -> bool:
        """Whether the tokenizer found no control tokens but those that the text spells, letter by letter.

        A normalizer may make one of full-width letters, a vocabulary may have one as a word.
        """
        if self.allowed:
            return True
        count = sum(token in self._control_ids for token in ids) - (self._frame if framed else 0)
        return count <= 0 or count <= len(self.spans(text))

    def _unwritable(self, text: str, meant: Spans, where: str) -> DataError:
        spelt = [match.group() for match in self._any.finditer(text) if match.span() not in meant]
        ends = [token for token in spelt if token in self._ends_of_answers]
        token = next(iter(ends or spelt), "")
        allowing = "" if ends else ", or set special_tokens to allow, which reads it as that token"
        return DataError(
            f"{where}: the text contains the special token {quoted(token)}, which this tokenizer cannot encode as "
            f"plain text; remove it{allowing}"
        )

    @cached_property
    def _control_ids(self) -> set[int]:
        ids = {self._tokenizer.convert_tokens_to_ids(name) for name in self._names}
        return ids - {self._tokenizer.unk_token_id}  # which any unknown character becomes

    @cached_property
    def _frame(self) -> int:
        return sum(token in self._control_ids for token in self._tokenizer("")["input_ids"])

    @cached_property
    def _unheard(self) -> dict[str, str]:
        """A spelling of each control token that no text has."""
        secret = secrets.token_hex(16)
        # Their first and last characters remain: some tokens are only found between spaces, or beside certain others.
        return {name: f"{name[0]}{secret}-{number}{name[-1]}" for number, name in enumerate(sorted(self._names))}

    @cached_property
    def _respelt(self) -> Tokenizer | None:
        return respelt(self._tokenizer.backend_tokenizer, self._unheard) if self._tokenizer.is_fast else None

    def _texts(self, row: Row) -> Iterator[tuple[str, re.Pattern[str]]]:
        """All that the row says, and what is a control token in it."""
        for name, value in _texts_of(row):
            for each in value if name == "messages" else (value,):
                pattern = self._pattern_of(each.role) if name == "messages" else self._any
                for text in _strings(each):
                    yield text, pattern

    def _pattern_of(self, role: str) -> re.Pattern[str]:
        return self._special if role == "assistant" else self._any

    def _edges(self, text: str) -> tuple[int, int]:
        """How many characters at either end could be a part of a control token, completed by what stands beside it."""
        lengths = range(min(self._longest - 1, len(text)), 0, -1)
        head = next((n for n in lengths if text[:n] in self._ends), 0)
        tail = next((n for n in lengths if text[len(text) - n :] in self._beginnings), 0)
        return head, min(tail, len(text) - head)


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest name at the first place, as tokenizers do; nothing where there are no names."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _texts_of(row: Row) -> Iterator[tuple[str, Any]]:
    yield "messages", row.messages
    yield "tools", _Json(row.tools)


class _Json(str):
    """JSON text, of which the strings in it are what is said."""


def _strings(value: Any) -> Iterator[str]:
    """All strings in a message or another part of a row; a role is a word of ours."""
    if isinstance(value, _Json):
        yield from _strings(json.loads(value) if value else ())
    elif isinstance(value, Message):
        yield value.content
        yield from _strings(value.fields)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from (*_strings(key), *_strings(each))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _strings(each)


def _changed(value: Any, change: Callable[[str, re.Pattern[str]], str], pattern: re.Pattern[str]) -> Any:
    """The same with all strings changed."""
    if isinstance(value, _Json):
        return _dumped(_changed(json.loads(value), change, pattern)) if value else ""
    if isinstance(value, Message):
        # The names of the fields are ours.
        fields = {name: _changed(each, change, pattern) for name, each in value.fields.items()}
        return replace(value, content=change(value.content, pattern), more=_dumped(fields) if fields else "")
    if isinstance(value, str):
        return change(value, pattern)
    if isinstance(value, Mapping):
        return {change(key, pattern): _changed(each, change, pattern) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_changed(each, change, pattern) for each in value)
    return value


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
