"""What a file was when it was read, to notice that it is another one later."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from dude_peft.data.file_lines import opened
from dude_peft.errors import DataError
from dude_peft.show import shown

_READ_BYTES = 2**20


@dataclass(frozen=True)
class Stamp:
    """Size, time of the last change and hash of a file's bytes."""

    path: Path
    size: int
    changed_ns: int
    sha256: str

    def verify(self, name: str) -> None:
        """Raises DataError, beginning with `name`, where the file is not what it was; equal bytes are no change."""
        try:
            now = self.path.stat()
            same = (now.st_size, now.st_mtime_ns) == (self.size, self.changed_ns)
            same = same or (now.st_size == self.size and stamp_of(self.path).sha256 == self.sha256)
        except (OSError, DataError):
            same = False
        if not same:
            raise DataError(
                f"{name}: the file was changed while it was in use; start again, and do not change it during the run"
            )


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file, all of whose bytes are read once.

    Raises DataError where there is no such file, or it is no regular one; ResourceError where it cannot be read.
    """
    digest = hashlib.sha256()
    with opened(path) as (stream, name):
        if not path.is_file():
            raise DataError(f"{name}: is not a regular file; write the rows into one")
        before = os.fstat(stream.fileno())
        while block := stream.read(_READ_BYTES):
            digest.update(block)
        after = os.fstat(stream.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{shown(path, 300)}: the file is being written; wait until it is complete")
    return Stamp(path, after.st_size, after.st_mtime_ns, digest.hexdigest())
