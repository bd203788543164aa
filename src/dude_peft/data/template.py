"""From a row to text: the one place where prompts are written, for training, evaluation and generation alike.

A conversation becomes pieces, prompt and answer in turn: [prompt, answer, what leads to the next answer, answer, ...].
Each answer ends with the token that ends a turn, the last one also with the tokenizer's end token, so that a model
learns to stop. What stands before an answer is exactly what generation starts from. A chat template for which that is
not true of an earlier turn (Qwen3's drops the thoughts of all but the last answer), or which writes no end behind it,
leaves the row with one prompt and one answer, the last.

What a message says is text, also where it spells a special token (`control_tokens.py`).

The plain template, for models without a chat template (the system part only where there is one; turns repeat):

    ### System:
    {system}

    ### Question:
    {user}

    ### Answer:
    {assistant}<eos>
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dude_peft.data.control_tokens import ControlTokens, Hidden
from dude_peft.data.formats import PASSAGE, Message, Row
from dude_peft.data.renderer import Conversation, RenderError, render, try_render
from dude_peft.data.unwritten import ALTERED, CALLS, FIXED, altered, parts
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted, shown

KINDS = ("auto", "chat", "plain")

_HEADINGS = {
    "system": "### System:\n",
    "user": "### Question:\n",
    "assistant": "### Answer:\n",
    "tool": "### Tool:\n",
}
_OPENING = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])")
"""A mark that an answer may begin with, as <think>, which some templates write as the last of the prompt."""

_THOUGHTS = re.compile(r"([<\[]/?[^<>\[\]\s]{0,20}(?:think|thought|reason)[^<>\[\]\s]{0,20}[>\]])", re.IGNORECASE)
"""The marks of thoughts, which some templates set on lines of their own."""
_PROBE = "An answer that no template holds."

_Wanted = tuple[Row, tuple[Message, ...], bool]
"""The row that is concerned, messages of it, and whether the opening of an answer is added."""


@dataclass(frozen=True)
class Pieces:
    """A row as text; joined, the pieces are all of it."""

    texts: tuple[str, ...]
    """Prompt and answer in turn, ending with an answer; one piece, all trained, of plain text."""
    whole: bool = True
    """False where earlier answers cannot be told apart, so that only the last one is a piece."""
    learned: tuple[bool, ...] = (True,)
    """Of each answer: whether the row does not exclude it."""
    unwritten: tuple[str, ...] = ()
    """What of the row the template does not write."""
    hidden: Hidden | None = None
    """What the texts hide; None where they are as they will be tokenised."""
    spelt: str = ""
    """A special token that the row spells; empty for none."""

    @property
    def revealed(self) -> tuple[str, ...]:
        """The texts with nothing hidden."""
        return self.texts if self.hidden is None else tuple(map(self.hidden.reveal, self.texts))


class Template:
    """Writes rows as text by the tokenizer's chat template (`chat`), the plain one (`plain`), or `auto`, chat if there.

    Raises ConfigError for an unknown kind, a tokenizer without an end token, `chat` without a chat template, or another
    word for `special_tokens` than `text` and `allow`.
    """

    kind: str
    """`chat` or `plain`: what `auto` became."""
    special_tokens: str
    """What a special token in a message is: `text`, or the token itself (`allow`)."""
    closes: bool
    """Whether the last answer ends with the end token, where generation stops; else as the chat template writes it."""

    def __init__(
        self, tokenizer: Any, kind: str = "auto", special_tokens: str = "text", *, closes: bool = True
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"template is {quoted(kind)}; use {', '.join(KINDS)}")
        self._tokenizer = tokenizer
        self._name = quoted(getattr(tokenizer, "name_or_path", "") or "unnamed")
        if not tokenizer.eos_token:
            raise ConfigError(
                f"tokenizer {self._name} has no eos_token, so the model cannot learn where an answer ends; set one"
            )
        self._eos: str = tokenizer.eos_token
        has_chat = bool(tokenizer.chat_template)
        if kind == "chat" and not has_chat:
            raise ConfigError(
                f"tokenizer {self._name} has no chat template; use template: plain, or an instruct model's"
            )
        self.kind = kind if kind != "auto" else "chat" if has_chat else "plain"
        self._specials = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""})
        self.special_tokens = special_tokens
        self.closes = closes or self.kind == "plain"
        self._written: set[tuple[str, bool]] = set()  # of FIXED parts, without and with tools
        ControlTokens(tokenizer, special_tokens)  # a wrong word is told now

    def of_kind(self, kind: str) -> Template:
        """The template of rows that hold this to learn (`objectives.KINDS`): what is scored stays unclosed."""
        return self.unclosed() if kind == "scores" else self

    def unclosed(self) -> Template:
        """The same template, whose conversations are, to the last token, what the chat template writes."""
        return Template(self._tokenizer, self.kind, self.special_tokens, closes=False)

    @cached_property
    def control(self) -> ControlTokens:
        """The tokens that the template may write and messages may not. Raises what `source` raises."""
        ends = {self._eos, self.turn_end}
        return ControlTokens(self._tokenizer, self.special_tokens, chat_template=self.source, ends=ends)

    @cached_property
    def source(self) -> str:
        """The chat template itself, in Jinja; empty for `plain`.

        Raises ConfigError where the tokenizer has several and none is its default.
        """
        if self.kind == "plain":
            return ""
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError as error:
            raise ConfigError(
                f"tokenizer {self._name} has several chat templates and no default; use template: plain, or keep one"
            ) from error

    @cached_property
    def turn_end(self) -> str:
        """The token that the template writes behind an answer, as <|im_end|>; the end token where there is none."""
        if self.kind == "plain":
            return self._eos
        row = Row((Message("user", "q"), Message("assistant", "a")), "probe")
        try:
            prompt, whole = self._rendered([(row, row.prompt, True), (row, row.messages, False)])
        except ConfigError:
            return self._eos  # the first real row tells what is wrong
        rest, found = whole.removeprefix(prompt).rstrip(), self._eos
        while (token := self._special_at_end(rest)) and rest != token:
            rest, found = rest.removesuffix(token).rstrip(), token
        return found

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the chat template reads contents as lists of parts, and writes nothing of texts."""
        rows = [Row((Message("user", "q"), Message("assistant", text)), "probe") for text in (_PROBE, _PROBE[::-1])]
        said = [_conversation(row, row.messages, False) for row in rows]
        said.append(_conversation(rows[0], rows[0].messages, False, parts=True))
        try:
            one, other, listed = try_render(self.source, self._tokenizer.special_tokens_map, said)
        except RenderError:
            return False  # the first real row tells what is wrong
        # A template of texts may write a list as Python spells it.
        return one == other and listed is not None and _PROBE in listed and "'type'" not in listed

    @cached_property
    def _repeats(self) -> bool:
        """Whether the chat template writes an answer more than once."""
        row = Row((Message("user", "q"), Message("assistant", _PROBE)), "probe")
        return self._rendered([(row, row.messages, False)])[0].count(_PROBE) > 1

    def render(self, row: Row) -> tuple[str, str]:
        """(prompt, completion) of a row's last answer: generation starts from the prompt.

        Raises what `pieces` does.
        """
        *prompt, completion = self.pieces([row])[0].revealed
        return "".join(prompt), completion

    def prompt_text(self, row: Row) -> str:
        """The text that generation starts from: all messages but the last, and the opening of the answer."""
        return "".join(self.prompts([row])[0].revealed)

    def pieces(self, rows: Sequence[Row]) -> list[Pieces]:
        """Each row as prompts and answers.

        Raises ConfigError where the chat template fails, does not begin a conversation with its own prompt or leaves
        the answer out; DataError where it changes a message that spells a special token, or, where `special_tokens`
        allows these, where a message spells an end token.
        """
        made = self._pieces(rows, with_answer=True)
        return [_told(each, what) for each, what in zip(made, self.unwritten(rows), strict=True)]

    def judged(self, rows: Sequence[Row]) -> list[Pieces]:
        """The pieces of each conversation whose last answer is a model's own, which the template may write as it likes.

        Where it leaves out or changes answers, what it writes is all the same what is read. Raises what `pieces` does
        of everything else.
        """
        return self._pieces(rows, with_answer=True, judged=True)

    def prompts(self, rows: Sequence[Row]) -> list[Pieces]:
        """The pieces of each conversation before its last answer, which may be anything."""
        return self._pieces(rows, with_answer=False)

    def changes(self, rows: Sequence[Row]) -> list[Pieces]:
        """`prompts`, each with all of the row that is not written as it is. Raises what `pieces` does."""
        made, missing = self.prompts(rows), self.unwritten(rows, with_answer=False)
        return [_told(each, what) for each, what in zip(made, missing, strict=True)]

    def unwritten(self, rows: Sequence[Row], *, with_answer: bool = True) -> list[tuple[str, ...]]:
        """What of each row the template does not write: its text is the same without it.

        Raises ConfigError where that is a call of a tool, of which an answer consists.
        """
        wanted: list[tuple[int, str, Row]] = []
        for number, row in enumerate(rows):
            whole = row if with_answer or row.is_text else replace(row, messages=row.prompt)
            changed = [(what, each) for what, each in parts(whole) if (what, bool(row.tools)) not in self._written]
            if changed:
                wanted += [(number, what, each) for what, each in [("", whole), *changed]]
        texts = self._texts_of([row for _, _, row in wanted], generate=not with_answer)
        found: list[list[str]] = [[] for _ in rows]
        base: str | None = None
        for (number, what, _), text in zip(wanted, texts, strict=True):
            if not what:
                base = text
            elif text != base:
                if what in FIXED:
                    self._written.add((what, bool(rows[number].tools)))
            elif what == CALLS:
                raise ConfigError(
                    f"{rows[number].source}: the template does not write an answer's tool calls; use a model whose "
                    "chat template does, or remove the row"
                )
            else:
                found[number].append(what)
        return [tuple(each) for each in found]

    def _texts_of(self, rows: Sequence[Row], *, generate: bool) -> list[str | None]:
        """Each conversation as it stands; None where the chat template fails."""
        if self.kind == "plain":
            return ["".join(_HEADINGS[each.role] + each.content for each in row.messages) for row in rows]
        try:
            parts = bool(rows) and self._takes_parts
            conversations = [_conversation(row, row.messages, generate, parts=parts) for row in rows]
            return try_render(self.source, self._tokenizer.special_tokens_map, conversations) if rows else []
        except RenderError as error:
            raise self._failed(rows[error.index], error) from error

    def _pieces(self, rows: Sequence[Row], *, with_answer: bool, judged: bool = False) -> list[Pieces]:
        for row in rows:
            self._refuse_ends(row, row.messages if with_answer else row.prompt)
        veils = [self.control.hide(row) for row in rows]
        if self.kind == "chat":
            return self._by_chat_template(rows, veils, with_answer, judged)
        return [
            self._piece(row, veil, self._plain(row if veil is None else veil.row, with_answer))
            for row, veil in zip(rows, veils, strict=True)
        ]

    def _piece(self, row: Row, veil: Hidden | None, pieces: Pieces) -> Pieces:
        spelt = veil.token if veil is not None else self.control.spelt(row) if self.control.allowed else ""
        return replace(pieces, hidden=veil, spelt=spelt)

    def _by_chat_template(
        self, rows: Sequence[Row], veils: Sequence[Hidden | None], with_answer: bool, judged: bool
    ) -> list[Pieces]:
        """Rows with something hidden are rendered as they are, too: only where both agree is known what is whose."""
        asked = [each for row, veil in zip(rows, veils, strict=True) for each in (row, veil and veil.row) if each]
        wanted = [self._wanted(row, with_answer) for row in asked]
        texts = iter(self._rendered(list(itertools.chain.from_iterable(wanted))))
        written = iter([[next(texts) for _ in each] for each in wanted])
        made = []
        for row, veil in zip(rows, veils, strict=True):
            own = next(written)
            hidden = own if veil is None else next(written)
            if veil is not None and [veil.reveal(text) for text in hidden] != own:
                if veil.token:
                    raise DataError(
                        f"{row.source}: a message spells the special token {quoted(veil.token)}, and the chat template "
                        f"of {self._name} changes the message; remove it, or use template: plain"
                    )
                veil, hidden = None, own
            said = row if veil is None else veil.row
            if hidden:
                self._refuse_made(said, self._wanted(said, with_answer)[-1], hidden[-1])
            pieces = self._text(said) if row.is_text else self._chat(said, iter(hidden), with_answer, judged)
            changed = () if row.is_text else altered(self._wanted(row, with_answer)[-1][1], own[-1])
            made.append(replace(self._piece(row, veil, pieces), unwritten=changed))
        return made

    def _refuse_made(self, row: Row, wanted: _Wanted, text: str) -> None:
        """A template that takes something out of a message, or puts in, might make a token of what spelt none."""
        said = (segment.strip() for message in wanted[1] for segment in message.segments)
        if self.control.allowed or all(segment in text for segment in said):
            return
        broken = self.control.broken(row)
        if broken == row:
            return
        (other,) = self._rendered([(broken, broken.messages[: len(wanted[1])], wanted[2])])
        if self.control.specials(other) < self.control.specials(text):
            raise DataError(
                f"{row.source}: the chat template of {self._name} turns text of a message into a special token; "
                "remove the row, or use template: plain"
            )

    def _wanted(self, row: Row, with_answer: bool) -> list[_Wanted]:
        wanted: list[_Wanted] = []
        for place in row.answers:
            wanted.append((row, row.messages[:place], True))
            if with_answer or place < len(row.messages) - 1:
                wanted.append((row, row.messages[: place + 1], False))
        return wanted

    def _text(self, row: Row) -> Pieces:
        closed = row.messages[0].role == PASSAGE or row.answer.rstrip().endswith(self._eos)
        return Pieces((row.answer if closed else row.answer + self._eos,))

    def _plain(self, row: Row, with_answer: bool) -> Pieces:
        if row.is_text:
            return self._text(row)
        texts: list[str] = []
        prompt = ""
        answers = row.answers
        for place, message in enumerate(row.messages):
            prompt += _HEADINGS[message.role]
            if place in answers:
                texts += [prompt, message.content + self._eos]
                prompt = "\n\n"
            else:
                prompt += f"{message.content}\n\n"
        return Pieces(tuple(texts if with_answer else texts[:-1]), learned=_learned(row))

    def _chat(self, row: Row, texts: Iterator[str], with_answer: bool, judged: bool) -> Pieces:
        """Takes from `texts` what `_pieces` asked for: each answer's prompt, and the conversation up to that answer."""
        pieces: list[str] = []
        done, whole = "", True
        for place in row.answers:
            prompt = next(texts)
            whole = whole and prompt.startswith(done)
            pieces.append(prompt[len(done) :])
            if place < len(row.messages) - 1:
                head, end, _ = self._completion(row, place, prompt, next(texts), judged).partition(self.turn_end)
                whole = whole and bool(end)
                pieces.append(head + end)
                done = prompt + head + end
            elif with_answer:
                text = next(texts)
                pieces.append(self._ended(self._completion(row, place, prompt, text, judged)))
                if judged and not pieces[-1]:
                    return Pieces((text,), whole=False)
        if not whole:
            return Pieces((prompt, *pieces[-1:][:with_answer]), whole=False)
        return Pieces(tuple(pieces), learned=_learned(row))

    def _completion(self, row: Row, place: int, prompt: str, text: str, judged: bool) -> str:
        """What the template writes behind a prompt; of a judged answer empty where it changes what stands before."""
        content = row.messages[place].content
        opening = _OPENING.match(content)
        opened = opening is not None and prompt.rstrip().endswith(opening[1])
        said = content[opening.end() :] if opening is not None and opened else content
        written = text[len(prompt) :]
        kept = text.startswith(prompt) and (said.strip() in written or _compact(said) in _compact(written))
        if opened and not kept:
            # R1's templates take the thoughts from every answer; what generation would write is the answer itself.
            return said.removeprefix(prompt[len(prompt.rstrip()) :]) + self.turn_end
        if judged:
            return written if text.startswith(prompt) else ""
        if not text.startswith(prompt):
            raise ConfigError(
                f"{row.source}: the chat template of {self._name} does not begin the conversation with the prompt that "
                "generation would start from; use template: plain"
            )
        if not kept:
            raise ConfigError(
                f"{row.source}: the chat template of {self._name} leaves the answer out, or changes it; "
                "use template: plain"
            )
        if said.strip() and written.count(said.strip()) > 1 and self._repeats:
            raise ConfigError(
                f"{row.source}: the chat template of {self._name} writes the answer more than once; use template: plain"
            )
        return written

    def _rendered(self, wanted: Sequence[_Wanted]) -> list[str]:
        parts = bool(wanted) and self._takes_parts
        conversations = [_conversation(*each, parts=parts) for each in wanted]
        try:
            return render(self.source, self._tokenizer.special_tokens_map, conversations) if wanted else []
        except RenderError as error:
            raise self._failed(wanted[error.index][0], error) from error

    def _failed(self, row: Row, error: RenderError) -> ConfigError:
        return ConfigError(
            f"{row.source}: the chat template of {self._name} failed ({shown(error, 160)}); correct it, or use "
            "template: plain"
        )

    def _ended(self, completion: str) -> str:
        """The completion up to its end-of-turn token, closed by the end token that generation stops at.

        What templates write after the end-of-turn token (mostly a newline) would be generated by nobody.
        """
        if not self.closes:
            return completion
        stripped = completion.rstrip()
        if stripped.endswith(self._specials):
            completion = stripped
        return completion if completion.endswith(self._eos) else completion + self._eos

    def _special_at_end(self, text: str) -> str:
        return max((token for token in self._specials if text.endswith(token)), key=len, default="")

    def _refuse_ends(self, row: Row, messages: Sequence[Message]) -> None:
        # Where texts may spell tokens it would become the real one: an end in the middle, or two at the end.
        if end := next((end for end in self.ends_in(row, messages) if end not in self.control), ""):
            remedy = ", or set special_tokens to text" if self.special_tokens == "allow" else ""
            raise DataError(
                f"{row.source}: a message holds the tokenizer's end token {quoted(end)}; remove it from the text, "
                f"since the template adds it{remedy}"
            )

    def ends_in(self, row: Row, messages: Sequence[Message]) -> list[str]:
        """The end tokens that messages of a conversation spell; none in plain text, where they part documents."""
        texts = [text for each in messages for text in (each.content, each.more)] if not row.is_text else []
        return [end for end in {self._eos, self.turn_end} if any(end in text for text in texts)]


def _conversation(row: Row, messages: Sequence[Message], generate: bool, *, parts: bool = False) -> Conversation:
    """`parts`: every content is a list, as in conversations with images."""
    turns = [_turn(message, parts or bool(message.pictures)) for message in messages]
    return turns, generate, json.loads(row.tools) if row.tools else []


def _turn(message: Message, parts: bool) -> dict[str, Any]:
    turn = {**message.as_dict(), "content": message.parts() if parts else message.content}
    # gpt-oss's template knows the thoughts under this name; newer versions of transformers add it themselves.
    return {"thinking": turn["reasoning_content"], **turn} if "reasoning_content" in turn else turn


def _learned(row: Row) -> tuple[bool, ...]:
    return tuple(row.messages[place].trained for place in row.answers)


def _compact(text: str) -> str:
    """Without white space at the ends and around the marks of thoughts."""
    return "".join(part.strip() for part in _THOUGHTS.split(text))


def _told(pieces: Pieces, unwritten: tuple[str, ...]) -> Pieces:
    """With what the template does not write, beside what it changes; a part that is not there is not changed, too."""
    changed = (what for what in pieces.unwritten if what.removesuffix(ALTERED.format("")) not in unwritten)
    return replace(pieces, unwritten=(*unwritten, *changed))
