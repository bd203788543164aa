"""The process in which foreign templates run: conversations or documents in, texts out, as JSON lines.

It holds no model and no more memory than it needs, and whoever started it ends it when a template takes too long. It
imports transformers' renderer without torch, so that it starts in half a second.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

_SPARE_BYTES = 2**30
_CHARACTERS, _TIMES = 2**20, 16
"""What a template may write: so many characters, and so many times what it was given."""
_LONGEST_SECONDS = 60
_MOST_COMPILED = 64


def main() -> None:
    """Answers requests from standard input until it ends.

    A request is {"template", "tokens", "now", "conversations": [[messages, add_generation_prompt, tools], ...],
    "continued"}, or of a task file {"template", "document"}; each conversation, and the document, is answered
    by one line, {"text"} or {"fault"}.
    """
    from transformers.utils import chat_template_utils

    conversation = _conversations(chat_template_utils)
    document = _documents()
    _limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "document" in request:
            print(json.dumps(_answer(partial(document, **request), request["document"])), flush=True)
            continue
        for messages, generate, tools in request["conversations"]:
            answer = _answer(partial(conversation, request, messages, generate, tools), messages)
            print(json.dumps(answer), flush=True)


def _conversations(library: Any) -> Callable[..., str]:
    """Rendering by transformers."""

    def render(request: dict[str, Any], messages: list[dict[str, Any]], generate: bool, tools: list[Any]) -> str:
        now = datetime.fromisoformat(request["now"])
        # Templates ask transformers' `strftime_now`, which asks this; there is no other way to tell it the time.
        library.datetime = SimpleNamespace(now=lambda: now)
        texts, _ = library.render_jinja_template(
            conversations=[messages],
            tools=tools or None,
            chat_template=request["template"],
            add_generation_prompt=generate,
            continue_final_message=request["continued"],
            **request["tokens"],
        )
        return str(texts[0])

    return render


def _documents() -> Callable[[str, dict[str, Any]], str]:
    """lm-evaluation-harness's renderer, in a sandbox: its settings, and the one filter that it adds."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, new, count=0: re.sub(pattern, new, text, count=count)
    compiled = lru_cache(_MOST_COMPILED)(environment.from_string)
    return lambda template, document: compiled(template).render(**document)


def _answer(make: Callable[[], str], given: Any) -> dict[str, str]:
    """What `make` makes of what it was given."""
    # Where the parent is gone, nobody else ends a template that hangs: the signal does, in the middle of anything.
    _signal_after(_LONGEST_SECONDS)
    try:
        text = make()
    except Exception as error:  # a template is a foreign program: beside jinja2's errors it raises any of Python's
        return {"fault": f"{type(error).__name__}: {str(error).strip()[:1000]}"}
    finally:
        _signal_after(0)
    if len(text) > _CHARACTERS + _TIMES * len(json.dumps(given)):
        return {"fault": f"it wrote {len(text):,} characters"}
    return {"text": text}


def _signal_after(seconds: int) -> None:
    """Of the processor's time; 0 for never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE_BYTES,) * 2)
    except (ImportError, OSError, ValueError):
        pass  # no such limit on this system; the limit on time remains
