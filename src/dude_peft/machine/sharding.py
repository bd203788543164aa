"""FSDP2: every process holds a share of each tensor, and a block is whole only while it computes.

The first process alone reads the model and makes the adapter; the others have the same modules without values, on the
meta device. The first one cuts tensor by tensor, sends the shares, and lets go of the whole. So all processes together
hold one model, at its start and ever after. torch's own `fully_shard` wraps it, block by block, before the Trainer sees
it; the Trainer is told that the model manages its own shards, as models do that transformers shards while loading. The
same code runs on GPUs and on CPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dude_peft.errors import ConfigError
from dude_peft.machine.pages import MappedFiles, return_large_blocks
from dude_peft.machine.places import Part, empty_ones, parts_of, places_of, put, unlike
from dude_peft.machine.processes import count, from_first, gathered, is_first
from dude_peft.parents import require
from dude_peft.show import shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def check_sharding() -> None:
    """Raises ConfigError where transformers is older than models that manage their own shards."""
    from transformers import PreTrainedModel, Trainer

    require(PreTrainedModel, "_is_distributed_loading_by_transformers")
    require(Trainer, "_defer_fsdp_gradient_reduction")


def split(model: Any, device: torch.device) -> None:
    """Shards a PEFT model in place over all processes, its frozen weights and its trained tensors alike.

    Args:
        model: the first process's, whole on the CPU; the others' of the same modules on the meta device.
        device: where each process keeps its shares, and buffers.

    Raises:
        ConfigError: the others' model has other tensors.
    """
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh

    return_large_blocks()
    places = places_of(model)
    needed = gathered(empty_ones(places))
    parts = from_first(parts_of(places, needed[-1]) if is_first() else [])
    _check_same(model, parts, needed[-1])
    values: dict[str, Tensor] = {}
    for part in parts:
        holder, key = places[part.names[0]]
        if is_first():
            values[part.names[0]] = holder[key].detach()
        if part.is_parameter:
            empty = torch.empty(part.shape, dtype=part.dtype, device="meta")
            put(places, part, nn.Parameter(empty, requires_grad=part.is_trained))
    mesh = init_device_mesh(device.type, (count(),))
    _wrap(model, mesh)
    files = MappedFiles()
    for part in parts:
        whole = values.pop(part.names[0]) if is_first() else torch.empty(part.shape, dtype=part.dtype, device=device)
        if part.is_parameter:
            holder, key = places[part.names[0]]
            put(places, part, _share(whole, mesh, holder[key]))
        else:
            put(places, part, _copy(whole, device))
        if is_first():
            files.let_go(whole)
    model.get_base_model()._is_distributed_loading_by_transformers = True


def is_cut(model: Any) -> bool:
    """Whether all processes have to call the model, because each holds a share of it."""
    if count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def cut_again(model: Any) -> None:
    """Gives a split model its shares back, of which a forward without a backward keeps some gathered.

    Whoever takes parameters for good, or writes to them, needs the shares: what FSDP2 has gathered is gone with the
    next backward, and all that stands outside of blocks (embedding, head) is kept so.
    """
    if count() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def blocks(model: Any, base: Any) -> list[nn.Module]:
    """The modules of `model` that are gathered as wholes, one after the other: those that its `base` names."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _wrap(model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in blocks(model, model.get_base_model()):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")


def _share(whole: Tensor, mesh: Any, parameter: Any) -> nn.Parameter:
    """What this process keeps of the first one's tensor, cut as `parameter` is."""
    from torch import nn
    from torch.distributed.tensor import distribute_tensor

    share = distribute_tensor(whole.contiguous(), mesh, parameter.placements)
    return nn.Parameter(share, requires_grad=parameter.requires_grad)


def _copy(whole: Tensor, device: torch.device) -> Tensor:
    """The first process's tensor, in all of them."""
    import torch
    import torch.distributed as dist

    found = whole.to(device).clone(memory_format=torch.contiguous_format) if is_first() else whole
    if found.numel():
        dist.broadcast(found.view(-1).view(torch.uint8), src=0)  # gloo knows no booleans
    return found


def _check_same(model: Any, parts: list[Part], needed: dict[str, bool]) -> None:
    """All processes look at the same, so all refuse it."""
    if different := unlike(parts, needed):
        raise ConfigError(
            f"--launch fsdp2: {type(model.get_base_model()).__name__} has other tensors where it is made without its "
            f"checkpoint ({len(different)}, first: {shown(different[0], 100)}); use --launch ddp"
        )
