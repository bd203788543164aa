"""Checkpoints of a run: directories of safetensors and JSON that are whole or absent, and from which training goes on.

    checkpoints/step-00000050/
        adapter/                the adapter as it is, usable like any other
        optimizer.safetensors   the optimizer's tensors, under INDEX.NAME
        random.safetensors      the random number generators, under PROCESS.NAME
        state.json              everything else: schedule, step, counters, half-summed losses
        trainer_state.json      transformers' own record of the same step
        manifest.json           size and sha256 of every file, and which best adapter goes with it; written last
    checkpoints/best-00000040/  the best adapter so far: adapter/, trained.safetensors for loading it, manifest.json

A checkpoint is written beside, flushed, and renamed. Older ones go only when the new one is on the disk. One whose
files, best adapter or numbers are not sound is passed over for the one before. torch is imported when tensors are read
or written, since the folder of a run is looked at before.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from dude_peft.artifact.durable import check_space, disk_errors, sync, whole_folder
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.sealed import MANIFEST, check_sealed_folder, folder_facts, read_object, seal_folder
from dude_peft.errors import ArtifactError, DudeError, NumericsError
from dude_peft.show import shown
from dude_peft.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2  # 1: best adapters without a manifest
ADAPTER, OPTIMIZER, RANDOM, STATE, TRAINER_STATE = (
    "adapter", "optimizer.safetensors", "random.safetensors", "state.json", "trainer_state.json"
)  # fmt: skip
TRAINED = "trained.safetensors"
_WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"
_STEP = re.compile(r"step-(\d{8})")
_BEST = re.compile(r"best-(\d{8})")
_DAMAGED, _HIDDEN = "damaged-", ".dude-"


@dataclass(frozen=True)
class BestAdapter:
    """Which of the best adapters goes with a checkpoint."""

    step: int
    seal: str
    """Hash of its manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    path: Path
    step: int

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """Content of state.json."""
        found: dict[str, Any] = read_object(self.path / STATE)
        return found

    def trainer_state(self) -> dict[str, Any]:
        """Content of trainer_state.json."""
        found: dict[str, Any] = read_object(self.path / TRAINER_STATE)
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
        best: BestAdapter | None,
    ) -> Checkpoint:
        """Writes the checkpoint of `step`, then lets older ones go.

        Args:
            step: optimizer steps done.
            save_adapter: fills an empty folder with the adapter.
            optimizer: tensors of its state.
            random: tensors of the random number generators.
            state: everything else, as JSON.
            trainer_state: transformers' record.
            best: the best adapter so far; others are let go.

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
                seal_folder(folder, _facts(step) | {"best": None if best is None else asdict(best)})
        self._rotate(best)
        return Checkpoint(path, step)

    def save_best(self, step: int, save_adapter: Callable[[Path], None], trained: dict[str, Tensor]) -> BestAdapter:
        """Keeps the adapter of `step`; the one before it goes with the next checkpoint, which no longer needs it.

        Raises:
            ResourceError: the disk or a permission does not allow it.
        """
        from safetensors.torch import save_file

        path = self.best(step)
        # A resumed run comes here again, from a checkpoint before this step: no checkpoint needs what lies here.
        _remove(path)
        with disk_errors(path):
            self.folder.mkdir(exist_ok=True)
            with whole_folder(path) as folder:
                save_adapter(folder / ADAPTER)
                save_file(trained, folder / TRAINED)
                seal = seal_folder(folder, _facts(step))
        return BestAdapter(step, seal)

    def best(self, step: int) -> Path:
        """Folder of the best adapter, found at `step`."""
        return self.folder / f"best-{step:08d}"

    def load_best(self, step: int, seal: str | None = None) -> dict[str, Tensor]:
        """The trained tensors of the best adapter, found at `step`.

        Args:
            step: names it.
            seal: hash of its manifest, where it is known.

        Raises:
            ArtifactError: they are damaged, or another run's.
            NumericsError: NaN or Inf in them.
        """
        from safetensors.torch import load_file

        path = self.best(step)
        try:
            _check_best(path, step, seal)
            return load_file(path / TRAINED)
        except (ArtifactError, OSError, SafetensorError) as error:
            what = str(error) if isinstance(error, ArtifactError) else f"{shown(path / TRAINED, 300)} is damaged"
            raise ArtifactError(f"{what}; add --overwrite to start over") from error

    def newest(self, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole, its numbers finite; None where there never was one.

        Args:
            tell: hears of every newer one that is not.

        Raises:
            ArtifactError: there are some, and none is whole.
        """
        faults = []
        for path, step in self._steps():
            try:
                self._check(path, step)
            except (DudeError, OSError, ValueError, SafetensorError) as error:
                faults.append(" ".join(str(error).split()))
                continue
            for fault in faults:
                tell(f"checkpoint skipped: {fault}; resuming from {path.name}")
            return Checkpoint(path, step)
        if faults:
            raise ArtifactError(
                f"no checkpoint of this run can be used: {faults[0]}; add --weights-only to continue from an adapter "
                "only, or --overwrite to start over"
            )
        return None

    def newest_adapter(self, tell: Callable[[str], None]) -> Path:
        """The newest checkpoint's adapter that is whole, its numbers finite, whatever the rest of it is like.

        Args:
            tell: hears of every newer one that is not.

        Raises:
            ArtifactError: there is none.
        """
        from dude_peft.artifact.manifest import read_manifest

        faults = []
        for path, _ in self._steps():
            try:
                read_manifest(path / ADAPTER)
                _check_finite(path / _WEIGHTS)
            except DudeError as error:
                faults.append(str(error))
                continue
            for fault in faults:
                tell(f"adapter skipped: {fault}")
            return path / ADAPTER
        why = f" ({faults[0]})" if faults else ""
        raise ArtifactError(
            f"{shown(self.folder, 300)} has no adapter to continue from{why}; add --overwrite to start over"
        )

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

    def _check(self, path: Path, step: int) -> None:
        """Raises a DudeError for a checkpoint that is not what was written, or from which no run should go on."""
        facts, _ = _check_facts(path, step)
        check_sealed_folder(path, (_WEIGHTS, OPTIMIZER, RANDOM, STATE, TRAINER_STATE))
        for name in (_WEIGHTS, OPTIMIZER):
            _check_finite(path / name)
        try:
            best = None if facts["best"] is None else BestAdapter(**facts["best"])
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{shown(path / MANIFEST, 300)} is damaged") from error
        if best is not None:
            _check_best(self.best(best.step), best.step, best.seal)

    def _rotate(self, best: BestAdapter | None) -> None:
        for path, _ in self._steps()[max(self.keep, 2) :]:
            _remove(path)
        if best is not None:
            for path in list(self.folder.iterdir()):
                match = _BEST.fullmatch(path.name)
                if match and int(match[1]) != best.step:
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


