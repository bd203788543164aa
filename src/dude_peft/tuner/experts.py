"""Adapted stacks of experts: a module that computes with them, and in front of it a layer of ours for every stack.

The module picks rows and multiplies them itself, so it is called as it is, with the effective stacks in the place of
its own: a twin of the module, which shares everything else with it. The module itself is not written to, so other
threads may be using it. Of several stacks of one module each has its layer, and one layer's `base_layer` is the next
one, as PEFT nests them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from dude_peft.core.rounding import is_half
from dude_peft.core.stack import effective_stack
from dude_peft.core.weight_rounding import round_weight
from dude_peft.errors import ConfigError
from dude_peft.parents import fits
from dude_peft.tuner.frozen import twin_of
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.stacks import Stack, stack_in

# Of the swap below, which is for modules that no twin can be made of.
_swapping = threading.RLock()


@fits()
class DudeExperts(DudeLinear):
    """A stack of experts with any number of adapters, each expert with factors and a magnitude of its own.

    Shapes: those of `DudeLinear`, with the number of experts before them.
    """

    def __init__(self, base_layer: nn.Module, layer_name: str, parameter_name: str) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, layer_name)

    def target(self) -> Stack:
        """The stack, where it lies in the module under all such layers."""
        return stack_in(innermost(self.base_layer), self.parameter_name)

    def place(self, module_name: str) -> str:
        while module_name.endswith(".base_layer"):
            module_name = module_name.removesuffix(".base_layer")
        return f"{module_name}.{self.parameter_name}"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module gives, computed with the effective stacks of its active adapters.

        Compiled code calls it as it is.
        """
        return _called(innermost(self), self._in_use(), args, kwargs)

    def _in_use(self) -> dict[str, Tensor]:
        """The stacks to compute with that are not those in the module, by their names."""
        return {layer.parameter_name: stack for layer in layers_in(self) if (stack := layer.in_use()) is not None}

    def in_use(self) -> Tensor | None:
        """The stack to compute with, as it is stored; None where it is the one in the module."""
        if self.disable_adapters:
            own: Tensor | None = self.lora_unmerged_weight
            return own
        names = self.unmerged_names()
        return self._weight_with(names) if names else None

    @property
    @override
    def weight(self) -> Tensor:
        """The stack in use, where the module calls it so."""
        if self.parameter_name != "weight":
            raise AttributeError(f"{type(self).__name__} has no weight")
        return self._read()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("__"):
                raise
            # Code outside of the module may read its stacks, asks it for sizes, and calls methods of its own.
            layer = next((one for one in layers_in(self) if one.parameter_name == name), None)
            if layer is not None:
                return layer._read()
            inner = innermost(base)
            found = getattr(inner, name)
            if isinstance(found, MethodType) and found.__self__ is inner and (stacks := self._in_use()):
                return MethodType(found.__func__, twin_of(inner, **stacks))
            return found

    def _read(self) -> Tensor:
        stack = self.in_use()
        own: Tensor = self.target().weight
        return own if stack is None else stack

    def _weight_with(self, names: list[str]) -> Tensor:
        stack = self.target()
        with torch.autocast(stack.weight.device.type, enabled=False):
            if len(names) == 1 and not self.merged:
                return self._effective(names[0], stack.plain_weight, stack.transposed)
            dtype = stack.weight.dtype
            own = stack if self.lora_unmerged_weight is None else stack.alone(self.lora_unmerged_weight)
            W0 = own.plain_weight.to(torch.promote_types(dtype, torch.float32))
            total = stack.plain_weight.to(W0.dtype)
            for name in names:
                total = total + (self._effective(name, W0, transposed=False) - W0)
            if is_half(dtype):  # rounded as everywhere, with the gradient of what is rounded
                rows = total.detach().reshape(-1, total.shape[-1])
                total = total + (round_weight(rows, dtype).to(total.dtype).view(total.shape) - total.detach())
            total = total.to(dtype)
            return total.mT.contiguous() if stack.transposed else total

    def _effective(self, name: str, W0: Tensor, transposed: bool) -> Tensor:
        state = self.tensors(name)
        assert state.dA is not None
        g = self.live_gain(name)
        if W0.ndim > 2:
            factors = (state.dA, state.dB, state.A0, state.B0)
            return effective_stack(W0, *factors, g, self.scaling[name], transposed=transposed)
        dA, dB, A0, B0, g = (
            None if tensor is None else tensor[None] for tensor in (state.dA, state.dB, state.A0, state.B0, g)
        )
        assert dA is not None
        assert dB is not None
        return effective_stack(W0[None], dA, dB, A0, B0, g, self.scaling[name], transposed=transposed)[0]

    def _own_layer(self) -> Any:
        stack = self.target()
        return stack if self.lora_unmerged_weight is None else stack.alone(self.lora_unmerged_weight)

    def orthogonality(self, adapter_name: str, groups: int) -> tuple[Tensor, Tensor]:
        """Not for experts. Raises ConfigError."""
        raise ConfigError(f"train.orthogonality: '{self.layer_name}' is a stack of experts; leave out one of the two")


def innermost(module: nn.Module) -> nn.Module:
    """The module that computes with stacks, under all layers of ours."""
    while isinstance(module, DudeExperts):
        module = module.base_layer
    return module


def layers_in(module: nn.Module) -> Iterator[DudeExperts]:
    """The layers of a module's stacks, the outermost first."""
    while isinstance(module, DudeExperts):
        yield module
        module = module.base_layer


def _called(module: Any, stacks: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    if not stacks:
        return module(*args, **kwargs)
    if "forward" in module.__dict__:  # accelerate's, which knows this object alone
        with _swapped(module, stacks):
            return module(*args, **kwargs)
    return twin_of(module, **stacks)(*args, **kwargs)


@contextmanager
def _swapped(module: nn.Module, stacks: Mapping[str, Tensor]) -> Iterator[None]:
    """Within: the module has these stacks; one thread at a time."""
    parameters: Any = module._parameters
    with _swapping:
        before = {name: parameters[name] for name in stacks}
        parameters.update(stacks)
        try:
            yield
        finally:
            parameters.update(before)
