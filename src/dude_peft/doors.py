"""What comes in from outside is a regular file, no larger and no deeper than its kind can be.

A FIFO keeps its reader waiting for ever, a device never ends, and JSON of a few megabytes can take gigabytes or the
whole stack. Every file is opened by `open_file`; a folder that another library will read is looked at first.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dude_peft.errors import ArtifactError
from dude_peft.show import quoted, shown

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MEGABYTE = 1 << 20
LARGEST_JSON_BYTES = 64 * _MEGABYTE
"""The index of the largest checkpoints of today takes ten."""
_DEEPEST = 64
_TEMPLATES = "additional_chat_templates"
# What transformers, tokenizers and PEFT read of a folder, and how large it may be; weights have checks of their own.
_READ: dict[str, int | None] = {
    ".json": LARGEST_JSON_BYTES,
    ".jinja": _MEGABYTE,
    ".model": 64 * _MEGABYTE,
    ".txt": 64 * _MEGABYTE,
}
_READ |= dict.fromkeys((".tiktoken", ".safetensors", ".gguf", ".py", ".bin", ".png"))
_LARGE = {"tokenizer.json": 512 * _MEGABYTE}
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
_LARGEST_SETTINGS_BYTES = 16 * _MEGABYTE


_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def require_place(name: str) -> None:
    """Refuses a folder that is not there, before the libraries are imported that would look for it on the hub.

    Raises:
        ArtifactError: it is neither a path that exists nor a name that the hub or a package can have.
    """
    is_name = name.startswith("package:") or _HUB_ID.fullmatch(name)
    if not is_name and not os.path.lexists(os.path.normpath(name)):
        raise ArtifactError(f"{shown(name, 300)}: no such folder; check the path, or wait until the run has finished")


def named_folder(place: str | os.PathLike[str]) -> str:
    """A folder or hub id as messages and records call it: `.` and `..` say nothing to who reads them elsewhere."""
    return os.path.abspath(place) if Path(place).name in ("", "..") else os.fspath(place)


class NoFileError(OSError):
    """A FIFO, a device or a socket stands where a file is wanted; `strerror` says which."""


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """A regular file, open for reading; links are followed.

    Raises:
        NoFileError: it is a FIFO, a device or a socket; it was not opened, or let go of at once.
        OSError: it is a folder, or cannot be opened.
    """
    _refuse_irregular(os.stat(path), path)
    # Not waiting: between the look and the opening a FIFO may have taken the place.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        _refuse_irregular(os.fstat(descriptor), path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | os.PathLike[str], largest_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        ValueError: there are more than `largest_bytes`.
        OSError: as for `open_file`.
    """
    with open_file(path) as file:
        content = file.read(largest_bytes + 1)
    if len(content) > largest_bytes:
        raise ValueError(f"it is larger than {largest_bytes / _MEGABYTE:.3g} MiB")
    return content


def read_json(path: str | os.PathLike[str], largest_bytes: int = LARGEST_JSON_BYTES, **options: Any) -> Any:
    """The value in a JSON file; `options` are those of `json.loads`.

    Raises:
        ValueError: it is too large, nested too deep, or no JSON.
        OSError: as for `open_file`.
    """
    return parse_json(read_file(path, largest_bytes), **options)


def parse_json(text: bytes | str, **options: Any) -> Any:
    """`json.loads`, but what is nested too deep is a ValueError like every other fault.

    Raises:
        ValueError: it is nested deeper than 64 levels, or no JSON.
    """
    try:
        value = json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if _is_deeper(value, _DEEPEST):
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    return value


class JsonError(ValueError):
    """Valid for Python's json module, not for us: duplicate keys, NaN."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json: an object's pairs as a dict; a JsonError where a key stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JsonError(f"the key {quoted(twice)} appears twice in one object; keep one")
    return found


def check_size(key: str, value: int, tensors: int, largest: int, *, layers: bool) -> None:
    """Refuse a number that is far from the weights beside it: a model of such sizes fills the memory, or hours.

    Args:
        key: what the number is called.
        value: of a side, or of layers.
        tensors: how many there are.
        largest: of all their sides.
        layers: whether it counts layers.

    Raises:
        ValueError: there are fewer tensors than layers, or the side is far larger than all of theirs.
    """
    if value > (tensors if layers else max(16 * largest, 1 << 16)):
        raise ValueError(
            f"its {quoted(key)} is {shown(value, 30)}, but the weights are {tensors} tensors with sides up to "
            f"{largest}: they belong to different models"
        )


def check_folder(folder: Path) -> None:
    """Look at all that other libraries read of a model's or an adapter's folder, before they do.

    Raises:
        ArtifactError: a file is no regular one, is larger than its kind can be, or holds broken or absurd settings.
    """
    for path in _files(folder):
        limit = _LARGE.get(path.name, _READ.get(path.suffix))
        try:
            state = path.stat()
            _refuse_irregular(state, path)
            if limit is not None and state.st_size > limit:
                raise ValueError(f"it is larger than {limit // _MEGABYTE} MiB")
            if path.name in _SETTINGS:
                _check_settings(path.name, read_json(path, _LARGEST_SETTINGS_BYTES))
        except (FileNotFoundError, PermissionError):
            continue  # who needs it says so
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ArtifactError(
                f"{shown(path, 300)} cannot be used ({shown(reason, 200)}); copy or download it again"
            ) from error


def _files(folder: Path) -> Iterator[Path]:
    for where in (folder, folder / _TEMPLATES):
        try:
            names = sorted(os.listdir(where))
        except OSError:
            continue
        yield from (where / name for name in names if os.path.splitext(name)[1] in _READ)


def _refuse_irregular(state: os.stat_result, path: str | os.PathLike[str]) -> None:
    kind = stat.S_IFMT(state.st_mode)
    if kind in _KINDS:
        raise NoFileError(errno.EINVAL, f"is {_KINDS[kind]}, not a regular file", os.fspath(path))


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


# Ten times the largest of today's. A model is made layer by layer, and its settings make lists of that length.
_MOST = (
    (re.compile(r"(num_|n_).*layers?|n_layer|.*_layers|depth|.*_depth"), 1024),
    (re.compile(r".*experts?"), 65536),
    (re.compile(r"num_labels"), 1 << 20),  # a name is made for each
    (re.compile(r".*(size|dim|rank|heads|width|embd|inner|model|groups)"), 1 << 26),
)
_MOST_OTHERWISE = 1 << 62


def _check_settings(name: str, settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ValueError("it does not contain a JSON object")
    if name == "config.json":
        _check_sizes(settings)


def _check_sizes(settings: dict[str, Any]) -> None:
    """Refuse a configuration that no model has: it would be made for hours, or fill the memory."""
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_sizes(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            most = next((most for pattern, most in _MOST if pattern.fullmatch(key)), None)
            if most is not None and not -most <= value <= most:
                raise ValueError(f"its {quoted(key)} is {shown(value, 30)}, but no model has more than {most:,}")
            if isinstance(value, int) and abs(value) > _MOST_OTHERWISE:
                raise ValueError(f"its {quoted(key)} is {shown(value, 30)}, which is not a valid size")
