"""What DistributedDataParallel is kept from doing to a model."""

from __future__ import annotations

from typing import Any

from dude_peft.parents import require


def keep_frozen_from_ddp(model: Any) -> None:
    """Has DDP leave the frozen parameters of a model alone: at its start it sends each, and writes it in each process.

    That would make a second copy of weights that are pages of their file, to be sure that all processes have the same.

    Args:
        model: adapted, not yet wrapped; every process has compared its base with that of the adapter.
    """
    from torch.nn.parallel import DistributedDataParallel

    require(DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    set_ignored: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    set_ignored(model, frozen)
