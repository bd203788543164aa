"""Runs templates, which are foreign programs, in a process of their own with limits on time and memory.

They are chat templates, and those of task files, which `dude eval` reads. A template may loop for hours or ask for
gigabytes in one expression; neither can be stopped in the same process. One child serves the whole process; it is
started at the first template and ends with its parent. The time is the processor's, so that a busy machine is no fault
of a template, and one for all that a template is ever asked: a few seconds, and a little more with each message. Many
slow answers cost no more than a single one that never comes; a template that has used it up is not asked again. The
templates of task files share one time: a file may have any number.
"""

from __future__ import annotations

import atexit
import json
import math
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from dude_peft.data.clock import moment
from dude_peft.errors import ResourceError
from dude_peft.line_child import LineChild

RENDER_SECONDS = 4.0
"""What a template may take in all, beside MESSAGE_SECONDS for each message; honest ones need far below one for each."""

MESSAGE_SECONDS = 0.005

_BYTES_PER_CONVERSATION = 64 * 2**10
_BYTES_PER_BYTE = 16
"""What a template may write: far more than one that adds a long system message, or tools, to each conversation."""

_MESSAGES_PER_REQUEST = 20_000

_OF_TASKS = "templates of task files"
_START_SECONDS = 120.0
_LOOK_SECONDS = 0.2
_LONGEST_SECONDS = 300.0
"""For one answer, by the clock: of a process that does not compute at all."""
_TOO_SLOW = "it takes too long"


Conversation = tuple[Sequence[Mapping[str, Any]], bool, Sequence[Any]]
"""Messages with role and content, whether the opening of an answer is added, and the tools."""


class RenderError(Exception):
    """A template failed, took too long or wanted too much memory; `str()` tells which, `index` at what conversation."""

    def __init__(self, reason: str, index: int) -> None:
        super().__init__(reason)
        self.index = index


class _Renderer:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: LineChild | None = None
        self._is_ready = False
        self._left: dict[str, float] = {}
        """Seconds that each chat template has left, and those of task files together."""

    def render(
        self, template: str, tokens: Mapping[str, Any], conversations: Sequence[Conversation], continued: bool = False
    ) -> list[dict[str, str]]:
        """{"text"} or {"fault"} of each conversation in order; RenderError where they take too much."""
        answers: list[dict[str, str]] = []
        for part in _parts(conversations):
            request = {
                "template": template,
                "tokens": dict(tokens),
                "conversations": part,
                "continued": continued,
                "now": moment(),
            }
            try:
                answers += self._ask(template, request, len(part), sum(len(said) for said, _, _ in part))
            except RenderError as error:
                raise RenderError(str(error), len(answers) + error.index) from error
        return answers

    def render_document(self, template: str, document: Mapping[str, Any]) -> dict[str, str]:
        """The same of a task's document; of values that JSON has not, as dates, the template sees the text."""
        return self._ask(_OF_TASKS, {"template": template, "document": dict(document)}, 1, 1)[0]

    def renew(self, whose: str) -> None:
        """All of the time again."""
        self._left.pop(whose, None)

    def _ask(self, whose: str, request: Mapping[str, Any], count: int, messages: int) -> list[dict[str, str]]:
        """`count` answers to a request of `messages` messages; the time is that of `whose`."""
        data = json.dumps(request, default=str).encode("ascii") + b"\n"
        answers: list[dict[str, str]] = []
        with self._lock:
            left = self._left.get(whose, RENDER_SECONDS) + MESSAGE_SECONDS * messages
            if left <= 0:
                raise RenderError(_TOO_SLOW, 0)
            child = self._started()
            before = child.processor_seconds()
            room = 2**20 + _BYTES_PER_CONVERSATION * count + _BYTES_PER_BYTE * len(data)
            try:
                child.write(data)
                for _ in range(count):
                    line = _answer(child, before + left)
                    room -= len(line)
                    if room < 0:
                        raise RenderError("it writes far more text than it gets", len(answers))
                    answers.append(json.loads(line))
            except BaseException as error:
                left -= max(child.processor_seconds() - before, 0.0)
                self.stop()  # whatever it is doing, its next answer would be to an old question
                if isinstance(error, queue.Empty):
                    left = -math.inf
                    raise RenderError(_TOO_SLOW, len(answers)) from error
                if isinstance(error, OSError):
                    raise RenderError("its process died; does it need much memory?", len(answers)) from error
                raise
            else:
                left -= child.processor_seconds() - before
            finally:
                # What was not needed for these messages is none of the next ones'.
                self._left[whose] = min(left, RENDER_SECONDS)
        return answers

    def start_ahead(self) -> None:
        """Starts the child, and does not wait for it; one that does not start is an error where it is needed."""
        with self._lock, suppress(OSError):
            self._begun()

    def _started(self) -> LineChild:
        try:
            child = self._begun()
            if not self._is_ready:
                child.line(_START_SECONDS)
                self._is_ready = True
        except (OSError, queue.Empty) as error:
            self.stop()
            raise ResourceError("the process for templates does not start; use template: plain") from error
        return child

    def _begun(self) -> LineChild:
        if self._child is None or not self._child.lives:
            self.stop()
            self._child = LineChild("dude_peft.data.render_child")
        return self._child

    def stop(self) -> None:
        """Ends the child; the next `render` starts another."""
        child, self._child, self._is_ready = self._child, None, False
        if child is not None:
            child.stop()


