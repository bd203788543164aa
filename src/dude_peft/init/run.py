"""`dude init` from start to end: check, plan, compute what is missing, put the file together."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.artifact.durable import check_space, disk_errors
from dude_peft.artifact.sealed import content_sha256
from dude_peft.doors import check_folder
from dude_peft.errors import ConfigError, ResourceError
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL
from dude_peft.terminal.display import Display
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports
from dude_peft.version import __version__

if TYPE_CHECKING:
    from dude_peft.artifact.fingerprint import TensorPrint
    from dude_peft.init.parts import Part, Parts
    from dude_peft.init.plan import Plan

_FORMAT = 1
_CONFIG, _WEIGHTS, _PARTS = "adapter_config.json", "adapter_model.safetensors", ".dude-init"
_SECONDS_BETWEEN_LINES = 10.0


def initialise(
    model: str,
    output: str | Path,
    settings: dict[str, Any],
    *,
    dtype: str = "auto",
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    debug: bool = False,
) -> Path:
    """Write the adapter that `get_peft_model` would make of a checkpoint, without loading the model.

    Needs the memory of one weight in float32 per worker. Whatever ends it, the same call goes on where it stopped.

    Args:
        model: a folder with config.json and safetensors weights, or a hub id.
        output: folder of the adapter.
        settings: fields of DudeConfig.
        dtype: of the model when the adapter is used: auto (what transformers loads), float32, bfloat16 or float16.
        seed: of the random start of methods that have one: that of `torch.manual_seed(seed)` before `get_peft_model`.
        workers: processes, each with one thread; default: a core each, at most four.
        overwrite: replace an adapter that is there, or the parts of another init.
        quiet: print nothing.
        debug: show what worker processes write to standard error.

    Returns:
        The output folder.

    Raises:
        ConfigError: a setting, a model or an output folder that cannot be used.
        BusyError: another process writes the same folder.
        ArtifactError: a checkpoint that is damaged or incomplete.
        NumericsError: NaN or Inf in a weight.
        ResourceError: disk, memory or permission.
    """
    started = time.perf_counter()
    output = Path(output)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {shown(dtype)}: choose auto, float32, bfloat16 or float16")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers}: give at least 1 process")
    _check_output(output, overwrite)
    folder = checkpoint_folder(model)
    display = Display(quiet=quiet)
    with display.waiting("imports"), quiet_imports():
        from dude_peft.artifact.durable import locked
        from dude_peft.init.parts import Parts
        from dude_peft.init.plan import make_plan
        from dude_peft.init.workers import usual_count
        from dude_peft.model.weights import open_weights
        from dude_peft.tuner import DudeConfig

    with display.waiting("reading the model"), gathered_warnings(display.warn):
        checkpoint = open_weights(folder)
        config = DudeConfig(**settings, task_type=CAUSAL)
        plan = make_plan(model, folder, checkpoint, config, dtype, seed)
    parts = Parts(output, _settings_hash(plan, checkpoint.identity, dtype, seed))
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        with locked(output):
            finished = _work(plan, parts, display, model, workers or usual_count(), overwrite=overwrite, debug=debug)
    captured = [part.captured for part in finished if part.captured is not None]
    energy = f"; captured energy {100 * statistics.mean(captured):.1f} % on average" if captured else ""
    display.say(f"{time.perf_counter() - started:.0f} s in all, {plan.adapter_bytes / 2**20:,.0f} MiB{energy}")
    display.say(f"adapter: {shown(output, None)}")
    return output


def _work(
    plan: Plan, parts: Parts, display: Display, model: str, workers: int, *, overwrite: bool, debug: bool
) -> list[Part]:
    """Compute the layers that are missing and put the files together; the parts, none where all was done before."""
    from dude_peft.init.workers import run_layers

    _claim(parts, overwrite)
    if (parts.output / _CONFIG).is_file():  # written last: only the removal of the parts was cut short
        parts.remove()
        return []
    parts.begin()
    tasks = [(i, task) for i, task in enumerate(plan.layers) if parts.read(i, task.name) is None]
    # The parts and the file made of them lie side by side at the end.
    size = plan.adapter_bytes * (1 + len(tasks) / len(plan.layers))
    check_space(parts.output, int(size), parts.output)
    display.say(
        f"DuDe {__version__}: {plan.config.method}, {plan.config.spec.size(plan.config.r)}, {len(plan.layers)} layers "
        f"of {shown(model, 300)}; {len(plan.layers) - len(tasks)} done before, {min(workers, len(tasks))} workers"
    )
    with display.waiting("reading what is not adapted"):
        beside = plan.prints_beside()
    _show(display, run_layers(tasks, plan.config, parts.output, parts.settings, workers, debug), len(tasks))
    finished = [_trusted(parts, i, task.name) for i, task in enumerate(plan.layers)]
    _assemble(parts.output, plan, finished, beside)
    parts.remove()
    return finished


def _check_output(output: Path, overwrite: bool) -> None:
    """What can be said of the output folder before anything is imported."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {shown(output, 300)} is a file; choose another folder")
    if output.is_dir() and not overwrite and any(output.iterdir()) and not (output / _PARTS).is_dir():
        raise ConfigError(f"output {shown(output, 300)} is not empty; choose another folder or add --overwrite")


