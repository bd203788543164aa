"""Which Python files beside a reward's file it may import, read from its text: those of its functions as well.

A function that imports a helper when it is called has not done so yet when a run begins.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from dude_peft.doors import read_file

_LARGEST_BYTES = 1 << 20


def mentioned(file: Path, root: Path) -> set[str]:
    """Paths of the files below `root` that a Python file's import statements name, and theirs in turn."""
    found: set[str] = set()
    waiting = [file]
    while waiting:
        each = waiting.pop()
        for path in _named_in(each, root):
            if str(path) not in found and path.is_file():
                found.add(str(path))
                waiting.append(path)
    return found - {str(file)}


def _named_in(file: Path, root: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(read_file(file, _LARGEST_BYTES))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # whoever imports it will tell
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(root, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and node.level <= len(file.parents):
            folder = file.parents[node.level - 1] if node.level else root
            module = node.module.split(".") if node.module else []
            yield from _files(folder, module)
            for alias in node.names:  # which may be modules
                yield from _files(folder, [*module, alias.name])


def _files(folder: Path, parts: list[str]) -> Iterator[Path]:
    """Those of a module and of the packages around it."""
    for part in parts:
        yield folder / f"{part}.py"
        folder = folder / part
        yield folder / "__init__.py"
    if not parts:
        yield folder / "__init__.py"
