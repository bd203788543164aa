"""What time it is for chat templates, which may write today's date into every prompt (`strftime_now`).

One moment a call, so that no set of rows sees midnight; a run that goes on has the moment of its beginning. In a
process that lives on, neither stays for what comes next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

_CALL = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")
_moment: datetime | None = None


def now() -> str:
    """The present, in ISO format."""
    return datetime.now().replace(microsecond=0).isoformat()


def moment() -> str:
    """The moment, in ISO format; that of the first question where nobody set one."""
    global _moment
    _moment = _moment or datetime.fromisoformat(now())
    return _moment.isoformat()


@contextmanager
def at(text: str | None = None) -> Iterator[None]:
    """Within: this moment, or the present; after: what was before. ValueError where the text is none in ISO format."""
    global _moment
    before, _moment = _moment, datetime.fromisoformat(text or now())
    try:
        yield
    finally:
        _moment = before


def seen_by(template: str) -> list[str]:
    """What a chat template sees of the moment: all of it where the template does not tell; nothing for most."""
    if "strftime_now" not in template:
        return []
    calls = _CALL.findall(template)
    if len(calls) < template.count("strftime_now"):
        return [moment()]
    now = datetime.fromisoformat(moment())
    return [now.strftime(single or double) for single, double in calls]
