"""Checkpoints of a run: directories of safetensors and JSON that are whole or absent, and from which training goes on.

    checkpoints/step-00000050/
        adapter/                the adapter as it is, usable like any other
        optimizer.safetensors   the optimizer's tensors, under INDEX.NAME
        random.safetensors      the random number generators, under PROCESS.NAME
        state.json              everything else: schedule, step, counters, half-summed losses
        trainer_state.json      transformers' own record of the same step
        manifest.json           size and sha256 of every file; written last
    checkpoints/best-00000040/  adapter/ with the lowest held-out loss so far, and trained.safetensors for loading it

A checkpoint is written beside, flushed, and renamed. Older ones go only when the new one is on the disk. torch is
imported when tensors are read or written, since the folder of a run is looked at before.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from dude_peft.artifact.durable import check_space, disk_errors, sync, whole_folder
from dude_peft.doors import open_file, read_json
from dude_peft.errors import ArtifactError, DudeError
from dude_peft.show import shown
from dude_peft.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
ADAPTER, OPTIMIZER, RANDOM, STATE, TRAINER_STATE, MANIFEST = (
    "adapter", "optimizer.safetensors", "random.safetensors", "state.json", "trainer_state.json", "manifest.json"
)  # fmt: skip
TRAINED = "trained.safetensors"
_STEP = re.compile(r"step-(\d{8})")
_BEST = re.compile(r"best-(\d{8})")
_DAMAGED, _HIDDEN = "damaged-", ".dude-"
_LARGEST_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    path: Path
    step: int

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """Content of state.json."""
        found: dict[str, Any] = _read_json(self.path / STATE)
        return found

    def trainer_state(self) -> dict[str, Any]:
        """Content of trainer_state.json."""
        found: dict[str, Any] = _read_json(self.path / TRAINER_STATE)
        return found

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Content of OPTIMIZER or RANDOM."""
        from safetensors.torch import load_file

        return load_file(self.path / name)


class Checkpoints:
    """The checkpoints of one run; whoever holds the run's lock may write them."""

    keep = 2
    """How many of the newest ones stay."""

    def __init__(self, folder: Path) -> None:
        """Looks after `folder`."""
        self.folder = folder

    def save(
        self,
        step: int,
        save_adapter: Callable[[Path], None],
        optimizer: dict[str, Tensor],
        random: dict[str, Tensor],
        state: dict[str, Any],
        trainer_state: dict[str, Any],
        best: int | None,
    ) -> Checkpoint:
        """Writes the checkpoint of `step`, then lets older ones go.

        Args:
            step: optimizer steps done.
            save_adapter: fills an empty folder with the adapter.
            optimizer: tensors of its state.
            random: tensors of the random number generators.
            state: everything else, as JSON.
            trainer_state: transformers' record.
            best: step of the best adapter so far; others are let go.

        Raises:
            ResourceError: the disk or a permission does not allow it; the older ones stay, nothing is left beside them.
        """
        from safetensors.torch import save_file

        path = self.folder / f"step-{step:08d}"
        if path.exists():
            self._set_aside(path)
        with disk_errors(path):
            self.folder.mkdir(exist_ok=True)
            check_space(self.folder, self._size(optimizer, random), path)
            with whole_folder(path) as folder:
                save_adapter(folder / ADAPTER)
                save_file(optimizer, folder / OPTIMIZER)
                save_file(random, folder / RANDOM)
                _write_json(folder / STATE, state)
                _write_json(folder / TRAINER_STATE, trainer_state)
                _write_manifest(folder, step)
        self._rotate(best)
        return Checkpoint(path, step)

    def save_best(self, step: int, save_adapter: Callable[[Path], None], trained: dict[str, Tensor]) -> None:
        """Keeps the adapter of `step`; the one before it goes with the next checkpoint, which no longer needs it.

        Raises:
            ResourceError: the disk or a permission does not allow it.
        """
        from safetensors.torch import save_file

        path = self.best(step)
        if path.exists():
            return  # a resumed run comes here again, with the same weights
        with disk_errors(path):
            self.folder.mkdir(exist_ok=True)
            with whole_folder(path) as folder:
                save_adapter(folder / ADAPTER)
                save_file(trained, folder / TRAINED)

    def best(self, step: int) -> Path:
        """Folder of the best adapter, found at `step`."""
        return self.folder / f"best-{step:08d}"

    def load_best(self, step: int) -> dict[str, Tensor]:
        """The trained tensors of the best adapter, found at `step`.

        Raises:
            ArtifactError: they are damaged.
        """
        from safetensors.torch import load_file

        path = self.best(step) / TRAINED
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{shown(path, 300)} is damaged; add --overwrite to start anew") from error

    def newest(self, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there never was one.

        Args:
            tell: hears of every newer one that is not whole.

        Raises:
            ArtifactError: there are some, and none is whole.
        """
        faults = []
        for path, step in self._steps():
            try:
                _check(path, step)
            except (DudeError, OSError, ValueError) as error:
                faults.append(" ".join(str(error).split()))
                continue
            for fault in faults:
                tell(f"checkpoint skipped: {fault}; going on from {path.name}")
            return Checkpoint(path, step)
        if faults:
            raise ArtifactError(
                f"no checkpoint of this run is whole: {faults[0]}; add --weights-only to go on from an adapter alone, "
                "or --overwrite to start anew"
            )
        return None

    def newest_adapter(self) -> Path:
        """The newest checkpoint's adapter, whatever the rest of it is like; whether it is whole is for its loader.

        Raises:
            ArtifactError: there is none.
        """
        for path, _ in self._steps():
            if (path / ADAPTER / "adapter_model.safetensors").is_file():
                return path / ADAPTER
        raise ArtifactError(f"{shown(self.folder, 300)} holds no adapter to go on from; leave --weights-only out")

    def clear(self) -> None:
        """Removes every checkpoint, finished or not, and nothing else."""
        if not self.folder.is_dir() or self.folder.is_symlink():
            return
        for path in list(self.folder.iterdir()):
            if any(rule.fullmatch(path.name.removeprefix(_DAMAGED)) for rule in (_STEP, _BEST)):
                _remove(path)
        self.sweep()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def sweep(self) -> None:
        """Removes what a killed process left behind: half-written and half-removed checkpoints."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{_HIDDEN}*"):
                name = path.name.removeprefix(_HIDDEN)
                if path.is_dir() and not path.is_symlink() and (_STEP.fullmatch(name) or _BEST.fullmatch(name)):
                    shutil.rmtree(path, ignore_errors=True)

    def _steps(self) -> list[tuple[Path, int]]:
        """(path, step) of all, newest first, by the step in the name and later in the manifest, never by time."""
        if not self.folder.is_dir():
            return []
        found = [(path, _STEP.fullmatch(path.name)) for path in self.folder.iterdir()]
        steps = [(path, int(match[1])) for path, match in found if match and path.is_dir() and not path.is_symlink()]
        return sorted(steps, key=lambda each: each[1], reverse=True)

    def _rotate(self, best: int | None) -> None:
        for path, _ in self._steps()[max(self.keep, 2) :]:
            _remove(path)
        if best is not None:
            for path in list(self.folder.iterdir()):
                match = _BEST.fullmatch(path.name)
                if match and int(match[1]) != best:
                    _remove(path)

    def _set_aside(self, path: Path) -> None:
        """A damaged checkpoint in the place of a new one keeps its content under another name."""
        aside = path.with_name(_DAMAGED + path.name)
        _remove(aside)
        path.rename(aside)

    def _size(self, *parts: dict[str, Tensor]) -> int:
        size = sum(tensor.nbytes for part in parts for tensor in part.values())
        # The adapter holds its frozen start beside the trained tensors, and Adam two numbers for each of these.
        return 2 * size


