"""What to do next, as commands that a shell takes as they stand."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dude_peft.doors import named_folder
from dude_peft.show import shown
from dude_peft.terminal.display import Display


def tell_next(display: Display, *commands: Sequence[str]) -> None:
    """Prints commands, each given as the words behind `dude`; nothing where there are none."""
    if commands:
        display.say("next:")
    for words in commands:
        display.say(f"  dude {' '.join(map(word, words))}")


def beside(folder: str | Path, ending: str) -> str:
    """A name that lies beside a folder, however the folder was written: `.`, `..` and `runs/` begin no name."""
    return f"{Path(named_folder(folder))}{ending}"


def word(text: str) -> str:
    """A word of a command, quoted where a shell wants it; what a terminal would obey is escaped as shells escape it."""
    if text.isprintable():
        return shlex.quote(text)
    inner = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{shown(inner, None)}'"
