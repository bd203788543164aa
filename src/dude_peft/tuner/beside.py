"""What an adapter relies on beside the layers that it adapts.

An adapter carries the fingerprints of the weights it changes. Resized embeddings, a head that was drawn by chance, and
running statistics stand in no checkpoint of the base model: where they are not saved with the adapter their
fingerprints are, so that a model which has others is noticed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dude_peft.artifact.fingerprint import TensorPrint, fingerprint, same_values
from dude_peft.errors import ArtifactError
from dude_peft.tuner import frozen
from dude_peft.tuner.heads import behind_backbone, embedding_modules, newly_initialised, plain_modules

# Of every tensor by its name: where it lies and its version, and the fingerprint taken then.
Prints = dict[str, tuple[tuple[int, int], TensorPrint]]


def prints_beside(model: nn.Module, known: Prints) -> Prints:
    """Fingerprints of what the adapters of a model rely on; those of before are kept for tensors that are the same.

    Args:
        model: the base model, adapted.
        known: of an earlier call.
    """
    prints: Prints = {}
    for name, tensor in relied_on(model):
        if not frozen.is_plain(tensor) or tensor.is_meta:
            continue
        place = (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        before = known.get(name)
        # Fused optimizers and batch norms write past the version; only what is frozen can be trusted to tell.
        frozen_one = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if before is None or before[0] != place or not frozen_one:
            before = place, fingerprint(tensor)
        prints[name] = before
    return prints


def check_beside(base: nn.Module, recorded: Mapping[str, TensorPrint], path: str, allow_mismatch: bool = False) -> None:
    """Compare a model with what an adapter relied on in training.

    Args:
        base: the base model, adapted or not.
        recorded: fingerprints by name, from the manifest.
        path: of the adapter, for messages.
        allow_mismatch: warn instead of refusing.

    Raises:
        ArtifactError: a tensor is absent, or another one.
    """
    held: dict[str, Tensor] = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers())
    held = {name.replace(".original_module.", "."): tensor for name, tensor in held.items()}
    other = [name for name, seen in recorded.items() if name not in held or not _holds(held[name], seen)]
    new = newly_initialised(base)
    drawn = [name for name in other if name.rpartition(".")[0] in new]
    if drawn:
        warnings.warn(
            f"adapter '{path}': '{drawn[0]}' is neither saved with it nor in the base model's checkpoint, and was "
            "drawn anew; outputs that depend on it are not those of training",
            stacklevel=3,
        )
    if wrong := [name for name in other if name not in drawn]:
        message = (
            f"adapter '{path}' relies on '{wrong[0]}', which is another one here, and was not saved with it "
            f"({len(wrong)} of {len(recorded)} such tensors)"
        )
        if not allow_mismatch:
            raise ArtifactError(f"{message}; load it on the model it was trained on, or name it in modules_to_save")
        warnings.warn(f"{message}; outputs will not be those of training", stacklevel=3)


def _holds(tensor: Tensor, seen: TensorPrint) -> bool:
    return tensor.is_meta or not frozen.is_plain(tensor) or same_values(tensor, seen)


def relied_on(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the base model that its adapters rely on beside the adapted layers."""
    embeddings: list[Any] = embedding_modules(model)
    whole = tuple(f"{name}." for name in (*behind_backbone(model), *newly_initialised(model)))
    seen: set[int] = set()  # tied ones count once
    for name, module in plain_modules(model):
        covered = module in embeddings or f"{name}.".startswith(whole)
        for key, parameter in module.named_parameters(name, recurse=False):
            if (covered or parameter.requires_grad) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield key, parameter
        if isinstance(module, _BatchNorm):
            yield from ((key, buffer) for key, buffer in module.named_buffers(name, recurse=False) if buffer.ndim)
