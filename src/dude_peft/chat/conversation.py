"""A conversation as the model sees it: written by the template of training, never longer than the model reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dude_peft.data import Message, Row, Template, parse_row, prompt_ids
from dude_peft.data.encode import check_ids
from dude_peft.errors import DataError
from dude_peft.show import quoted

_SOURCE = "this chat"


@dataclass
class Conversation:
    """What was said, and how it becomes token ids."""

    template: Template
    tokenizer: Any
    positions: int | None
    """Tokens that the model reads at most."""
    vocabulary: int | None = None
    """Rows of its embedding; None to check nothing."""
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    """User and assistant in turn; the last one is the user's until it has an answer."""

    def ask(self, text: str) -> None:
        """Add what the user says, in place of a question that got no answer.

        Raises:
            DataError: it is no text that a model can be asked.
        """
        asked = parse_row({"prompt": text, "completion": "."}, _SOURCE).prompt
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()
        self.turns.extend(asked)

    def answer(self, text: str) -> None:
        """Add the model's answer, if there is a word in it."""
        if text:
            self.turns.append(Message("assistant", text))

    def take_back(self) -> str | None:
        """Remove the last question with its answer, and return it; None where there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn.role == "user":
                return turn.content
        return None

    def prompt(self, max_new_tokens: int) -> tuple[list[int], int]:
        """Token ids that the next answer starts from, and how many old turns had to be dropped for them.

        A quarter of the positions, or `max_new_tokens` if that is less, is kept free for the answer.

        Raises:
            DataError: the last message alone is too long, or has a token that the model does not.
            ConfigError: the chat template fails, for example at a system message.
        """
        kept = list(self.turns)
        ids = self._ids(kept)
        if self.positions is not None:
            room = self.positions - min(max_new_tokens, self.positions // 4)
            while len(ids) > room and len(kept) > 1:
                del kept[:2]
                ids = self._ids(kept)
            if len(ids) >= self.positions:
                raise DataError(
                    f"{_SOURCE}: the message takes {len(ids)} tokens with its template, but the model can read only "
                    f"{self.positions}; shorten it"
                )
        dropped = len(self.turns) - len(kept)
        self.turns = kept
        return ids, dropped

    def changes(self) -> list[str]:
        """What of the conversation the template does not write as it is, and whether it spells special tokens."""
        (pieces,) = self.template.changes([self._row(self.turns)])
        changes = [f"the template does not write {what}" for what in pieces.unwritten]
        if pieces.spelt and self.template.special_tokens == "text":
            changes.append(f"{quoted(pieces.spelt)} is plain text here, not a special token")
        return changes

    def _row(self, turns: list[Message]) -> Row:
        system = [Message("system", self.system)] if self.system else []
        return Row((*system, *turns, Message("assistant", "")), _SOURCE)

    def _ids(self, turns: list[Message]) -> list[int]:
        row = self._row(turns)
        ids = prompt_ids(row, self.template, self.tokenizer)
        check_ids(_SOURCE, ids, self.tokenizer, self.vocabulary)
        return ids
