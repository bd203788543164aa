"""The folder of a run: claimed before anything is loaded, and filled by whole files or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from dude_peft.artifact.durable import replace_file, sync, umask
from dude_peft.errors import ConfigError, ResourceError
from dude_peft.show import shown

ADAPTER, CONFIG, METRICS, PICTURE, REPORT = "adapter", "config.yaml", "metrics.jsonl", "loss.png", "report.json"


@dataclass(frozen=True)
class Answer:
    """One held-out question and what the model made of it."""

    question: str
    expected: str
    text: str
    right: bool


@dataclass(frozen=True)
class Score:
    """A model's standing on the held-out rows."""

    loss: float
    """Mean cross-entropy of the answers' tokens, in nats."""
    right: int
    """Questions answered right."""
    rows: int
    """Questions asked."""
    interval: tuple[float, float]
    """95 % Wilson interval of right / rows."""
    answers: tuple[Answer, ...]
    """All of them, in the order of the rows."""


@dataclass(frozen=True)
class RunReport:
    """Everything that is needed to judge a run and to repeat it; what report.json holds."""

    method: str
    seed: int
    config: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    trainable_parameters: int
    total_parameters: int
    steps: int
    tokens: int
    """Tokens, padding aside, that went through training."""
    tokens_per_second: float
    before: Score | None
    after: Score | None
    seconds: dict[str, float]
    """Wall-clock time of each phase."""
    warnings: list[str]


class RunFolder:
    """The output folder of one run."""

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Claims `path`: creates it, and makes sure that files can be written.

        Raises:
            ConfigError: it is a file, or holds something and `overwrite` is not set.
            ResourceError: it cannot be created or written.
        """
        self.path = Path(path)
        self._created: list[Path] = []
        name = shown(self.path, 300)
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"output_dir: {name} is a file; choose another folder")
            if self.path.is_dir() and not overwrite and any(self.path.iterdir()):
                raise ConfigError(f"output_dir: {name} is not empty; choose another folder or add --overwrite")
            for folder in [*reversed(self.path.absolute().parents), self.path.absolute()]:
                if not folder.exists():
                    folder.mkdir()
                    self._created.append(folder)
            descriptor, probe = tempfile.mkstemp(prefix=".dude-", dir=self.path)
            os.close(descriptor)
            os.unlink(probe)
        except ConfigError:
            raise
        except NotADirectoryError as error:
            raise ConfigError(f"output_dir: {name} lies inside a file; choose another folder") from error
        except (OSError, ValueError) as error:
            self.release()
            reason = getattr(error, "strerror", None) or shown(error)
            raise ResourceError(f"output_dir: {name} cannot be written ({reason}); choose another folder") from error

    def release(self) -> None:
        """Takes back the folders that were created, as far as they are still empty."""
        for folder in reversed(self._created):
            with contextlib.suppress(OSError):
                folder.rmdir()

    @contextlib.contextmanager
    def metrics(self) -> Iterator[TextIO]:
        """An open, empty metrics.jsonl, each line on disk as soon as it is written.

        The record of an earlier run goes first: a report.json beside metrics.jsonl tells of the same, finished run.
        """
        with self._writing(METRICS):
            for stale in (REPORT, METRICS):
                (self.path / stale).unlink(missing_ok=True)
            # "x" and the unlink above: a planted symbolic link is replaced, never written through.
            with (self.path / METRICS).open("x", encoding="utf-8", buffering=1) as file:
                yield file

    def write(self, name: str, content: str | bytes) -> Path:
        """Writes one file whole: a reader sees the old one or the new one, never a part.

        Raises:
            ResourceError: the disk or a permission does not allow it.
        """
        raw = content.encode("utf-8") if isinstance(content, str) else content
        with self._writing(name):
            replace_file(self.path / name, raw)
        return self.path / name

    def save_adapter(self, model: Any, tokenizer: Any) -> Path:
        """Saves the adapter of a PEFT model, and the tokenizer it was trained with, under adapter/, complete or not.

        Raises:
            ResourceError: the disk or a permission does not allow it.
        """
        target = self.path / ADAPTER
        with self._writing(ADAPTER):
            temporary = Path(tempfile.mkdtemp(prefix=".dude-", dir=self.path))
            try:
                # Embeddings stay the base's: who trains them names them in modules_to_save.
                model.save_pretrained(str(temporary), save_embedding_layers=False)
                tokenizer.save_pretrained(str(temporary))
                for file in temporary.rglob("*"):
                    sync(file)
                sync(temporary)
                if target.is_dir() and not target.is_symlink():
                    # Overwriting: our files replace their namesakes, whatever else lies there stays.
                    for file in sorted(temporary.iterdir()):
                        os.replace(file, target / file.name)
                    temporary.rmdir()
                else:
                    temporary.chmod(0o777 & ~umask())
                    os.replace(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync(self.path)
        return target

    def write_report(self, report: RunReport) -> Path:
        """Writes report.json; last of all files, so that its presence means a finished run."""
        return self.write(REPORT, json.dumps(asdict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, ResourceError):
                raise
            free = shutil.disk_usage(self.path).free if self.path.exists() else 0
            reason = error.strerror or shown(error)
            raise ResourceError(
                f"{shown(self.path / name, 300)}: cannot be written ({reason}; {free // 2**20} MiB free); "
                "free some space or choose another output_dir"
            ) from error
