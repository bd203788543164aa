"""A chat template of the user's own, `data.chat_template`: read from its file, and tried before anything is trained.

The run keeps the text, not the file: two runs are the same where it is the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from dude_peft.data.renderer import Conversation, RenderError, render, try_render
from dude_peft.doors import read_file
from dude_peft.errors import ConfigError
from dude_peft.show import shown

_LARGEST_BYTES = 64 * 1024
"""The run's configuration keeps the text, and a configuration has at most four times as much."""
_MARKS = ("{{", "{%")
_QUESTION, _ANSWER = "What does a template write?", "This answer."
_TURNS = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
_TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
_PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in _TURNS]
# A template may insist on a system message, on tools, or on contents that are lists, as those of models that read
# images: the rows tell whether they have what it wants.
_TRIALS: list[Conversation] = [
    (_TURNS, False, []),
    ([{"role": "system", "content": "Be brief."}, *_TURNS], False, []),
    (_PARTS, False, []),
    (_TURNS, False, [_TOOL]),
]
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def chat_template(given: str) -> str:
    """The text of a template, given as such or as the name of its file.

    Raises:
        ConfigError: a file that cannot be read, text that is no Jinja, or a template that writes nothing of a message.
        ResourceError: the process in which templates run cannot be started.
    """
    if any(mark in given for mark in _MARKS):
        text, where = given, "line "
        if len(text.encode("utf-8", "replace")) > _LARGEST_BYTES:
            raise ConfigError(f"a template of {len(text):,} characters; a run takes up to {_LARGEST_BYTES // 1024} KiB")
    else:
        text, where = _read(given), f"{shown(given, 300)}:"
    _check(text, where)
    return text


def _read(name: str) -> str:
    remedy = "give FILE.jinja, or the template's text"
    try:
        return read_file(name, _LARGEST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown(name, 300)}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{shown(name, 300)} cannot be read ({shown(reason, 200)}); {remedy}") from error


@lru_cache(16)
def _check(text: str, where: str) -> None:
    _parse(text, where)
    place = f"{where}1"
    try:
        written = try_render(text, _TOKENS, _TRIALS)
    except RenderError as error:
        raise ConfigError(f"{place}: the template cannot be used ({shown(error, 160)}); simplify it") from error
    made = [each for each in written if each is not None]
    if not made and (fault := _fault(text)):
        raise ConfigError(f"{place}: the template fails on a conversation ({shown(fault, 160)}); correct it")
    if made and not any(_QUESTION in each or _ANSWER in each for each in made):
        raise ConfigError(
            f"{place}: the template writes nothing of a conversation; it needs {{% for message in messages %}}, and "
            "{{ message.content }} in it"
        )


def _fault(text: str) -> str:
    """What went wrong with the last trial; empty where the template itself asked for other rows."""
    try:
        render(text, _TOKENS, _TRIALS[-1:])
    except RenderError as error:
        return "" if str(error).startswith("TemplateError:") else str(error)
    return ""


def _parse(text: str, where: str) -> None:
    """Raises ConfigError, which begins with `where` and the line, where the text is no Jinja."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, by which templates mark answers for transformers."""

        tags = {"generation"}  # noqa: RUF012  # as its parent has it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    try:
        environment.parse(text)  # compiling would compute constants, such as 9**9**9, which only the child may
    except TemplateSyntaxError as error:
        reason = shown(error.message or "no valid syntax", 200)
        raise ConfigError(f"{where}{error.lineno}: this is no valid Jinja ({reason}); correct it") from error
    except RecursionError as error:
        raise ConfigError(f"{where}1: the template is nested too deep; simplify it") from error
