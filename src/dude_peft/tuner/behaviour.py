"""What a foreign layer does, found by calling it: a subclass of nn.Linear with a forward of its own may be anything.

transformers alone has some that are nn.Linear (FalconLinear), and some that route, group or quantise. A small twin of
the layer is called, of its class and with its settings, so the answer is the same for a model without weights and for a
loaded, sharded or hooked one. Where a twin cannot be had, the layer itself is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers.pytorch_utils import Conv1D


class Behaviour(Enum):
    """Of a layer's forward in evaluation, as a function of rows."""

    LINEAR = "x W^T + bias, of its own weight and bias"
    ROWS = "some other linear map of rows, plus its bias"
    OTHER = "anything else"


# Size (out, in) of the twin. The two differ, so that a transposed weight is noticed.
_SMALL = (24, 48)
# A class that insists on its own size gets a twin of that size, up to this number of elements.
_LARGEST = 1 << 26
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = {"weight", "bias"}
_EXACT = 1e-4  # float32 sums in whatever order
_ROUNDED = 5e-2  # of rows that are rounded to eight bits inside

_found: WeakKeyDictionary[nn.Module, Behaviour] = WeakKeyDictionary()


def behaviour_of(layer: nn.Module) -> Behaviour:
    """What the layer does with rows; asked once of every layer."""
    found = _found.get(layer)
    if found is None:
        with torch.no_grad():
            found = _of_twin(layer, _SMALL) or _of_twin(layer, layer_shape(layer)) or _of_itself(layer)
        _found[layer] = found
    return found


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of the layer's weight."""
    if isinstance(layer, Conv1D):
        return int(layer.nf), int(layer.nx)
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as (in, out)."""
    return isinstance(layer, Conv1D)


def has_more_tensors(layer: nn.Module) -> bool:
    """Whether the layer's function may follow from more than its weight and bias.

    So it does under torch's parametrizations, pruning and weight norm, and in layers with a scale of their own.
    """
    groups = (layer._parameters, layer._buffers, layer._modules)
    return not all(group.keys() <= _OWN for group in groups)


def _of_twin(layer: nn.Module, shape: tuple[int, int]) -> Behaviour | None:
    """Of a layer of the same class and settings with an (out, in) weight; None where it cannot be made or called."""
    out, in_ = shape
    if has_more_tensors(layer) or out * in_ > _LARGEST:
        return None
    with unset_fake_temporarily(), torch.device("cpu"), torch.autocast("cpu", enabled=False), _own_generator():
        weight, x = torch.randn(out, in_), torch.randn(5, in_)
        bias = None if getattr(layer, "bias", None) is None else torch.randn(out)
        try:
            twin = _twin(layer, weight, bias)
            y = twin(x)
            if _near(y, torch.nn.functional.linear(x, weight, bias), _EXACT):
                # Three axes are what models have; a layer that groups its rows by them shows here.
                whole = twin(x[:4].view(2, 2, in_))
                if _near(whole, y[:4].view(2, 2, out), _EXACT):
                    return Behaviour.LINEAR
            return _affine(twin, x, out, bias)
        except Exception:  # a foreign forward, with a size that its class may not take
            return None


def _twin(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    """The forward of a layer with the same class and settings and another weight, in evaluation, without hooks."""
    out, in_ = weight.shape
    twin: Any = type(layer).__new__(type(layer))
    state = {name: value for name, value in layer.__dict__.items() if name != "forward"}
    state |= {name: type(state[name])() for name in _HOOKS if name in state}
    sizes = {"nf": out, "nx": in_} if is_transposed(layer) else {"out_features": out, "in_features": in_}
    stored = weight.T.contiguous() if is_transposed(layer) else weight
    parameters = {
        "weight": nn.Parameter(stored, requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    twin.__dict__.update(state | sizes | {"_parameters": parameters, "_buffers": {}, "_modules": {}, "training": False})
    return twin.forward


def _of_itself(layer: nn.Module) -> Behaviour:
    """Of the layer as it is: by its values where it has them, else by the shape of its output alone."""
    weight: Any = layer.weight
    if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id"):
        return Behaviour.ROWS  # a share of a weight says nothing
    out, in_ = layer_shape(layer)
    modes = [(module, module.training) for module in layer.modules()]
    try:
        for module, _ in modes:
            module.training = False
        if weight.is_meta or isinstance(weight, FakeTensor):
            y: Any = type(layer).forward(layer, torch.zeros(5, in_, dtype=weight.dtype, device=weight.device))
            return Behaviour.ROWS if isinstance(y, Tensor) and tuple(y.shape) == (5, out) else Behaviour.OTHER
        with _own_generator():
            x = torch.randn(5, in_).to(weight.device, weight.dtype)
            return _affine(layer, x, out, getattr(layer, "bias", None))
    except Exception:  # what a layer cannot do with rows, it cannot do for the adapter
        return Behaviour.OTHER
    finally:
        for module, mode in modes:
            module.training = mode


def _affine(call: Any, x: Tensor, out: int, bias: Tensor | None) -> Behaviour:
    """ROWS where f(a x1 + b x2) - f(0) is a (f(x1) - f(0)) + b (f(x2) - f(0)), f(0) the bias, and f(x1) f(x1) again."""
    origin, y = call(torch.zeros_like(x)), call(x)
    if not isinstance(origin, Tensor) or origin.shape != (len(x), out) or not torch.equal(call(x), y):
        return Behaviour.OTHER
    constant = torch.zeros_like(origin) if bias is None else bias.expand_as(origin)
    if not _near(origin, constant, _ROUNDED):  # the adapter takes the bias out of the output
        return Behaviour.OTHER
    mixed = call(3 * x - 0.5 * x.flip(0)) - origin
    parts = 3 * (y - origin) - 0.5 * (y - origin).flip(0)
    return Behaviour.ROWS if _near(mixed, parts, _ROUNDED) else Behaviour.OTHER


def _near(found: Any, wanted: Tensor, tolerance: float) -> bool:
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    distance = (found.float() - wanted.float()).norm()
    return bool(distance <= tolerance * wanted.float().norm())  # NaN is near nothing


@contextmanager
def _own_generator() -> Iterator[None]:
    """Within: torch's generator starts from 0, for us and for layers that draw noise; then it is where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
