"""`dude init --quantize`: the residual of every target layer quantised from full-precision weights, streamed.

Two folders come out, each whole or absent: a model that stock transformers loads quantised, and the adapter that
belongs on it (`residual.py` says what they hold). One layer is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.artifact.durable import check_space, disk_errors, refuse_existing, whole_folder
from dude_peft.artifact.json_text import json_text
from dude_peft.doors import read_json
from dude_peft.errors import ConfigError
from dude_peft.init.run import checkpoint_folder
from dude_peft.show import a_, shown
from dude_peft.task_types import CAUSAL
from dude_peft.terminal.display import Display
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports
from dude_peft.version import __version__

if TYPE_CHECKING:
    from dude_peft.artifact.fingerprint import TensorPrint
    from dude_peft.init.plan import Plan
    from dude_peft.model.stream import Piece
    from dude_peft.model.weights import WeightFiles

_FOLDED = {"dude": "dora", "pissa": "lora"}
"""Method -> the one that trains its A and B themselves, without a frozen start."""


@dataclass(frozen=True)
class LayerError:
    """Relative quantisation error of one layer, in the Frobenius norm."""

    layer: str
    residual: float
    """Of Q(W0 - s B0 A0) + s B0 A0."""
    plain: float
    """Of Q(W0)."""


def fold(
    model: str,
    output: str | Path,
    residual: str | Path | None,
    settings: dict[str, Any],
    form: str | None,
    *,
    dtype: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[LayerError]:
    """Write a quantised residual model and the adapter that starts on it as the full-precision model, but for rounding.

    Args:
        model: a folder with config.json and safetensors weights, or a hub id.
        output: folder of the adapter, which is made.
        residual: folder of the quantised model, which is made.
        settings: fields of DudeConfig; the method is dude or pissa.
        form: nf4 or int8, bitsandbytes'.
        dtype: of the model beside the quantised weights: auto, float32, bfloat16 or float16.
        workers: refused, one process does the work.
        overwrite: refused, what is there stays.
        quiet: print nothing.

    Returns:
        The quantisation error of every layer, and what quantising W0 itself would give.

    Raises:
        ConfigError: a setting, model or output that cannot be used, a layer that cannot be quantised, no bitsandbytes.
        ArtifactError: a checkpoint that is damaged or incomplete.
        NumericsError: NaN or Inf in a weight.
        ResourceError: disk, memory or permission.
    """
    started = time.perf_counter()
    if form is None or residual is None:
        raise ConfigError("--quantize FORMAT and --residual MODEL need each other; give both")
    if workers is not None or overwrite:
        raise ConfigError("--quantize uses one process and a new folder; leave out --workers and --overwrite")
    output, residual, display = Path(output), Path(residual), Display(quiet=quiet)
    _check_outputs(output, residual)
    with display.waiting("imports"), quiet_imports():
        from dude_peft.init.bnb import check_format
        from dude_peft.init.plan import make_plan
        from dude_peft.model.weights import open_weights
        from dude_peft.tuner import DudeConfig

    with display.waiting("reading the model"), gathered_warnings(display.warn):
        check_format(form)
        folder = checkpoint_folder(model)
        checkpoint = open_weights(folder)
        config = DudeConfig(**settings, task_type=CAUSAL)
        if config.method not in _FOLDED:
            raise ConfigError(
                f"--quantize folds the principal factors of dude and pissa, not {config.method}; choose one of "
                f"these, or train {config.method} on a base that is loaded quantised"
            )
        plan = make_plan(model, folder, checkpoint, config, dtype, seed=0)
        target = _target(model, folder, checkpoint, plan, form, dtype)
        beside = plan.prints_beside()
    display.say(
        f"DuDe {__version__}: {config.method}, r = {config.r}, {len(plan.layers)} layers of {shown(model, 300)}, "
        f"residuals to {form}"
    )
    with disk_errors(residual), whole_folder(output) as adapter_folder, whole_folder(residual) as base_folder:
        scratch = base_folder / ".work"
        scratch.mkdir()
        # Parts and files lie side by side at the end; a quantised weight takes half of a stored one at most.
        stored = sum(tensor.size for tensor in checkpoint.tensors.values())
        check_space(base_folder, stored + 2 * plan.adapter_bytes, residual)
        errors, base = _compute(plan, form, scratch, display)
        _write_base(base_folder, folder, checkpoint, plan, scratch, target)
        _write_adapter(adapter_folder, residual, plan, scratch, base, beside, target)
        shutil.rmtree(scratch)
    display.say(f"{time.perf_counter() - started:.0f} s in all; {summary(errors)}")
    display.say(f"adapter: {shown(output, None)}")
    display.say(f"its base (not usable without the adapter): {shown(residual, None)}")
    return errors


def summary(errors: list[LayerError]) -> str:
    """One line for people."""
    worst, worst_plain = max(errors, key=lambda e: e.residual), max(errors, key=lambda e: e.plain)
    return (
        f"quantisation error {100 * statistics.mean(e.residual for e in errors):.2f} % of the weight on average, at "
        f"worst {100 * worst.residual:.2f} % ({shown(worst.layer)}); without the factors taken out "
        f"{100 * statistics.mean(e.plain for e in errors):.2f} %, at worst {100 * worst_plain.plain:.2f} %"
    )


@dataclass(frozen=True)
class _Target:
    """What the quantised model's configuration says."""

    quantization: dict[str, Any]
    dtype: str


def _check_outputs(output: Path, residual: Path) -> None:
    for path in (output, residual):
        refuse_existing(path)
    one, other = output.absolute(), residual.absolute()
    if one == other or one in other.parents or other in one.parents:
        raise ConfigError(
            f"--output {shown(output, 300)} and --residual {shown(residual, 300)} must be two separate folders"
        )


