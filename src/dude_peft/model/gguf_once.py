"""The header of a GGUF file, parsed once: transformers parses it for the tokenizer, the configuration and the weights.

A header holds the vocabulary, piece by piece, so that each parse takes seconds. The pieces are Python's own bytes and
numbers here: numpy's array for each of them takes ten times as long to make, and to read.
"""

from __future__ import annotations

import functools
import importlib
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

_LEGACY, _FAST = "transformers.modeling_gguf_pytorch_utils", "transformers.integrations.gguf.reader"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within: gguf's reader of a file that has not changed is the one from before, until `forget`."""
    import gguf

    with ExitStack() as stack:

        def replace(where: Any, name: str, by: Callable[[Any], Any]) -> None:
            if (before := getattr(where, name, None)) is not None:
                stack.callback(setattr, where, name, before)
                setattr(where, name, by(before))

        replace(gguf, "GGUFReader", lambda before: _Kept.reader)
        # transformers asks for the same table of names once a module.
        replace(gguf, "get_tensor_name_map", functools.cache)
        # A release without these names reads the same values, only slower.
        replace(_module(_LEGACY), "_gguf_parse_value", _quick_value)
        replace(_module(_FAST), "_mapped", _unwrapped)
        yield


def forget() -> None:
    """Lets go of what was parsed: some hundred bytes for each piece of the vocabulary."""
    _Kept.found = None


class _Kept:
    found: ClassVar[tuple[object, Any] | None] = None
    """What a file is known by, and its reader."""

    @classmethod
    def reader(cls, path: Any, mode: str = "r") -> Any:
        """In the place of `gguf.GGUFReader`."""
        about = os.stat(path)
        known = (os.path.abspath(path), mode, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        if cls.found is None or cls.found[0] != known:
            cls.found = known, _plain_reader()(path, mode)
        return cls.found[1]


def _module(name: str) -> Any:
    """None where this release of transformers has no such module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _quick_value(plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function of transformers that goes through a string byte by byte, each time that it is asked."""

    def value(part: Any, types: Any) -> Any:
        kind = type(part)
        return part.decode() if kind is bytes else part[0] if kind is tuple else plain(part, types)

    return value


def _unwrapped(mapped: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The mapped file as a plain array: a view of a np.memmap takes many times as long."""
    import numpy as np

    return lambda path: mapped(path).view(np.ndarray)


@functools.cache
def _plain_reader() -> Any:
    import numpy as np
    from gguf.constants import GGUFValueType
    from gguf.gguf_reader import GGUFReader

    class PlainReader(GGUFReader):
        """Its numbers are plain arrays over the mapped file; the elements of arrays are bytes, and tuples of one."""

        @property
        def data(self) -> Any:
            """The file's bytes."""
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(np.ndarray)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type == _ARRAY and self.byte_order == "I" and sys.byteorder == "little":
                inner, count = struct.unpack_from("<IQ", self._bytes, orig_offs)
                if count and (inner == _STRING or inner in _NUMBERS):
                    elements, size = self._elements(orig_offs + 12, inner, count)
                    types = [GGUFValueType.ARRAY, GGUFValueType(inner)]
                    return 12 + size, elements, list(range(count)), types
            found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return found

        def _elements(self, begin: int, kind: int, count: int) -> tuple[list[Any], int]:
            """Of an array, and the bytes that they take."""
            whole = self._bytes
            if count * (8 if kind == _STRING else struct.calcsize(f"<{_NUMBERS[kind]}")) > len(whole) - begin:
                raise ValueError("an array extends past the end of the file")
            if kind != _STRING:
                size = count * struct.calcsize(f"<{_NUMBERS[kind]}")
                return list(struct.iter_unpack(f"<{_NUMBERS[kind]}", whole[begin : begin + size])), size
            length, place, found = struct.Struct("<Q").unpack_from, begin, []
            for _ in range(count):
                place, end = place + 8, place + 8 + length(whole, place)[0]
                found.append(whole[place:end].tobytes())
                place = end
            if place > len(whole):
                raise ValueError("a string extends past the end of the file")
            return found, place - begin

    return PlainReader
