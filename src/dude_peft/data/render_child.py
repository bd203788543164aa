"""The process in which foreign chat templates run: conversations in, texts out, as JSON lines.

It holds no model and no more memory than it needs, and whoever started it ends it when a template takes too long. It
imports transformers' renderer without torch, so that it starts in half a second.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from types import SimpleNamespace
from typing import Any

_SPARE_BYTES = 2**30
_CHARACTERS, _TIMES = 2**20, 16
"""What a template may write: so many characters, and so many times what it was given."""
_LONGEST_SECONDS = 60


def main() -> None:
    """Answers requests from standard input until it ends.

    A request is {"template", "tokens", "now", "conversations": [[messages, add_generation_prompt, tools], ...],
    "continued"}; each conversation is answered by one line, {"text"} or {"fault"}.
    """
    from transformers.utils import chat_template_utils
    from transformers.utils.chat_template_utils import render_jinja_template

    clock: Any = chat_template_utils
    _limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        now = datetime.fromisoformat(request["now"])
        # Templates ask transformers' `strftime_now`, which asks this; there is no other way to tell it the time.
        clock.datetime = SimpleNamespace(now=lambda now=now: now)
        for messages, generate, tools in request["conversations"]:
            print(json.dumps(_answer(render_jinja_template, request, messages, generate, tools)), flush=True)


def _answer(
    render: Any, request: dict[str, Any], messages: list[dict[str, Any]], generate: bool, tools: list[Any]
) -> dict[str, str]:
    # Where the parent is gone, nobody else ends a template that hangs: the signal does, in the middle of anything.
    _alarm(_LONGEST_SECONDS)
    try:
        texts, _ = render(
            conversations=[messages],
            tools=tools or None,
            chat_template=request["template"],
            add_generation_prompt=generate,
            continue_final_message=request["continued"],
            **request["tokens"],
        )
        text = str(texts[0])
    except Exception as error:  # a template is a foreign program: beside jinja2's errors it raises any of Python's
        return {"fault": f"{type(error).__name__}: {str(error).strip()[:1000]}"}
    finally:
        _alarm(0)
    if len(text) > _CHARACTERS + _TIMES * len(json.dumps(messages)):
        return {"fault": f"it wrote {len(text):,} characters"}
    return {"text": text}


def _alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE_BYTES,) * 2)
    except (ImportError, OSError, ValueError):
        pass  # no such limit on this system; the limit on time remains