def _target(model_name: str, folder: Path, checkpoint: WeightFiles, plan: Plan, form: str, dtype: str) -> _Target:
    """The configuration under which transformers quantises the target layers and no others.

    Raises:
        ConfigError: it would quantise other layers.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    from dude_peft.init.bnb import settings
    from dude_peft.model.architecture import empty_model, parameter_names

    model = empty_model(model_name, folder, checkpoint.dtype, dtype)
    names, modules = parameter_names(model), dict(model.named_modules())
    linear = {name for name, module in modules.items() if type(module) is nn.Linear or isinstance(module, Conv1D)}
    targets = {task.name for task in plan.layers}
    skipped = sorted(linear - targets)
    kept = [*skipped, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    for name in sorted(targets):
        if len(names[id(modules[name].weight)]) > 1:
            reason = "another layer has the same weight"
        elif name not in linear:
            reason = f"transformers does not quantise {a_(type(modules[name]).__name__)}"
        elif not should_convert_module(name, kept):
            reason = "transformers keeps layers with this name ending in full precision"
        else:
            continue
        raise ConfigError(f"target '{name}' cannot be quantised: {reason}; leave it out with --exclude-modules")
    return _Target(settings(form, model.dtype, skipped), str(model.dtype).removeprefix("torch."))


def _compute(plan: Plan, form: str, scratch: Path, display: Display) -> tuple[list[LayerError], dict[str, TensorPrint]]:
    """Every layer, one at a time, to files of its own."""
    import safetensors.torch

    from dude_peft.core.threads import one_thread
    from dude_peft.init.residual import compute

    errors, base, config = [], {}, plan.config
    with display.stage("layers", len(plan.layers)) as advance:
        for number, task in enumerate(plan.layers):
            with one_thread():  # the bits then are those of any machine with the same torch
                layer = compute(task, config.spec, config.split_options, form)
            safetensors.torch.save_file(layer.base, scratch / f"{number}.base")
            safetensors.torch.save_file(layer.adapter, scratch / f"{number}.adapter")
            errors.append(LayerError(task.name, layer.error, layer.plain_error))
            base[task.name] = layer.print
            advance(1, f"error {100 * layer.error:.1f} %, plain {100 * layer.plain_error:.1f} %")
    return errors, base


def _write_base(
    output: Path, source: Path, checkpoint: WeightFiles, plan: Plan, scratch: Path, target: _Target
) -> None:
    """The quantised model: the checkpoint's own files, with the tensors of target layers replaced."""
    from dude_peft.artifact.companions import companions, copy_files
    from dude_peft.artifact.durable import replace_file
    from dude_peft.artifact.header import chunks
    from dude_peft.model.stream import Piece, write_pieces
    from dude_peft.model.weights import INDEX

    quantised = {task.stored.name: scratch / f"{number}.base" for number, task in enumerate(plan.layers)}
    files: dict[str, list[Piece]] = {file: [] for file in checkpoint.files}
    for name, stored in checkpoint.tensors.items():
        pieces = files[Path(stored.file).name]
        if name in quantised:
            pieces += _pieces(quantised[name], name.removesuffix("weight"))
        else:
            pieces.append(Piece(name, stored.dtype, stored.shape, lambda stored=stored: chunks(stored)))  # type: ignore[misc]
    for file, pieces in files.items():
        write_pieces(output / file, {"format": "pt"}, pieces)
    if (source / INDEX).is_file():
        size = sum(piece.size for pieces in files.values() for piece in pieces)
        places = {piece.name: file for file, pieces in files.items() for piece in pieces}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        replace_file(output / INDEX, (json_text(index, indent=2) + "\n").encode())
    copy_files(source, output, companions(source))
    config = read_json(source / "config.json")
    for key in ("torch_dtype", "auto_map"):
        config.pop(key, None)
    config |= {"dtype": target.dtype, "quantization_config": target.quantization}
    replace_file(output / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _write_adapter(
    output: Path,
    residual: Path,
    plan: Plan,
    scratch: Path,
    base: dict[str, TensorPrint],
    beside: dict[str, TensorPrint],
    target: _Target,
) -> None:
    """The adapter's two files, as PEFT's `save_pretrained` and our manifest would write them."""
    from dude_peft.artifact.durable import replace_file
    from dude_peft.artifact.manifest import CONFIG_FILE, BaseRecord
    from dude_peft.model.stream import write_adapter
    from dude_peft.tuner import DudeConfig

    quantization = {"config": target.quantization, "dtype": target.dtype}
    record = BaseRecord(base, beside, plan.settings, quantization)
    plan.config._base = record  # whose layers its patterns are written for
    config = DudeConfig(**{**plan.config._manifest_fields(), "method": _FOLDED[plan.config.method]})
    config.base_model_name_or_path, config.inference_mode = str(residual), True
    pieces = [
        piece
        for number, task in enumerate(plan.layers)
        for piece in _pieces(scratch / f"{number}.adapter", f"base_model.model.{task.name}.")
    ]
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        config.save_pretrained(temporary)
        config_file = Path(temporary) / CONFIG_FILE
        write_adapter(output, config._manifest_fields(), record, pieces, config_file)
        replace_file(output / CONFIG_FILE, config_file.read_bytes())


def _pieces(part: Path, prefix: str) -> list[Piece]:
    """The tensors of one layer's file, under their names in the whole."""
    from dude_peft.artifact.header import chunks, read_header, stored_sha256
    from dude_peft.model.stream import Piece

    found = []
    for name, stored in read_header(part).tensors.items():
        content = lambda stored=stored: chunks(stored)  # noqa: E731
        found.append(Piece(prefix + name, stored.dtype, stored.shape, content, stored_sha256([stored])[name]))
    return found