def _answer(child: LineChild, until: float) -> bytes:
    """The next line. Raises queue.Empty where the child has computed until then without one."""
    end = time.monotonic() + _LONGEST_SECONDS
    while (left := until - child.processor_seconds()) > 0 and time.monotonic() < end:
        try:
            return child.line(max(left, _LOOK_SECONDS))
        except queue.Empty:
            continue  # it may have waited for the processor
    raise queue.Empty


def _parts(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    """Requests that fit into the child: a long conversation is asked for once up to each of its answers."""
    part: list[Conversation] = []
    messages = 0
    for conversation in conversations:
        if part and messages + len(conversation[0]) > _MESSAGES_PER_REQUEST:
            yield part
            part, messages = [], 0
        part.append(conversation)
        messages += len(conversation[0])
    if part:
        yield part


_RENDERER = _Renderer()
atexit.register(_RENDERER.stop)


def start_ahead() -> None:
    """Starts the process for templates while something else is loaded: it takes a second, mostly on another core."""
    _RENDERER.start_ahead()


def render(
    template: str, tokens: Mapping[str, Any], conversations: Sequence[Conversation], *, continued: bool = False
) -> list[str]:
    """The text that a chat template makes of each conversation.

    Args:
        template: the Jinja source.
        tokens: the tokenizer's special tokens, by the names that templates know.
        conversations: what is rendered, in one call to the child.
        continued: leave the last message open, for a model to go on with it.

    Raises:
        RenderError: the template failed, took longer than it may, wanted more than 1 GiB or wrote too much.
        ResourceError: no process can be started.
    """
    answers = _RENDERER.render(template, tokens, conversations, continued)
    for index, answer in enumerate(answers):
        if "fault" in answer:
            raise RenderError(answer["fault"], index)
    return [answer["text"] for answer in answers]


def render_document(template: str, document: Mapping[str, Any]) -> str:
    """The text that a template of a task file makes of a document.

    Raises:
        RenderError: it failed, all such templates together took longer than they may, or one wanted too much.
        ResourceError: no process can be started.
    """
    answer = _RENDERER.render_document(template, document)
    if "fault" in answer:
        raise RenderError(answer["fault"], 0)
    return answer["text"]


def renew_document_time() -> None:
    """The time of task files' templates begins anew, as a command does."""
    _RENDERER.renew(_OF_TASKS)


def try_render(template: str, tokens: Mapping[str, Any], conversations: Sequence[Conversation]) -> list[str | None]:
    """The same with None for a conversation at which the template fails; RenderError where one takes too much."""
    return [answer.get("text") for answer in _RENDERER.render(template, tokens, conversations)]
