"""The header of a GGUF file, parsed once: transformers parses it for the tokenizer, the configuration and the weights.

A header holds the vocabulary, piece by piece, so that each parse takes seconds.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within: gguf's reader of a file that has not changed is the one from before, until `forget`."""
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = _Kept.reader  # type: ignore[assignment,misc]
    # transformers asks for the same table of names once a module.
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before  # type: ignore[misc]


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


@functools.cache
def _plain_reader() -> Any:
    import numpy as np
    from gguf.gguf_reader import GGUFReader

    class PlainReader(GGUFReader):
        """Its numbers are plain arrays over the mapped file: a view of a np.memmap takes many times as long."""

        @property
        def data(self) -> Any:
            """The file's bytes."""
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(np.ndarray)

    return PlainReader
