"""What lies beside a model's weights and goes where they go: tokenizer, chat templates, licence.

Python code of a checkpoint does not go along, and what asks for it is left out of the settings: a written model is read
by transformers' own classes, as the one it was made of was, by every reader alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dude_peft.artifact.durable import replace_file
from dude_peft.doors import open_file, read_json

TEMPLATES = "additional_chat_templates"
_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_BLOCK_BYTES = 1 << 20


def companions(folder: Path) -> list[str]:
    """Names of these files in a model's folder; config.json and what belongs to an adapter are none of them."""

    def goes_along(path: Path) -> bool:
        licence = path.name.upper().startswith(("LICENSE", "NOTICE"))
        wanted = path.suffix in _SUFFIXES and path.name != "config.json" and not path.name.endswith(".index.json")
        return path.is_file() and (wanted or licence) and not path.name.startswith("adapter_")

    templates = (folder / TEMPLATES).glob("*.jinja")
    return [path.relative_to(folder).as_posix() for path in sorted([*folder.iterdir(), *templates]) if goes_along(path)]


def own_code(folder: Path) -> list[str]:
    """Names of the Python files that a model brings along."""
    return sorted(path.name for path in folder.glob("*.py"))


def copy_files(source: Path, target: Path, names: list[str]) -> None:
    """Copy files of a model's folder, each whole; settings without what asks for the model's own code.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a JSON file is none.
    """
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        settings = read_json(source / name) if name.endswith("_config.json") else None
        if isinstance(settings, dict) and settings.pop("auto_map", None) is not None:
            replace_file(target / name, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
        else:
            replace_file(target / name, _blocks(source / name))


def _blocks(path: Path) -> Iterator[bytes]:
    with open_file(path) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block
