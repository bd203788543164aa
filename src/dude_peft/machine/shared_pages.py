"""The tensors of one process's model in memory that the other processes of the machine use as well.

The first process writes them into a file without a name (memfd), which is gone with the last process that has it,
however that ends. All processes, the first one too, map it privately: a page is shared until one of them writes to it,
and what is written stays with that process. Views of the checkpoint's own file would be shared as well. But tensors
begin anywhere in it, and the last bits of some products depend on where. Here they begin as in torch's own memory.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dude_peft.machine.pages import MappedFiles, return_freed_blocks
from dude_peft.machine.places import Part, Place, empty_ones, parts_of, places_of, put, unlike

if TYPE_CHECKING:
    from torch import Tensor, nn

_ALIGNED_BYTES = 64  # as torch's allocator on CPUs
_TOKEN_BYTES = 32
_AT_ONCE_BYTES = 2**27
"""Moved before the memory that was left behind is given back."""


class NotSharedError(Exception):
    """The tensors of a model cannot be shared here; it says why."""


@dataclass(frozen=True)
class _InFile:
    """Where a tensor is in the file."""

    part: Part
    stride: tuple[int, ...]
    offset: int
    """In bytes."""


@dataclass(frozen=True)
class Offer:
    """What another process has to know in order to map the tensors."""

    path: str
    """Of the file, as other processes see it."""
    token: bytes
    """What it begins with: elsewhere the same path may mean another file."""
    size: int
    places: tuple[_InFile, ...]


class Shared:
    """The tensors of a model of this process, in a file that others can map until `close`."""

    def __init__(self, model: nn.Module) -> None:
        """Moves all tensors of a model on the CPU into the file, one after the other, so that memory has them once.

        Raises:
            NotSharedError: this system has no such files, or the model has tensors of another kind.
        """
        if sys.platform != "linux":
            raise NotSharedError(f"{sys.platform} has no memfd_create")
        places = places_of(model)
        parts = parts_of(places, dict.fromkeys(places, True))
        tensors = [_at(places[part.names[0]]) for part in parts]
        _check_plain(parts, tensors)
        try:
            self._file = os.memfd_create("dude-base", os.MFD_CLOEXEC)
        except (OSError, AttributeError) as error:  # musl's Python may be built without
            raise NotSharedError(f"memfd_create does not work here: {error}") from error
        try:
            self.offer = self._moved(parts, tensors)
        except OSError as error:
            self.close()
            raise NotSharedError(f"memory for it was refused: {error.strerror}") from error

    def close(self) -> None:
        """No process can map the file any more; those that have it keep it."""
        os.close(self._file)

    def _moved(self, parts: list[Part], tensors: list[Tensor]) -> Offer:
        found, end = [], _TOKEN_BYTES
        for part, tensor in zip(parts, tensors, strict=True):
            offset = -(-end // _ALIGNED_BYTES) * _ALIGNED_BYTES
            found.append(_InFile(part, _dense_stride(tensor), offset))
            end = offset + tensor.nbytes
        token = secrets.token_bytes(_TOKEN_BYTES)
        os.ftruncate(self._file, end)
        _write(self._file, memoryview(token), 0)
        memory, files, returned = _mapped(self._file, end), MappedFiles(), 0
        while tensors:
            place = found[-len(tensors)]
            tensor = tensors.pop(0)
            if tensor.numel():
                values = tensor.detach()
                _write(self._file, _bytes_of(values, place.stride), place.offset)
                files.let_go(values)
                tensor.data = _tensor(memory, place)
                del values
            if place.offset - returned > _AT_ONCE_BYTES:
                return_freed_blocks()
                returned = place.offset
        return_freed_blocks()
        return Offer(f"/proc/{os.getpid()}/fd/{self._file}", token, end, tuple(found))


def take_up_(model: nn.Module, offer: Offer) -> None:
    """Gives a model that was made without values those of another process on this machine, in place.

    Args:
        model: of the same modules, on the meta device.
        offer: of that process.

    Raises:
        NotSharedError: its memory cannot be reached, or the models have other tensors.
    """
    places = places_of(model)
    if different := unlike([place.part for place in offer.places], empty_ones(places)):
        raise NotSharedError(f"made without its checkpoint the model has other tensors, among them {different[0]}")
    try:
        file = os.open(offer.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait
    except OSError as error:
        raise NotSharedError(f"{offer.path} cannot be opened: {error.strerror}") from error
    try:
        same = os.fstat(file).st_size == offer.size and os.pread(file, _TOKEN_BYTES, 0) == offer.token
        if not same:
            raise NotSharedError(f"{offer.path} is something else in this process, as it is in another container")
        memory = _mapped(file, offer.size)
    except OSError as error:
        raise NotSharedError(f"{offer.path} cannot be mapped: {error.strerror}") from error
    finally:
        os.close(file)
    for place in offer.places:
        put(places, place.part, _as_part(_tensor(memory, place), place.part))


def own_copies_(model: nn.Module) -> None:
    """Moves every tensor of a model into memory of this process alone, in place; it begins as in a shared file."""
    places, files = places_of(model), MappedFiles()
    for part in parts_of(places, empty_ones(places)):
        tensor = _at(places[part.names[0]])
        old = tensor.detach()
        tensor.data = old.clone()
        files.let_go(old)


def _at(place: Place) -> Tensor:
    holder, key = place
    tensor: Tensor = holder[key]
    return tensor


def _check_plain(parts: list[Part], tensors: list[Tensor]) -> None:
    import torch

    for part, tensor in zip(parts, tensors, strict=True):
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu":
            raise NotSharedError(f"{part.names[0]} is no plain tensor on the CPU")


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Of a copy."""
    import torch

    return torch.empty_like(tensor, device="meta").stride()


def _bytes_of(tensor: Tensor, stride: tuple[int, ...]) -> memoryview:
    import torch

    if tensor.stride() != stride:
        tensor = tensor.clone()
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy declares the protocol from Python 3.12 on


def _write(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)  # 2 GiB at most
        content, offset = content[written:], offset + written


def _mapped(file: int, size: int) -> mmap.mmap:
    return mmap.mmap(file, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _tensor(memory: mmap.mmap, place: _InFile) -> Tensor:
    """A tensor with a storage of its own; the mapping lives as long as one of them does."""
    import torch

    part = place.part
    if not (numbers := math.prod(part.shape)):
        return torch.empty(part.shape, dtype=part.dtype)
    flat = torch.frombuffer(memory, dtype=part.dtype, count=numbers, offset=place.offset)
    return flat.as_strided(part.shape, place.stride)


def _as_part(tensor: Tensor, part: Part) -> Any:
    from torch import nn

    return nn.Parameter(tensor, requires_grad=part.is_trained) if part.is_parameter else tensor
