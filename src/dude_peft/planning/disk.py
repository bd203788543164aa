"""What a run writes, against what is free where it writes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dude_peft.init.plan import saved_bytes
from dude_peft.methods import Method
from dude_peft.tuner import DudeLinear


@dataclass(frozen=True)
class Disk:
    """Bytes."""

    adapter: int
    """The saved adapter, with whatever else is trained."""
    checkpoint: int
    """An adapter with its optimizer's states."""
    free: int


def disk(model: nn.Module, method: Method | None, optimizer: int, output: str) -> Disk:
    """Sizes of an adapted model's files, and the room for them.

    Args:
        model: adapted, with or without weights.
        method: of its adapter; None of one that stock PEFT makes.
        optimizer: bytes of the optimizer's states.
        output: folder of the run; it need not be there.
    """
    layers = [module for module in model.modules() if isinstance(module, DudeLinear)]
    own = {id(p) for layer in layers for name, p in layer.named_parameters() if not name.startswith("base_layer.")}
    adapter = 0 if method is None else sum(saved_bytes(layer, method, r) for layer in layers for r in layer.r.values())
    adapter += sum(p.nbytes for p in model.parameters() if p.requires_grad and id(p) not in own)
    folder = Path(output).absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return Disk(adapter, adapter + optimizer, shutil.disk_usage(there).free)
