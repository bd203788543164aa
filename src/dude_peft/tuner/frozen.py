"""What the adapter has to know of the frozen layer under it: nn.Linear, GPT-2's Conv1D, or anything that maps rows.

A layer is transparent where its weight is a plain float matrix and its forward is the linear one, by name or by what it
does (`behaviour.py`); then the weight is read directly. Every other layer (bitsandbytes, torchao, GPTQ, ...) is opaque:
only its forward is used, on rows.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from dude_peft.artifact.fingerprint import TensorPrint, fingerprint, same_values, xxh3_of
from dude_peft.core.magnitude import rows_product
from dude_peft.show import a_
from dude_peft.tuner import behaviour
from dude_peft.tuner.behaviour import Behaviour, behaviour_of, has_more_tensors
from dude_peft.tuner.maps import as_matrix, as_weight, map_shape, why_no_map
from dude_peft.tuner.maps import is_map as is_map
from dude_peft.tuner.offloaded import device_of, held, only_offloads, stored
from dude_peft.tuner.stacks import Stack

_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A fake tensor has no values and stands for a plain one: `dude plan` runs a step of a model made of them.
_PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor)
_KNOWN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
Frozen: TypeAlias = nn.Module | Stack
"""What an adapter can be put on."""
# Identity rows pushed at a time through an opaque layer to read its weight.
_PROBE_ROWS = 512
# Of the change below, for layers that no twin can be made of.
_probing = threading.RLock()


def is_supported(layer: nn.Module) -> bool:
    """Whether the layer maps rows of in_features to rows of out_features by a weight."""
    return why_not(layer) is None


def why_not(layer: nn.Module) -> str | None:
    """Why a layer cannot be adapted, as the end of "target 'x' ..."; None where it can.

    The output projection inside nn.MultiheadAttention is none by itself: its forward is never called (`attention.py`).
    """
    if is_map(layer):
        return why_no_map(layer, _PLAIN_DTYPES)
    kind = type(layer).__name__
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "is a part of an nn.MultiheadAttention, which never calls it"
    if not isinstance(layer, (nn.Linear, Conv1D)):
        sized = all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features"))
        if not sized or "Linear" not in kind:
            return f"is {a_(kind)}, which is not a linear layer"
    if (
        type(layer).forward not in _KNOWN_FORWARDS
        and has_plain_weight(layer)
        and behaviour_of(layer) is Behaviour.OTHER
    ):
        features = layer_shape(layer)[1]
        return f"is {a_(kind)}, but its output is not a linear map of {features} input features plus its bias"
    return None


def base_of(module: nn.Module) -> nn.Module:
    """The frozen layer under an adapter's, whoever's; any other module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def twin_of(module: Any, /, **parameters: Any) -> nn.Module:
    """A module with the same tensors in an object of its own: another thread's forward may be in the module itself.

    Args:
        module: whose class, attributes and submodules it shares.
        **parameters: what it has in the places of the module's own.
    """
    twin = object.__new__(type(module))  # not copy.copy, which parametrized modules refuse
    twin.__dict__ = dict(module.__dict__)
    twin._parameters, twin._buffers = {**module._parameters, **parameters}, dict(module._buffers)
    return twin


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of the layer's weight as a matrix."""
    return map_shape(layer) if is_map(layer) else behaviour.layer_shape(layer)


def shape_of(layer: Frozen) -> tuple[int, ...]:
    """(out, in) of the layer's weight; (experts, out, in) of a stack."""
    return layer.shape if isinstance(layer, Stack) else layer_shape(layer)


def is_transposed(layer: Frozen) -> bool:
    """Whether the layer keeps its weight as (in, out)."""
    if isinstance(layer, Stack):
        return layer.transposed
    return isinstance(layer, nn.Embedding) or behaviour.is_transposed(layer)


def as_stored(layer: Frozen, matrix: Tensor) -> Tensor:
    """An (out, in) matrix, or (experts, out, in) stack, laid out as the layer keeps its weight."""
    if is_map(layer):
        return as_weight(layer, matrix)
    return matrix.mT.contiguous() if is_transposed(layer) else matrix


def plain_weight(layer: Frozen) -> Tensor | None:
    """The weight as an (out, in) view, or None where the layer is opaque; (experts, out, in) of a stack."""
    if isinstance(layer, Stack):
        return layer.plain_weight
    if is_map(layer):
        return as_matrix(layer, held(layer, "weight").detach())
    if not has_plain_weight(layer):
        return None
    if has_more_tensors(layer):
        return None
    if type(layer).forward not in _KNOWN_FORWARDS and behaviour_of(layer) is not Behaviour.LINEAR:
        return None
    weight: Any = held(layer, "weight")
    return weight.detach().T if is_transposed(layer) else weight.detach()


def has_plain_weight(layer: nn.Module) -> bool:
    """Whether the layer has a weight that is a float matrix, with or without values."""
    weight: Any = getattr(layer, "weight", None)
    return type(weight) in _PLAIN_TYPES and weight.ndim == 2 and weight.dtype in _PLAIN_DTYPES


