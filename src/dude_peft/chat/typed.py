"""Lines from standard input: typed at a terminal, or out of a pipe."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator

from dude_peft.errors import DataError

_PROMPT = "> "


def is_typed() -> bool:
    """Whether a person sits at the other end."""
    return sys.stdin is not None and sys.stdin.isatty()


def typed_lines() -> Iterator[str]:
    """Lines with a prompt, editing and history, until Ctrl-D; Ctrl-C raises KeyboardInterrupt."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # input() uses it from here on
    while True:
        try:
            yield input(_PROMPT if sys.stdout.isatty() else "")
        except EOFError:
            print()
            return


def piped_lines() -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line that is not blank.

    Raises:
        DataError: it is not UTF-8.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        for number, line in enumerate(sys.stdin or (), start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"standard input: byte 0x{byte:02X} is not UTF-8 (Latin-1?); convert it first") from error
