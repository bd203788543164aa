"""Files of ours that are read back: JSON that carries the hash of its own content, and folders with a manifest.

    file      {..., "sha256": of all the rest, whatever the layout and the order of its keys}
    folder    manifest.json, sealed like that and written last: size and sha256 of every other file, and some facts

A file that is not what was written is never read as if it were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dude_peft.artifact.json_text import json_text
from dude_peft.doors import open_file, read_json
from dude_peft.errors import ArtifactError
from dude_peft.show import shown

MANIFEST = "manifest.json"
_SEAL, _FILES = "sha256", "files"


def content_sha256(content: Any) -> str:
    """Hexadecimal sha256 of a JSON value: of what it says, not of its layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` and its hash, as it will be read back: keys are text, tuples lists."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return {**plain, _SEAL: content_sha256(plain)}


def unsealed(found: Any) -> dict[str, Any]:
    """What `sealed` was given.

    Raises:
        ValueError: it is something else, or was changed.
    """
    if not isinstance(found, dict) or not isinstance(found.get(_SEAL), str):
        raise ValueError("it has no checksum")
    content = {key: value for key, value in found.items() if key != _SEAL}
    if content_sha256(content) != found[_SEAL]:
        raise ValueError("its content does not match its checksum")
    return content


def read_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file of ours.

    Args:
        path: of the file.
        remedy: what to do, for the message.

    Raises:
        ArtifactError: it is missing, no regular file, damaged, or too large to be ours.
    """
    hint = f"; {remedy}" if remedy else ""
    if not path.exists():
        raise ArtifactError(f"{shown(path, 300)} is missing{hint}")
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise _damaged(path, hint) from error
    return content


def read_sealed(path: Path, remedy: str = "") -> dict[str, Any]:
    """What was sealed in a file; args and errors are those of `read_object`."""
    return unsealed_of(path, read_object(path, remedy), remedy)


def unsealed_of(path: Path, content: Mapping[str, Any], remedy: str = "") -> dict[str, Any]:
    """What was sealed in a file of which the content is read already; args and errors are those of `read_object`."""
    try:
        return unsealed(content)
    except ValueError as error:
        raise _damaged(path, f"; {remedy}" if remedy else "") from error


def seal_folder(folder: Path, facts: Mapping[str, Any]) -> str:
    """Writes the manifest of a folder that is complete otherwise; gives the manifest's own hash.

    Args:
        folder: its files, and those of folders in it, are listed.
        facts: what else the manifest says, as JSON.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    content = sealed({**facts, _FILES: files})
    (folder / MANIFEST).write_text(json_text(content) + "\n", encoding="utf-8")
    return str(content[_SEAL])


def folder_facts(folder: Path) -> tuple[dict[str, Any], str]:
    """(facts, hash) of a folder's manifest, which is as it was written; its files are not looked at.

    Raises:
        ArtifactError: the manifest is missing or damaged.
    """
    content = read_sealed(folder / MANIFEST)
    return {key: value for key, value in content.items() if key != _FILES}, content_sha256(content)


def check_sealed_folder(folder: Path, needed: Iterable[str] = ()) -> None:
    """Compares every file that a folder's manifest lists with what was written.

    Args:
        folder: with its manifest.
        needed: files that it has to list.

    Raises:
        ArtifactError: the manifest or a file is missing or damaged.
    """
    manifest = folder / MANIFEST
    content = read_sealed(manifest)
    try:
        wanted = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content[_FILES].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(manifest) from error
    for name in needed:
        if name not in wanted:
            raise ArtifactError(f"{shown(manifest, 300)} does not list {name}")
    for name, (size, digest) in wanted.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise ArtifactError(f"{shown(file, 300)} is missing")
        if file.stat().st_size != size or file_sha256(file) != digest:
            raise _damaged(file)


def _damaged(path: Path, hint: str = "") -> ArtifactError:
    return ArtifactError(f"{shown(path, 300)} is damaged{hint}")