def _remove(path: Path) -> None:
    """First out of sight, then away: what a kill leaves of it is never taken for a checkpoint."""
    if not path.is_dir() or path.is_symlink():
        return
    hidden = path.with_name(_HIDDEN + path.name.removeprefix(_DAMAGED))
    if hidden.exists():
        shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    sync(path.parent)
    shutil.rmtree(hidden, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(folder)
    }
    content = {"format_version": FORMAT_VERSION, "dude_version": __version__, "step": step, "files": files}
    _write_json(folder / MANIFEST, content)


def _check(path: Path, step: int) -> None:
    """Raises ArtifactError for a checkpoint that is not, byte for byte, what was written."""
    manifest = _read_json(path / MANIFEST)
    try:
        version, recorded, files = manifest["format_version"], manifest["step"], dict(manifest["files"])
        wanted = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{shown(path / MANIFEST, 300)} is damaged") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{shown(path, 300)} has checkpoint format {shown(version)}, dude-peft {__version__} reads "
            f"{FORMAT_VERSION}: finish the run with the version that wrote it"
        )
    if recorded != step:
        raise ArtifactError(f"{shown(path, 300)} holds step {shown(recorded)}; it was renamed")
    for needed in (f"{ADAPTER}/adapter_model.safetensors", OPTIMIZER, RANDOM, STATE, TRAINER_STATE):
        if needed not in wanted:
            raise ArtifactError(f"{shown(path / MANIFEST, 300)} does not list {needed}")
    for name, (size, digest) in wanted.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise ArtifactError(f"{shown(file, 300)} is missing")
        if file.stat().st_size != size or _sha256(file) != digest:
            raise ArtifactError(f"{shown(file, 300)} is damaged")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        content = read_json(path, _LARGEST_JSON_BYTES)
    except FileNotFoundError as error:
        raise ArtifactError(f"{shown(path, 300)} is missing") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{shown(path, 300)} is damaged") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{shown(path, 300)} is damaged")
    return content
