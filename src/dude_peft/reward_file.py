"""A Python file with a reward of your own: what can be told of it without running it."""

from __future__ import annotations

import ast
import hashlib

from dude_peft.doors import read_file
from dude_peft.errors import ConfigError
from dude_peft.show import shown

_LARGEST_BYTES = 1 << 20


def sealed_file(file: str, function: str, sha256: str | None) -> dict[str, str]:
    """The hash of a reward's file, under the name that its section has for it.

    Args:
        file: its path.
        function: that it has to define or import.
        sha256: what its bytes have to be; None for whatever they are.

    Raises:
        ConfigError: it cannot be read, is no Python, is another file, or has no such function.
    """
    where = f"key 'train.grpo.rewards': {shown(file, 300)}"
    content = _content(file, where)
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and sha256 != found:
        raise ConfigError(
            f"{where} is not the file that was meant: its sha256 is {found[:12]}, not {sha256[:12]}; restore it, or "
            "leave sha256 out"
        )
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        place = f" at line {line}" if line else ""
        raise ConfigError(f"{where} is no Python{place} ({shown(getattr(error, 'msg', error), 120)})") from error
    names = _names(tree)
    if function not in names:
        known = ", ".join(shown(name, 40) for name in names[:6]) or "none"
        raise ConfigError(f"{where} has no function {function!r}; it has {known}")
    return {"sha256": found}


def source_of(file: str, sha256: str) -> str:
    """The text of a reward's file, which has to be the one that was sealed. Raises ConfigError as `sealed_file`."""
    where = f"key 'train.grpo.rewards': {shown(file, 300)}"
    content = _content(file, where)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConfigError(f"{where} was changed while the run began; start it again")
    return content.decode("utf-8", errors="replace")


def _content(file: str, where: str) -> bytes:
    if "://" in file:
        raise ConfigError(f"{where} is no file on this machine; download it, read it, and name the file")
    try:
        return read_file(file, _LARGEST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{where} cannot be read ({shown(reason, 200)}); name a Python file") from error


def _names(tree: ast.Module) -> list[str]:
    """What a module defines, imports or assigns at its top; functions first."""
    functions = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    imported = [
        (alias.asname or alias.name).partition(".")[0]
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assigned = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    return [*functions, *imported, *assigned]
