"""Prompts of the harness through the chat template: written in its process with limits, documents only ever as text.

The harness hands on a prompt as one string. Where control tokens in it are meant, rather than spelt by a document, is
therefore kept here, by that string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dude_peft.data import Message, Row
from dude_peft.data.control_tokens import ControlTokens, Spans
from dude_peft.data.renderer import Conversation, RenderError, render
from dude_peft.data.template import Template
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted, shown


class ChatPrompts:
    """What the chat template made of the harness's conversations, and what no template made."""

    def __init__(self, tokenizer: Any, special_tokens: str, name: str, *, chat: bool) -> None:
        """`chat`: whether a chat template is used at all, which is then among the control tokens' sources.

        Raises ConfigError where the tokenizer has several chat templates and no default.
        """
        self._source = Template(tokenizer, "chat").source if chat else ""
        self._tokens: Mapping[str, Any] = tokenizer.special_tokens_map
        self._name = name
        self.control = ControlTokens(tokenizer, special_tokens, chat_template=self._source)
        self._meant: dict[str, Spans] = {}

    def write(self, history: Sequence[Mapping[str, str]], *, generate: bool, arguments: Mapping[str, Any]) -> str:
        """A conversation as text, ready for an answer, or up to the end of its last message.

        Raises:
            ConfigError: the template fails, takes too long or writes nothing.
            DataError: it changes a text that spells a special token.
        """
        try:
            return self._written(history, generate, arguments)
        except RenderError as error:
            without = [message for message in history if message["role"] != "system"]
            if len(without) < len(history) and "TemplateError" in str(error):
                return self.write(without, generate=generate, arguments=arguments)  # as the harness does
            raise ConfigError(
                f"--chat: the chat template of {shown(self._name, 300)} failed ({shown(error, 160)}); leave --chat out"
            ) from error

    def meant(self, text: str, context: str) -> Spans:
        """Where a text has control tokens that are meant; it is a `context`, a part of one, or goes on behind it."""
        spans = self._meant.get(text, self._meant.get(context, ()))
        return [(start, stop) for start, stop in spans if stop <= len(text)]

    def _written(self, history: Sequence[Mapping[str, str]], generate: bool, arguments: Mapping[str, Any]) -> str:
        row = Row(tuple(Message(message["role"], message["content"]) for message in history), self._name)
        veil = self.control.hide(row)
        wanted = [list(history)]
        if veil is not None:
            contents = [message.content for message in veil.row.messages]
            wanted += [[{**one, "content": content} for one, content in zip(history, contents, strict=True)]]
        conversations: list[Conversation] = [(messages, generate, []) for messages in wanted]
        text, *hidden = render(self._source, {**self._tokens, **arguments}, conversations, continued=not generate)
        if not text:
            raise ConfigError(f"--chat: the chat template of {shown(self._name, 300)} gives no text; leave --chat out")
        marked = text
        if veil is not None and veil.reveal(hidden[0]) == text:
            marked = hidden[0]
        elif veil is not None and veil.token:
            raise DataError(
                f"--chat: a question spells the special token {quoted(veil.token)}, and the chat template of "
                f"{shown(self._name, 300)} changes its text; leave --chat out"
            )
        self._meant[text] = self.control.spans(marked)
        return text
