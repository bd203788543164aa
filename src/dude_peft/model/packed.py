"""bitsandbytes' layers as layers of plain tensors, which FSDP2 cuts, sends and gathers like any others.

bitsandbytes keeps the scales of a packed weight as attributes of it, and of the layer, where FSDP2 finds none of them.
Here packed weight and scales are frozen parameters side by side, and the layer puts them together when it computes. It
calls the same products, so the bits are the same. What a file says of a base was hashed before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dude_peft.machine.processes import from_first, is_first

_OF_STATE = ("shape", "dtype", "blocksize", "quant_type")
_OF_SCALES = ("dtype", "blocksize")
_TABLES = ("code", "offset", "outer_code")
"""Small, and some have no rows to cut."""


def unpack_(model: nn.Module) -> None:
    """Puts such a layer in the place of each of bitsandbytes', in all processes; every one has to call it.

    Args:
        model: the first process's, with its weights; the others' without values, on the meta device.
    """
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if _is_packed(layer)}
    told = from_first({name: _facts(layer) for name, layer in layers.items()} if is_first() else {})
    for name in told.keys() & layers.keys():
        layer = layers.pop(name)
        tensors = _tensors(layer) if is_first() else {}
        model.set_submodule(name, UnpackedLinear(layer, told[name], tensors))
        layer.weight = None  # which has a reference to the layer


class UnpackedLinear(nn.Module):
    """A frozen layer of bitsandbytes: packed weight, its scales, and what else its product needs to know."""

    def __init__(self, layer: Any, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Takes a layer's place.

        Args:
            layer: of bitsandbytes.
            facts: by `_facts`, of the process that has its weight.
            tensors: by `_tensors`; none where this process is sent them.
        """
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.facts = facts
        if "compute_dtype" in facts:
            self.compute_dtype: torch.dtype = facts["compute_dtype"]
        for name in facts["tensors"]:
            tensor = tensors.get(name, torch.empty(0, device="meta"))
            if name in _TABLES:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """(*, in) -> (*, out)."""
        return self._of_bytes(x) if "threshold" in self.facts else self._of_nibbles(x)

    def _of_nibbles(self, x: Tensor) -> Tensor:
        inner = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y: Tensor = _library().matmul_4bit(inner, self.weight, self._state(), bias=bias)
        return y.to(x.dtype)

    def _state(self) -> Any:
        kind, nested = _library().functional.QuantState, {}
        if "outer" in self.facts:
            outer = kind(absmax=self.outer_absmax, code=self.outer_code, **self.facts["outer"])
            nested = {"offset": self.offset, "state2": outer}
        return kind(absmax=self.absmax, code=self.code, **self.facts["state"], **nested)

    def _of_bytes(self, x: Tensor) -> Tensor:
        state = _library().MatmulLtState()
        state.CB, state.SCB = self.weight, self.absmax
        state.has_fp16_weights, state.threshold = False, self.facts["threshold"]
        state.use_pool = state.threshold > 0
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = _library().matmul(x, self.weight, state=state, bias=bias)
        return y


def _library() -> Any:
    """Optional, and slow to import."""
    import bitsandbytes

    return bitsandbytes


def _is_packed(layer: nn.Module) -> bool:
    """Whether it is one of bitsandbytes' linear layers; its package may not be here."""
    return type(layer).__module__.startswith("bitsandbytes.") and isinstance(layer, nn.Linear)


def _facts(layer: Any) -> dict[str, Any]:
    """All that is no tensor, and the names of those that are."""
    names = list(_tensors(layer))
    if hasattr(layer, "init_8bit_state"):
        return {"tensors": names, "threshold": layer.state.threshold}
    state = layer.weight.quant_state
    facts = {"tensors": names, "compute_dtype": layer.compute_dtype}
    facts["state"] = {name: getattr(state, name) for name in _OF_STATE}
    if state.nested:
        facts["outer"] = {name: getattr(state.state2, name) for name in _OF_SCALES}
    return facts


def _tensors(layer: Any) -> dict[str, Tensor]:
    weight = layer.weight
    if hasattr(layer, "init_8bit_state"):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return {"weight": weight.data, "absmax": scales}
    state = weight.quant_state
    found = {"weight": weight.data, "absmax": state.absmax, "code": state.code}
    if state.nested:
        outer = state.state2
        found |= {"offset": state.offset, "outer_absmax": outer.absmax, "outer_code": outer.code}
    return found
