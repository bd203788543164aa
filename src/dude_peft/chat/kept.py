"""Completions kept batch by batch beside an output, so that an interrupted `dude generate` goes on where it stopped.

The file `OUTPUT.part` says in its first line of which command it is: everything that decides the completions, from the
model's weights to the size of a batch. It is removed once the output is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dude_peft.answer.cache import AnswerCache, key_of
from dude_peft.artifact.durable import disk_errors
from dude_peft.data.sight import prints_of
from dude_peft.errors import BusyError, ConfigError
from dude_peft.show import shown

if TYPE_CHECKING:
    from dude_peft.answer.decoding import Decoding
    from dude_peft.answer.speaker import Speaker


def part_of(output: Path) -> Path:
    """Where the completions of an unfinished output are."""
    return output.with_name(f"{output.name}.part")


@contextmanager
def kept(output: Path, command: str, *, overwrite: bool) -> Iterator[AnswerCache]:
    """Within: the completions of this command (`command_key`) that are there, and a place for more; after, nothing.

    An exception leaves the file for the next time.

    Raises:
        ConfigError: another command's completions are there, and `overwrite` does not allow to drop them.
        BusyError: another process writes them.
        ArtifactError: the file is damaged.
        ResourceError: it cannot be written.
    """
    path = part_of(output)
    with disk_errors(path):
        begun = os.path.lexists(path)  # a link that leads nowhere is the user's as well
    cache: AnswerCache | None = None
    try:
        cache = AnswerCache(path, {"command": command})
        if cache.settings["command"] != command:
            if not overwrite:
                raise ConfigError(
                    f"{shown(path, 300)} holds {len(cache)} completions of another command or model; repeat that "
                    "command, remove the file, or add --overwrite"
                )
            cache.clear({"command": command})
        yield cache
    except BaseException as error:
        if not begun and not cache and not isinstance(error, BusyError):  # nothing to go on from
            path.unlink(missing_ok=True)
        raise
    finally:
        if cache is not None:
            cache.close()
    with disk_errors(path):
        path.unlink(missing_ok=True)


def command_key(speaker: Speaker, ids: Sequence[Sequence[int]], decoding: Decoding, batch_size: int) -> str:
    """The hash of all that decides the completions."""
    from dude_peft.answer.fingerprint import answering_parts

    return key_of(
        *answering_parts(speaker.model, speaker.tokenizer),
        [[list(each), *prints_of(each)] for each in ids],
        asdict(decoding),
        [batch_size, speaker.company if batch_size > 1 else "any"],
    )
