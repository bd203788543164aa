"""Weights that accelerate keeps elsewhere between forwards (`device_map`): on the CPU or on the disk.

Such a layer has a hook. Outside of its forward its tensors are on the meta device; the hook's `weights_map` has them.
Reading them from there changes nothing; what is written to the layer would be lost in the next forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_offloaded(layer: Any) -> bool:
    """Whether the layer's own tensors are elsewhere between forwards."""
    return _hook(layer) is not None


def only_offloads(layer: Any) -> bool:
    """Whether what stands in place of a layer's forward is accelerate's alone: it puts the tensors in, and calls it."""
    hook = _hook(layer)
    own = getattr(layer.__dict__.get("_old_forward"), "__func__", None)
    return hook is not None and hook is layer._hf_hook and own is type(layer).forward


def stored(layer: Any, name: str) -> Any:
    """A layer's parameter or buffer with its values, on whatever device they are; None where it has none."""
    tensor: Any = getattr(layer, name, None)
    if not isinstance(tensor, Tensor) or not tensor.is_meta:
        return tensor
    hook = _hook(layer)
    return tensor if hook is None else hook.weights_map[name]


def held(layer: Any, name: str) -> Any:
    """The same on the device where the layer computes."""
    parameters = layer._parameters  # past nn.Module's __getattr__, which takes longer
    tensor: Any = parameters[name] if name in parameters else getattr(layer, name, None)
    if not isinstance(tensor, Tensor) or not tensor.is_meta:  # the usual layer, also while it is compiled
        return tensor
    hook = _hook(layer)
    return tensor if hook is None else hook.weights_map[name].to(_device(hook))


def device_of(layer: Any) -> torch.device:
    """Where a layer computes."""
    if (hook := _hook(layer)) is not None:
        return _device(hook)
    return next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))


def offloaded_layers(model: nn.Module) -> list[str]:
    """The names of the modules whose own tensors are elsewhere."""
    return [name for name, module in model.named_modules() if is_offloaded(module)]


def _hook(layer: Any) -> Any:
    """The hook that puts the layer's own tensors in and takes them out again."""
    hook: Any = layer.__dict__.get("_hf_hook")
    if hook is None:  # the usual layer
        return None
    hooks = getattr(hook, "hooks", (hook,))  # several in a row
    return next((each for each in hooks if getattr(each, "offload", False) and each.weights_map is not None), None)


def _device(hook: Any) -> torch.device:
    return torch.device(hook.execution_device)
