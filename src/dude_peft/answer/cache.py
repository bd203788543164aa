"""Answers of one model, kept as they come, so that what was interrupted goes on where it stopped.

A JSON-lines file. Its first line says of what: the model's fingerprint and all else that answers depend on. Each other
line is one batch, {request's hash: answer}, written at once: after a kill a batch is there whole or not at all, and the
resumed run computes the same batches with the same numbers. Every line carries its own hash and, in it, the file's
name: a changed line, or one of another file, is refused. Of several processes the first one reads and writes the
file; the others are told what is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dude_peft.artifact.durable import disk_errors, take
from dude_peft.artifact.sealed import sealed, unsealed
from dude_peft.data.cache_folder import cache_folder
from dude_peft.doors import open_file
from dude_peft.errors import ArtifactError, BusyError
from dude_peft.machine import processes
from dude_peft.show import shown

_WAIT_SECONDS = 0.5


class AnswerCache:
    """Answers by their requests' hashes; `settings` is what its first line says."""

    def __init__(self, path: Path, settings: dict[str, Any], tell_damaged: Callable[[str], None] | None = None) -> None:
        """Open, or begin.

        Args:
            path: the file; a torn last line, left by a kill, is cut off.
            settings: what the answers depend on; those of the file that are kept from an earlier run win.
            tell_damaged: hears of a damaged file, which is then begun anew.

        Raises:
            ArtifactError: the file is damaged elsewhere than in its last line, or is another model's, and nobody hears
                of it.
            BusyError: another process has it.
            ResourceError: it cannot be written.
        """
        self._path = path
        self._answers: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        self.settings = settings
        if processes.is_first():
            self._open(path, tell_damaged)
        self.settings, self._answers = processes.from_first((self.settings, self._answers))
        self.found = len(self._answers)
        """Answers that an earlier run had computed."""

    def _open(self, path: Path, tell_damaged: Callable[[str], None] | None) -> None:
        with disk_errors(path):
            if path.exists():
                open_file(path).close()  # no FIFO, no device
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a planted link is never written through
            self._file = os.fdopen(os.open(path, flags, 0o666), "r+b")
            if not take(self._file.fileno()):
                raise BusyError(f"{shown(path, 300)} is being written by another process; wait for it to end")
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            try:
                lines = [self._content(unsealed(json.loads(line))) for line in whole.splitlines()]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if tell_damaged is None:
                    raise self.damaged() from error
                tell_damaged(f"{shown(path, 300)} is damaged; what it held is measured again")
                lines, whole = [], b""
            if lines:
                self.settings = {**self.settings, **lines[0]}
            for batch in lines[1:]:
                self._answers |= batch
            self._file.truncate(len(whole))
            self._file.seek(len(whole))
            if not lines:
                self._write(self.settings)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def parts(self, key: str, *kinds: type | tuple[type, ...]) -> list[Any]:
        """The values of an answer that has several, one for each kind. ArtifactError where it has others."""
        answer = self._answers[key]
        if (
            not isinstance(answer, (list, tuple))
            or len(answer) != len(kinds)
            or not all(map(isinstance, answer, kinds))
        ):
            raise self.damaged()
        return list(answer)

    def damaged(self) -> ArtifactError:
        """What to raise where the file does not hold what we write."""
        return ArtifactError(f"{shown(self._path, 300)} is damaged; remove it, and its answers will be computed again")

    def add(self, batch: Mapping[str, Any]) -> None:
        """Keep a batch of answers, on the disk before the first process returns.

        Raises ResourceError where the disk does not allow it.
        """
        if self._file is not None:
            with disk_errors(self._path):
                self._write(dict(batch))
        self._answers |= batch

    def clear(self, settings: dict[str, Any]) -> None:
        """Drop all answers, and begin anew. ResourceError where the disk does not allow it."""
        self.settings, self._answers, self.found = settings, {}, 0
        if self._file is not None:
            with disk_errors(self._path):
                self._file.truncate(0)
                self._file.seek(0)
                self._write(settings)

    def close(self) -> None:
        """Gives the file back."""
        if self._file is not None:
            self._file.close()

    def _content(self, line: dict[str, Any]) -> dict[str, Any]:
        if line["of"] != self._path.stem:
            raise ValueError("a line of another file")
        return dict(line["content"])

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        # ASCII: whatever a model wrote comes back as it was, lone surrogates too.
        self._file.write(json.dumps(sealed({"of": self._path.stem, "content": line})).encode("ascii") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def shared_cache(kind: str, key: str, say: Callable[[str], None], check: Callable[[], None]) -> Iterator[AnswerCache]:
    """Within: what all runs of this user keep of `kind` under `key`; another process that fills it is awaited.

    Args:
        kind: what is kept, in words, and the folder of its files.
        key: hash of all that it depends on.
        say: hears of the waiting. A damaged file is begun anew, with a warning.
        check: raises where the run has been told to end.

    Raises:
        ResourceError: the file cannot be written.
    """
    path = cache_folder() / kind.replace(" ", "_") / f"{key}.jsonl"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        try:
            cache = AnswerCache(path, {kind: key}, tell_damaged=lambda text: warnings.warn(text, stacklevel=2))
            break
        except BusyError:
            if not waited:
                say(f"{kind}: another run measures the same; this one waits for it")
            waited = True
            check()
            time.sleep(_WAIT_SECONDS)
    try:
        yield cache
    finally:
        cache.close()


def key_of(*parts: Any) -> str:
    """Hash of a request: its task and version, its kind, and its text and settings."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]
