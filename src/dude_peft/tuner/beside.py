"""What an adapter relies on beside the layers that it adapts.

An adapter carries the fingerprints of the weights it changes, and of all else that the base model computes with:
embeddings, norms, heads, biases, running statistics, layers that it leaves alone. What is saved with the adapter needs
none; `same_base.py` compares.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from dude_peft.artifact.fingerprint import TensorPrint, fingerprint
from dude_peft.core.threads import single_threaded_pool
from dude_peft.tuner import frozen
from dude_peft.tuner.experts import DudeExperts, innermost, layers_in
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.offloaded import stored
from dude_peft.tuner.tied import DudeTiedHead

# Ours, with a frozen layer inside.
_LAYERS = (DudeLinear, DudeTiedHead)

# Of every tensor by its name: where it lies and its version, and the fingerprint taken then.
Prints = dict[str, tuple[tuple[int, int], TensorPrint]]


def prints_beside(model: nn.Module, known: Prints) -> Prints:
    """Fingerprints of what the adapters of a model rely on; those of before are kept for tensors that are the same.

    Of a tensor that is sharded by now, the fingerprint of before is kept: it was taken of the whole.

    Args:
        model: the base model, adapted.
        known: of an earlier call.
    """
    prints: Prints = {}
    anew: dict[str, Tensor] = {}
    different: dict[int, Tensor] = {}
    for name, tensor in relied_on(model):
        if frozen.is_sharded(tensor) and name in known:
            prints[name] = known[name]
        if not frozen.is_plain(tensor) or tensor.is_meta:
            continue
        # Fused optimizers and batch norms write past the version; only what is frozen can be trusted to tell.
        frozen_one = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if name in known and known[name][0] == _place(tensor) and frozen_one:
            prints[name] = known[name]
        else:
            anew[name] = different[id(tensor)] = tensor
    with single_threaded_pool(len(different)) as pool:  # hashing lets other threads run
        found = dict(zip(different, pool.map(fingerprint, different.values()), strict=True))
    return prints | {name: (_place(tensor), found[id(tensor)]) for name, tensor in anew.items()}


def relied_on(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the base model that its adapters rely on beside the adapted weights; tied ones have several.

    Buffers that no checkpoint holds (the angles of rotary embeddings) follow from the configuration.
    """
    for prefix, module in _own_modules(model):
        adapted = isinstance(module, _LAYERS) and not isinstance(module, DudeExperts)
        inner = module.get_base_layer() if isinstance(module, _LAYERS) else module
        changed = {layer.parameter_name for layer in layers_in(module)} or ({"weight"} if adapted else set())
        for name, parameter in inner.named_parameters(prefix, recurse=False):
            if (last := name.rpartition(".")[2]) not in changed:
                yield name, stored(inner, last) if parameter.is_meta else parameter
        for name, buffer in inner.named_buffers(prefix, recurse=False):
            kept = name.rpartition(".")[2] not in inner._non_persistent_buffers_set
            if kept and not adapted and buffer.ndim:
                yield name, buffer


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _own_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model, adapted layers as a whole; those that an adapter trains whole are its own."""
    if isinstance(model, AuxiliaryTrainingWrapper):
        return
    yield prefix, model
    if isinstance(model, _LAYERS) and not isinstance(model, DudeExperts):
        return
    for name, child in innermost(model).named_children():
        yield from _own_modules(child, f"{prefix}.{name}" if prefix else name)
