"""Stacks of experts: a parameter (experts, out, in) or (experts, in, out) of a module that computes with it itself.

transformers keeps the experts of a layer in such parameters, and says on the module which side is which:
`is_transposed` is true where they are (experts, in, out). The few classes that do not say are listed here, as their
code was read. Where neither tells, the stack is refused: a magnitude belongs to an output feature, and the wrong side
has no meaning.

A matrix (out, in) that a module keeps as such a parameter, as nn.MultiheadAttention does, is a stack of no experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dude_peft.show import a_

_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor)
# Classes of transformers without `is_transposed` -> whether their stacks are (experts, in, out).
_UNSAID = {
    "Llama4TextExperts": True,
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}


@dataclass
class Stack:
    """A stack of experts, or one matrix, where it lies; `weight` is the parameter, as a linear layer calls it."""

    module: Any
    name: str
    transposed: bool

    @property
    def weight(self) -> Any:
        """The parameter as it is stored."""
        return getattr(self.module, self.name)

    @weight.setter
    def weight(self, parameter: nn.Parameter) -> None:
        setattr(self.module, self.name, parameter)

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, out, in); (out, in) of one matrix."""
        *experts, rows, columns = self.weight.shape
        return (*experts, columns, rows) if self.transposed else (*experts, rows, columns)

    @property
    def plain_weight(self) -> Tensor:
        """The (experts, out, in) view of it; (out, in) of one matrix."""
        weight: Tensor = self.weight.detach()
        return weight.mT if self.transposed else weight

    def alone(self, weight: Tensor) -> Stack:
        """The same with another weight, and without the module."""
        return Stack(SimpleNamespace(**{self.name: weight}), self.name, self.transposed)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its one parameter."""
        yield self.weight

    def buffers(self) -> Iterator[Tensor]:
        """None."""
        yield from ()


def stack_in(module: nn.Module, name: str) -> Stack:
    """The stack of a name in the module that computes with it; `why_no_stack` says whether it is one."""
    return Stack(module, name, bool(_is_transposed(module)))


def why_no_stack(module: nn.Module, name: str) -> str | None:
    """Why a parameter of a module cannot be adapted as a stack, as the end of "'x' ..."; None where it can."""
    kind, weight = type(module).__name__, getattr(module, name)
    if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id"):
        return f"of {a_(kind)} is split among processes; add the adapter before the model is split"
    if type(weight) not in _PLAIN_TYPES or weight.dtype not in _PLAIN_DTYPES:
        return f"of {a_(kind)} is quantised ({str(weight.dtype).removeprefix('torch.')}); load the model unquantised"
    if weight.ndim != 3:
        return (
            f"of {a_(kind)} has shape {list(weight.shape)}, and is no stack of experts; name layers in target_modules, "
            "or train the module whole with modules_to_save"
        )
    if _is_transposed(module) is None:
        return (
            f"of {a_(kind)} does not tell which of its sides is the output; set `is_transposed` on the module, True "
            "where it is (experts, in, out)"
        )
    if getattr(module, "_is_expert_parallel", False):
        return f"of {a_(kind)} is split among processes (expert parallelism), which is not supported"
    return None


def stack_of(model: nn.Module, name: str) -> Stack | None:
    """The stack of a full name in a plain model; None where there is none."""
    place, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(place)
    except AttributeError:
        return None
    if not isinstance(module._parameters.get(last), Tensor) or why_no_stack(module, last) is not None:
        return None
    return stack_in(module, last)


def _is_transposed(module: nn.Module) -> bool | None:
    said = module.__dict__.get("is_transposed", getattr(type(module), "is_transposed", None))
    return said if isinstance(said, bool) else _UNSAID.get(type(module).__name__)
