"""FSDP2: every process holds a share of each tensor, and a block is whole only while it computes.

torch's own `fully_shard`, block by block, before the Trainer sees the model; the Trainer is told that the model manages
its own shards, as models do that transformers shards while loading. The same code runs on GPUs and on CPUs.
"""

from __future__ import annotations

from typing import Any

from dude_peft.errors import ConfigError
from dude_peft.machine.processes import count
from dude_peft.parents import require


def check_sharding() -> None:
    """Raises ConfigError where transformers is older than models that manage their own shards."""
    from transformers import PreTrainedModel, Trainer

    require(PreTrainedModel, "_is_distributed_loading_by_transformers")
    require(Trainer, "_defer_fsdp_gradient_reduction")


def shard(model: Any) -> None:
    """Shards a PEFT model in place over all processes, its frozen weights and its trained tensors alike.

    Raises:
        ConfigError: a quantised base model, whose packed tensors cannot be cut; transformers is older than this.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    check_sharding()
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ConfigError("--launch fsdp2: a quantised base model cannot be sharded; use --launch ddp")
    mesh = init_device_mesh(model.device.type, (count(),))
    blocks = set(getattr(base, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")
    base._is_distributed_loading_by_transformers = True
