"""Every tensor of a model with its place, and what processes have to know of it before they get its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Place = tuple[dict[str, Any], str]
"""Where a tensor of a module stands: a dictionary of the module's, and the key in it."""


@dataclass(frozen=True)
class Part:
    """What all processes have to know of a tensor before its values come."""

    names: tuple[str, ...]
    """A tied one has several."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    is_trained: bool


def places_of(model: nn.Module) -> dict[str, Place]:
    """Every tensor of a model by its name: parameters, buffers, and what its modules keep beside them."""
    from torch import Tensor

    return {
        f"{prefix}.{key}": (holder, key)
        for prefix, module in model.named_modules()
        for holder in (module._parameters, module._buffers, vars(module))
        for key, value in holder.items()
        if isinstance(value, Tensor)
    }


def empty_ones(places: dict[str, Place]) -> dict[str, bool]:
    """Whether each tensor is without values, on the meta device."""
    return {name: holder[key].is_meta for name, (holder, key) in places.items()}


def parts_of(places: dict[str, Place], needed: dict[str, bool]) -> list[Part]:
    """The first process's tensors; of what is neither parameter nor buffer, those that others have no values of.

    Args:
        places: of the first process's model.
        needed: by `empty_ones`, of another one's.
    """
    from torch import nn

    tensors = {name: holder[key] for name, (holder, key) in places.items()}
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    parts = []
    for name, tensor in tensors.items():
        all_names = names[id(tensor)]
        registered = any(not _is_attribute(places[each]) for each in all_names)
        if name == all_names[0] and (registered or any(needed.get(each) for each in all_names)):
            kind = isinstance(tensor, nn.Parameter)
            parts.append(Part(tuple(all_names), tuple(tensor.shape), tensor.dtype, kind, tensor.requires_grad))
    return parts


def put(places: dict[str, Place], part: Part, tensor: Tensor) -> None:
    """Puts a tensor at all its places."""
    for name in part.names:
        holder, key = places[name]
        holder[key] = tensor


def unlike(parts: list[Part], needed: dict[str, bool]) -> list[str]:
    """Names of tensors that one process has and the other one has not, or has no values for."""
    sent = {name for part in parts for name in part.names}
    return sorted((sent - needed.keys()) | {name for name, is_empty in needed.items() if is_empty} - sent)


def _is_attribute(place: Place) -> bool:
    return "_parameters" in place[0]  # of a module's own dictionary
