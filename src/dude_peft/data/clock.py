"""What time it is for chat templates, which may write today's date into every prompt (`strftime_now`).

One moment a process, so that no set of rows sees midnight; a run that goes on has the moment of its beginning.
"""

from __future__ import annotations

import re
from datetime import datetime

_CALL = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")
_moment: datetime | None = None


def moment() -> str:
    """The moment, in ISO format; that of the first question where nobody set one."""
    global _moment
    _moment = _moment or datetime.now().replace(microsecond=0)
    return _moment.isoformat()


def set_moment(text: str) -> None:
    """Raises ValueError where the text is no moment in ISO format."""
    global _moment
    _moment = datetime.fromisoformat(text)


def seen_by(template: str) -> list[str]:
    """What a chat template sees of the moment: all of it where the template does not tell; nothing for most."""
    if "strftime_now" not in template:
        return []
    calls = _CALL.findall(template)
    if len(calls) < template.count("strftime_now"):
        return [moment()]
    now = datetime.fromisoformat(moment())
    return [now.strftime(single or double) for single, double in calls]