def _claim(parts: Parts, overwrite: bool) -> None:
    """Make sure that the folder is free, or holds parts of this very init."""
    from dude_peft.init.parts import settings_found

    if not any(parts.output.iterdir()):
        return
    found = settings_found(parts.output)
    if found == parts.settings:
        return
    others = [path for path in parts.output.iterdir() if not path.name.startswith(".dude-")]
    if not overwrite and (found is not None or others):
        what = "an unfinished init with other settings or another checkpoint" if found is not None else "other files"
        raise ConfigError(
            f"output {shown(parts.output, 300)} holds {what}; repeat its command to finish it, choose another folder, "
            "or add --overwrite"
        )
    for name in (_CONFIG, _WEIGHTS):
        (parts.output / name).unlink(missing_ok=True)
    if parts.folder.is_dir():
        shutil.rmtree(parts.folder)


def checkpoint_folder(model: str) -> Path:
    """The checkpoint's folder; from the hub, its files are fetched first.

    Raises:
        ConfigError: it is no model's folder, or cannot be fetched.
        ArtifactError: a file in it is none that can be read, or damaged.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model {shown(model, 300)} has no config.json; give the model's folder")
        check_folder(folder)
        return folder
    if folder.exists() or folder.is_absolute() or model.startswith("."):
        raise ConfigError(f"model {shown(model, 300)} is not a folder; give a model's folder or a hub id OWNER/NAME")
    with quiet_imports():
        from dude_peft.model.architecture import fetch_checkpoint
    return fetch_checkpoint(model)


def _settings_hash(plan: Plan, identity: list[list[Any]], dtype: str, seed: int) -> str:
    """Hash of everything that the bits depend on, except the machine."""
    import torch

    content = {
        "format": _FORMAT,
        "versions": [__version__, torch.__version__],
        "config": plan.config.to_dict(),
        "layers": [[task.name, task.r, task.scaling] for task in plan.layers],  # the order of patterns decides them
        "checkpoint": identity,
        "dtype": dtype,
        "seed": seed if plan.config.spec.draws else None,
    }
    return content_sha256(content)


def _show(display: Display, done: Iterable[float | None], total: int) -> None:
    """Follow the layers: a bar at a terminal, a line every few seconds in a log."""
    if not total:
        return
    start = said = time.perf_counter()
    energies: list[float] = []
    with display.stage("layers", total) as advance:
        for count, captured in enumerate(done, start=1):
            if captured is not None:
                energies.append(captured)
            note = f"captured energy {100 * statistics.mean(energies):.1f} %" if energies else ""
            advance(1, note)
            now = time.perf_counter()
            if not display.live and now - said > _SECONDS_BETWEEN_LINES:
                said = now
                eta = (now - start) / count * (total - count)
                display.say(f"layer {count}/{total}  {note}  ETA {eta:.0f} s")


def _trusted(parts: Parts, index: int, layer: str) -> Part:
    part = parts.read(index, layer)
    if part is None:
        raise ResourceError(f"the part of layer '{layer}' is damaged; check the disk, then repeat the command")
    return part


def _assemble(output: Path, plan: Plan, finished: list[Part], beside: dict[str, TensorPrint]) -> None:
    """Write both files as PEFT's `save_pretrained` and our manifest would; adapter_config.json last."""
    from dude_peft.artifact.durable import replace_file
    from dude_peft.artifact.manifest import BaseRecord
    from dude_peft.model.stream import write_adapter

    base = BaseRecord({part.layer: part.base for part in finished}, beside, plan.settings)
    plan.config.inference_mode = True  # PEFT's own way to save
    with tempfile.TemporaryDirectory(dir=output / _PARTS) as temporary:
        plan.config._base = base
        fields = plan.config._manifest_fields()
        plan.config.save_pretrained(temporary)
        config_file = Path(temporary) / _CONFIG
        pieces = [piece for part in finished for piece in part.pieces]
        write_adapter(output, fields, base, pieces, config_file)
        replace_file(output / _CONFIG, config_file.read_bytes())