def _facts(step: int) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "dude_version": __version__, "step": step}


def _check_facts(path: Path, step: int) -> tuple[dict[str, Any], str]:
    """(facts, hash) of a manifest of this format and step. Raises ArtifactError for any other one."""
    version = read_object(path / MANIFEST).get("format_version")
    if version != FORMAT_VERSION:  # those of other versions may be sealed otherwise
        raise ArtifactError(
            f"{shown(path, 300)} has checkpoint format {shown(version)}, but dude-peft {__version__} reads "
            f"{FORMAT_VERSION}: finish the run with the version that wrote it"
        )
    facts, seal = folder_facts(path)
    if facts["step"] != step:
        raise ArtifactError(f"{shown(path, 300)} holds step {shown(facts['step'])}; it was renamed")
    return facts, seal


def _check_best(path: Path, step: int, seal: str | None) -> None:
    """Raises ArtifactError or NumericsError for a best adapter that is not the one that was kept."""
    _, found = _check_facts(path, step)
    if seal not in (None, found):
        raise ArtifactError(f"{shown(path, 300)} belongs to another run")
    check_sealed_folder(path, (TRAINED,))
    _check_finite(path / TRAINED)


def _check_finite(path: Path) -> None:
    """Raises NumericsError for a safetensors file with NaN or Inf."""
    from safetensors import safe_open

    from dude_peft.core.finite import first_not_finite

    with safe_open(path, framework="pt") as file:
        name = first_not_finite((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - no mapping
    if name is not None:
        raise NumericsError(f"{shown(path, 300)} has NaN or Inf in {shown(name)}")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json_text(content) + "\n", encoding="utf-8")