def is_dense(layer: nn.Module, x: Tensor) -> bool:
    """Whether the layer's forward is nothing but `linear(x, weight, bias)` with a plain frozen weight in x's dtype."""
    if type(layer).forward is not nn.Linear.forward:
        return False
    if "forward" in layer.__dict__ and not only_offloads(layer):  # accelerate puts its own there
        return False
    weight: Any = layer._parameters.get("weight")  # past nn.Module's __getattr__, which takes longer
    if weight is None:
        weight = layer.weight
    if type(weight) not in _PLAIN_TYPES or weight.requires_grad or weight.dtype != x.dtype:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooked and not torch.is_autocast_enabled(x.device.type)


def dense_weight(layer: Frozen) -> Tensor:
    """The weight as plain_weight has it in float32 (float64 stays), read through the forward where it is opaque."""
    weight = plain_weight(layer)
    if weight is not None:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    assert not isinstance(layer, Stack), "it has a plain weight"
    _, in_ = layer_shape(layer)
    device = device_of(layer)
    columns = [
        _apply_rows(layer, torch.eye(min(_PROBE_ROWS, in_ - start), in_, device=device).roll(start, dims=1))
        for start in range(0, in_, _PROBE_ROWS)
    ]
    return torch.cat(columns).T.contiguous()


def product(layer: Frozen, rows: Tensor) -> Tensor:
    """`W0 rows^T`, (out, k) in the dtype of `rows`; differentiable in `rows`. Of a stack, each with an axis more."""
    weight = plain_weight(layer)
    if weight is not None:
        return rows_product(weight, rows)
    assert not isinstance(layer, Stack), "it has a plain weight"
    return _apply_rows(layer, rows).T


def compute_dtype(layer: Frozen) -> torch.dtype:
    """Float dtype in which the layer takes its input."""
    dtype = getattr(layer, "compute_dtype", None)  # bitsandbytes' 4-bit layer
    if isinstance(dtype, torch.dtype):
        return dtype
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in _PLAIN_DTYPES:
        return weight.dtype
    floats = (t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.dtype in _PLAIN_DTYPES)
    return next(floats, torch.float32)


def layer_fingerprint(layer: Frozen) -> TensorPrint:
    """Fingerprint of the layer's weight; of all its stored tensors where it is opaque."""
    if plain_weight(layer) is not None:
        return fingerprint(stored(layer, "weight"))
    assert not isinstance(layer, Stack), "it has a plain weight"
    tensors = {name: t for name, t in layer.state_dict().items() if isinstance(t, Tensor) and not name.endswith("bias")}
    flat = [part for _, tensor in sorted(tensors.items()) for part in plain_parts(tensor)]
    out, in_ = layer_shape(layer)
    return {"dtype": f"opaque:{type(layer).__name__}", "shape": [out, in_], "xxh3_128": xxh3_of(flat)}


def holds(layer: Frozen, recorded: TensorPrint) -> bool:
    """Whether the layer is the one whose fingerprint was recorded."""
    if plain_weight(layer) is not None:
        return same_values(stored(layer, "weight"), recorded)
    return layer_fingerprint(layer) == recorded


def _apply_rows(layer: nn.Module, rows: Tensor) -> Tensor:
    """The frozen forward without its bias, on a few rows."""
    rows_in = rows.to(compute_dtype(layer))
    if "forward" in layer.__dict__:  # accelerate's, which knows this object alone
        with _probed(layer):
            y = layer(rows_in)
    else:
        y = _as_probe_(_twin(layer))(rows_in)
    return y.to(torch.promote_types(rows.dtype, torch.float32))


def _as_probe_(layer: nn.Module) -> nn.Module:
    """Without its bias, as in training.

    A half-precision bias added and taken out again would take the product's digits with it. bitsandbytes' layers write
    into themselves in a forward: they pack the weight in eval mode, cast the bias, and keep the first input's dtype.
    """
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):
        zero = torch.zeros_like(bias)
        layer.bias = nn.Parameter(zero, requires_grad=False) if isinstance(bias, nn.Parameter) else zero
    layer.training = True
    return layer


def _twin(layer: Any) -> nn.Module:
    int8 = hasattr(layer, "init_8bit_state")  # bitsandbytes': its first forward moves the scales into its state
    if int8 and layer.weight.CB is not None:
        layer.init_8bit_state()
    twin: Any = twin_of(layer)
    if int8:
        twin.state = copy.copy(layer.state)
    return twin


@contextmanager
def _probed(layer: nn.Module) -> Iterator[None]:
    """Within: the layer itself is a probe; one thread at a time."""
    state = layer.__dict__
    with _probing:
        kept: dict[str, Any] = {
            name: state[name] for name in ("training", "compute_dtype", "compute_type_is_set") if name in state
        }
        bias = getattr(layer, "bias", None)
        _as_probe_(layer)
        try:
            yield
        finally:
            state.update(kept)
            if isinstance(bias, Tensor):
                layer.bias = bias


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """A tensor subclass (torchao) as the plain tensors inside it."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in plain_parts(getattr(tensor, name))]


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a whole float tensor, no share or packed form of one."""
    return type(tensor) in _PLAIN_TYPES and tensor.dtype in _PLAIN_DTYPES and not is_sharded(tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a share of it: FSDP2's DTensors and DeepSpeed's partitioned parameters."""
    if type(tensor) is Tensor:  # plain ones have neither, and torch takes microseconds to find that
        return False
    return hasattr(tensor, "ds_id") or (type(tensor) is not nn.Parameter and hasattr(tensor, "device_mesh"))
