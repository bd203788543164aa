"""What training has to remember beside the weights, as tensors and JSON: optimizer, schedule, random numbers.

transformers' own checkpoints hold these as pickles. Here the optimizer's tensors go into safetensors under INDEX.NAME
and everything else into JSON, whose numbers keep every bit (Python writes decimals that read back the same).
A sharded tensor is gathered and written whole, so that a checkpoint does not depend on the number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from dude_peft.errors import ArtifactError
from dude_peft.machine.sharding import cut_again
from dude_peft.tuner import frozen


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a torch optimizer as (tensors by INDEX.NAME, the rest as JSON).

    Every process of a sharded run has to call it: gathering is a joint operation.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    taken: set[int] = set()
    for index, entries in state["state"].items():
        for name, value in _flat(entries).items():
            if isinstance(value, Tensor):
                tensor = whole(value).detach().cpu().contiguous()
                # bitsandbytes' 8-bit optimizers share one table among all tensors; a file has none that are shared.
                shared = tensor.data_ptr() in taken
                tensors[f"{index}.{name}"] = tensor.clone() if shared else tensor
                taken.add(tensor.data_ptr())
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"groups": state["param_groups"], "numbers": numbers}


def load_optimizer_state(optimizer: Any, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_state` gave, on an optimizer over the same parameters in the same order.

    Raises:
        ArtifactError: it was another optimizer's, or one over other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise ArtifactError(
                f"optimizer.safetensors: '{key}' belongs to no trained tensor; add --overwrite to start over"
            )
        states.setdefault(int(index), {})[name] = sharded_as(tensor, parameters[int(index)])
    for index, entries in rest["numbers"].items():
        states.setdefault(int(index), {}).update(entries)
    states = {index: _nested(entries) for index, entries in states.items()}
    groups = [
        {key: tuple(value) if isinstance(own.get(key), tuple) else value for key, value in saved.items()}
        for saved, own in zip(rest["groups"], optimizer.param_groups, strict=False)
    ]
    try:
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    except ValueError as error:
        raise ArtifactError(
            f"the checkpoint's optimizer does not fit this run ({error}); add --overwrite to start over"
        ) from error


def _flat(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Of one parameter's state, what lies in a dictionary of its own (bitsandbytes) under OUTER/INNER."""
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _nested(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What `_flat` was given."""
    nested: dict[str, Any] = {}
    for name, value in entries.items():
        outer, slash, inner = name.partition("/")
        if slash:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[name] = value
    return nested


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every random number generator of this process as (tensors, JSON)."""
    version, words, gauss = random.getstate()
    generator: Any = numpy.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = generator
    tensors = {"torch": torch.random.get_rng_state(), "numpy": torch.from_numpy(keys.astype("int64"))}
    if torch.cuda.is_available():
        tensors |= {f"cuda{device}": state for device, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }


def load_random_state(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    version, words, gauss = rest["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = rest["numpy"]
    numpy.random.set_state((kind, tensors["numpy"].numpy().astype("uint32"), position, has_gauss, cached))
    torch.random.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            if f"cuda{device}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{device}"], device)


def trained_state(model: Any) -> dict[str, Tensor]:
    """Every trained tensor by its name in the model, whole, on the CPU; every process has to ask for it."""
    cut_again(model)  # what is gathered already lies in a buffer of torch's, with more around it
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: whole(parameter).detach().cpu().contiguous() for name, parameter in trained}


@torch.no_grad()
def load_trained_state(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `trained_state` gave."""
    cut_again(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensors[name])
        else:
            parameter.copy_(sharded_as(tensors[name], parameter))


def sharded_state(model: Any) -> dict[str, Tensor] | None:
    """`trained_state` of a sharded model, for saving its adapter; None where the model holds its tensors whole."""
    if any(frozen.is_sharded(parameter) for parameter in model.parameters()):
        return trained_state(model)
    return None


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, any other one as it is; every process has to ask for it."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    gather = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    # Of rows that do not divide evenly it is a view of more, which safetensors does not write.
    found: Tensor = gather().clone(memory_format=torch.contiguous_format)
    return found


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor; any other one as it is."""
    if hasattr(tensor, "ds_id"):
        share: Tensor = vars(tensor)["ds_tensor"]  # DeepSpeed's own
        return share
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def sharded_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor` cut as `parameter` is, if it is sharded and of the same shape; otherwise as it is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]
