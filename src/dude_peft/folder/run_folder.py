"""The folder of a run: claimed before anything is loaded, and filled by whole files or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from dude_peft.artifact.durable import hidden_name, output_dir_errors, replace_file, sync, whole_folder
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.sealed import file_sha256, read_sealed, sealed
from dude_peft.doors import read_file
from dude_peft.errors import ArtifactError, ConfigError, DudeError, ResourceError
from dude_peft.folder.checkpoint import Checkpoints
from dude_peft.folder.identity import NAME as RUN
from dude_peft.folder.identity import Identity, read_identity
from dude_peft.folder.lock import RunLock
from dude_peft.folder.record import (
    ADAPTER,
    BEFORE,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    PAGE,
    PICTURE,
    RANKS,
    RECOVERED,
    REPORT,
    ROLLOUTS,
    SCORES,
    STAGES,
    RunReport,
    Score,
    score_from,
)
from dude_peft.show import shown

_TEMPORARY = re.compile(r"\.dude-[0-9a-f]{16}")  # `durable.hidden_name`
_START = ".dude-start"
_LARGEST_STAGES_BYTES = 4 << 30


def check_output_dir(path: Path, *, overwrite: bool = False) -> None:
    """Raises ConfigError where a run cannot begin or go on, as far as looking tells."""
    name = shown(path, 300)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir: {name} is a file; choose another folder")
    if not (overwrite or (path / RUN).is_file() or _is_new(path)):
        raise ConfigError(f"output_dir: {name} is not empty; choose another folder or add --overwrite")


def _is_new(path: Path) -> bool:
    """Whether there is nothing here; what a killed process left of its lock and its first file does not count."""
    return not path.is_dir() or all(entry.name.startswith(".dude-") for entry in path.iterdir())


class RunFolder:
    """The output folder of one run, held by one process at a time."""

    earlier: Identity | None
    """The unfinished or finished run that is here already, and goes on; None for a new run."""

    def __init__(self, path: str | Path, *, overwrite: bool = False, writes: bool = True) -> None:
        """Claims `path`: creates it, locks it, and makes sure that files can be written.

        Args:
            path: the folder.
            overwrite: a new run may begin in it whatever is there.
            writes: False in all processes of a run but the first, which claims and writes it for all of them.

        Raises:
            ConfigError: it is a file, or holds something that is no run of ours, and `overwrite` is not set.
            BusyError: another process runs in it.
            ArtifactError: its run.json is damaged.
            ResourceError: it cannot be created or written.
        """
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS)
        self._created: list[Path] = []
        self._lock: RunLock | None = None
        self.writes = writes
        self.earlier = None
        if writes:
            self._claim(overwrite)

    def _claim(self, overwrite: bool) -> None:
        try:
            with output_dir_errors(self.path):
                check_output_dir(self.path, overwrite=overwrite)
                for folder in [*reversed(self.path.absolute().parents), self.path.absolute()]:
                    if not folder.exists():
                        folder.mkdir(exist_ok=True)
                        self._created.append(folder)
                self._lock = RunLock(self.path)
                self.earlier = None if overwrite else read_identity(self.path)
                check_output_dir(self.path, overwrite=overwrite)  # another process may have been here in between
                self._sweep()
                probe = hidden_name(self.path)
                probe.touch(exist_ok=False)
                probe.unlink()
        except DudeError:
            self.release()
            raise

    def _sweep(self) -> None:
        """Removes what a killed process left half-written; nobody else writes here, since the lock is ours."""
        for path in self.path.iterdir():
            if _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        self.checkpoints.sweep()

    def release(self) -> None:
        """Gives the lock back, and the folders that were created, as far as they are still empty."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        for folder in reversed(self._created):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def begin(self, identity: Identity, start: Path | None) -> None:
        """Makes the folder that of a new run: whatever an earlier one recorded goes, its adapter stays until the end.

        Args:
            identity: what run.json is to say.
            start: an adapter among the old checkpoints that the new run starts from; it moves to recovered/.

        Raises:
            ResourceError: the disk or a permission does not allow it.
        """
        if not self.writes:
            return
        with self._writing(RUN):
            if start is not None:
                start.rename(self._free(RECOVERED))
            # report.json first: beside the other files it tells of the same, finished run.
            for stale in (REPORT, PAGE, RUN, METRICS, ROLLOUTS, STAGES, BEFORE, Path(SCORES) / "results.json"):
                (self.path / stale).unlink(missing_ok=True)
            if not identity.asked:
                (self.path / RANKS).unlink(missing_ok=True)
            self.checkpoints.clear()
        self.write(RUN, identity.text())

    def _free(self, name: str) -> Path:
        number = 1
        while (path := self.path / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        return path

    def finished(self) -> RunReport | None:
        """The report of the run that is here, if it has ended.

        Raises:
            ArtifactError: it is damaged.
        """
        path = self.path / REPORT
        if self.earlier is None or path.is_symlink() or not path.is_file():
            return None
        return RunReport.read(path)

    @contextlib.contextmanager
    def lines(self, name: str, kept: int | None) -> Iterator[TextIO]:
        """The open metrics.jsonl or rollouts.jsonl, each line on disk as soon as it is written.

        Args:
            name: of the file.
            kept: cut it to this many bytes and go on; None begins anew.
        """
        path = self.path / name
        with self._writing(name):
            if kept is None or path.is_symlink() or not path.is_file():
                # "x" and the unlink: a planted symbolic link is replaced, never written through.
                path.unlink(missing_ok=True)
                with path.open("x", encoding="utf-8", buffering=1) as file:
                    yield file
                return
            with path.open("r+", encoding="utf-8", buffering=1) as file:
                file.truncate(min(kept, path.stat().st_size))
                # Nothing of it is read: what happened to a line stays with that line.
                if file.seek(0, os.SEEK_END) < kept:
                    file.write("\n")
                yield file

    @contextlib.contextmanager
    def shared_start(self, model: Any) -> Iterator[Path]:
        """Within: a folder with the fresh adapter of the first process, for the others to load.

        Args:
            model: the first process's; None where there is nothing to hand over.
        """
        path = self.path / _START
        if self.writes and model is not None:
            with self._writing(_START):
                shutil.rmtree(path, ignore_errors=True)
                with whole_folder(path) as folder:
                    save_adapter(model, folder)
        try:
            yield path
        finally:
            if self.writes:
                shutil.rmtree(path, ignore_errors=True)

    def write_before(self, before: Score, seconds: float) -> None:
        """Keeps what was measured before training, and how long that took, for a start after an interruption."""
        content = sealed({"score": asdict(before), "seconds": seconds})
        self.write(BEFORE, json_text(content, ensure_ascii=False) + "\n")

    def read_before(self, tell: Callable[[str], None]) -> tuple[Score, float] | None:
        """What `write_before` kept; None where it has to be measured again, which gives the same.

        Args:
            tell: hears of a damaged file.
        """
        path = self.path / BEFORE
        if not path.is_file():
            return None
        try:
            content = read_sealed(path)
            return score_from(content["score"]), float(content["seconds"])
        except (ArtifactError, TypeError, KeyError, ValueError):
            tell(f"{shown(path, 300)} is damaged; its measurements are repeated")
            return None

    def read_stages(self, sha256: str, tell: Callable[[str], None]) -> str | None:
        """What curriculum.jsonl says, where it is as it was written; None where it has to be made again.

        Args:
            sha256: of what was written; empty where nothing was.
            tell: hears of a damaged file.
        """
        path = self.path / STAGES
        if not sha256 or path.is_symlink() or not path.exists():
            return None
        try:
            content = read_file(path, _LARGEST_STAGES_BYTES)
        except (OSError, ValueError):
            content = b""
        if hashlib.sha256(content).hexdigest() != sha256:
            tell(f"{shown(path, 300)} is damaged; it is made again")
            return None
        return content.decode("utf-8")

    def write(self, name: str, content: str | bytes) -> Path:
        """Writes one file whole: a reader sees the old one or the new one, never a part.

        Raises:
            ResourceError: the disk or a permission does not allow it.
        """
        if not self.writes:
            return self.path / name
        raw = content.encode("utf-8") if isinstance(content, str) else content
        with self._writing(name):
            replace_file(self.path / name, raw)
        return self.path / name

    def save_adapter(
        self,
        model: Any,
        tokenizer: Any,
        state: dict[str, Any] | None = None,
        processor: Sequence[Path] = (),
        writing: dict[str, str] | None = None,
    ) -> Path:
        """Saves the adapter of a PEFT model, and what read the rows of its training, under adapter/, complete or not.

        Args:
            model: the PEFT model.
            tokenizer: of its training.
            state: the trained tensors, where the model holds only a shard of each.
            processor: files of the processor of images, which are copied.
            writing: how rows were written, where the tokenizer alone does not tell.

        Raises:
            ResourceError: the disk or a permission does not allow it.
        """
        from dude_peft.artifact.companions import copy_files
        from dude_peft.artifact.manifest import cover_tokenizer, tokenizer_files

        target = self.path / ADAPTER
        if not self.writes:
            return target
        with self._writing(ADAPTER):
            temporary = hidden_name(self.path)
            temporary.mkdir()
            try:
                save_adapter(model, temporary, state, card=True)
                tokenizer.save_pretrained(str(temporary))
                for file in processor:
                    copy_files(file.parent, temporary, [file.name])
                cover_tokenizer(temporary, writing)
                for file in temporary.rglob("*"):
                    sync(file)
                sync(temporary)
                if target.is_dir() and not target.is_symlink():
                    # Overwriting: our files replace their namesakes, whatever else lies there stays, except what would
                    # be read as a part of the tokenizer.
                    for name in set(tokenizer_files(target)) - set(tokenizer_files(temporary)):
                        (target / name).unlink()
                    for file in sorted(temporary.iterdir()):
                        os.replace(file, target / file.name)
                    temporary.rmdir()
                else:
                    os.replace(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync(self.path)
        return target

    def write_report(self, report: RunReport) -> Path:
        """Writes report.json; last of all files, so that its presence means a finished run."""
        content = sealed(asdict(report))
        path = self.write(REPORT, json_text(content, indent=2, ensure_ascii=False) + "\n")
        if self.writes:
            (self.path / BEFORE).unlink(missing_ok=True)
        return path

    def listed(self) -> dict[str, str]:
        """sha256 of the files beside the adapter, for the report."""
        there = [self.path / name for name in (CONFIG, METRICS, ROLLOUTS, STAGES, PICTURE, RANKS)]
        return {path.name: file_sha256(path) for path in there if path.is_file()}

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except DudeError:
            raise
        except (OSError, SafetensorError) as error:  # safetensors' writer has an error of its own for a full disk
            free = shutil.disk_usage(self.path).free if self.path.exists() else 0
            reason = getattr(error, "strerror", None) or shown(error)
            raise ResourceError(
                f"{shown(self.path / name, 300)}: cannot be written ({reason}; {free // 2**20} MiB free); "
                "free some space or choose another output_dir"
            ) from error


def save_adapter(model: Any, folder: Path, state: dict[str, Any] | None = None, *, card: bool = False) -> None:
    """Fills `folder` with the adapter of a PEFT model, as stock PEFT has it.

    Args:
        model: the PEFT model.
        folder: made if it is not there.
        state: the trained tensors, where the model holds only a shard of each.
        card: write PEFT's README.md as well. Nobody reads a checkpoint's, and its template takes longer than the rest.
    """
    from dude_peft.tuner.foreign import stamp_foreign

    with contextlib.nullcontext() if card else _without_card(model):
        # Embeddings stay the base's: who trains them names them in modules_to_save.
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
    stamp_foreign(model, folder)


@contextlib.contextmanager
def _without_card(model: Any) -> Iterator[None]:
    model.create_or_update_model_card = lambda output_dir: None
    try:
        yield
    finally:
        del model.create_or_update_model_card
