"""A run in several processes: what each of them keeps of a tensor, gathers for a moment, and sends.

DDP keeps everything in every process, and the gradients a second time, as they are sent. FSDP2 keeps a share of the
rows of every parameter; buffers are whole. In the step the embeddings and the head stay gathered, and the blocks come
one after the other: how many are whole at once is torch's doing, and tests/test_plan_processes.py asks torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dude_peft.machine.sharding import blocks


@dataclass(frozen=True)
class Spread:
    """The processes of a run."""

    strategy: str = "ddp"
    """ddp, fsdp2 or zero3."""
    processes: int = 1

    @property
    def cuts(self) -> bool:
        """Whether a process keeps a share of the parameters instead of all."""
        return self.processes > 1 and self.strategy != "ddp"

    def kept(self, parameter: Tensor) -> Tensor:
        """What one process keeps of a parameter, on the meta device."""
        if not self.cuts or parameter.dim() == 0:
            return parameter
        rows = -(-parameter.shape[0] // self.processes)
        return torch.empty(rows, *parameter.shape[1:], dtype=parameter.dtype, device="meta")

    def share(self, size: int) -> int:
        """Bytes that one process keeps of so many."""
        return -(-size // self.processes) if self.cuts else size


ALONE = Spread()


@dataclass(frozen=True)
class Exchange:
    """What processes send one another, in bytes of one process."""

    trained: int
    """Of all trained parameters, whole: gradients that were not sent yet."""
    kept: int
    """What DDP keeps all the time: the gradients, as they are sent."""
    outside: int
    """What FSDP2 gathers for a whole step: parameters outside of blocks."""
    block: int
    """What it gathers for a moment: the largest block."""
    block_trained: int
    """Of that, what has a gradient."""
    sent: int
    """In one optimizer step, in rings."""
    whole: int
    """Of all parameters and buffers: what the process that reads the model has for a moment."""

    @property
    def in_forward(self) -> int:
        """While a block computes: it, the next one on its way, and what the last one came in, which is freed late."""
        return self.kept + self.outside + 3 * self.block

    @property
    def in_loss(self) -> int:
        """Behind the last block, which is cut again."""
        return self.kept + self.outside + self.block

    @property
    def in_backward(self) -> int:
        """While a block computes: it, the one before it on its way, and the gradients of the one behind it."""
        return self.kept + self.outside + 2 * self.block + self.block_trained


def exchange_of(model: nn.Module, spread: Spread, accumulation: int) -> Exchange:
    """What the processes of a run exchange in a step.

    With N processes, G bytes of gradients, P bytes of parameters (B of them in blocks) and k micro-batches, each
    process sends

        ddp:           2 (N - 1) / N G
        fsdp2, zero3:  (N - 1) / N (k (P + B) + G)

    since blocks are gathered for the forward and again for the backward.

    Args:
        model: adapted, on the meta device, with all its layers.
        spread: the processes.
        accumulation: micro-batches of an optimizer step.
    """
    parameters = list(model.parameters())
    total, trained = _bytes(parameters), _trained(parameters)
    whole = total + _bytes(list(model.buffers()))
    others = spread.processes - 1
    if not spread.cuts:
        sent = 2 * others * trained // spread.processes
        return Exchange(trained, trained if others else 0, 0, 0, 0, sent, whole)
    parts = [list(block.parameters()) for block in blocks(model, model)]
    inside = sum(map(_bytes, parts))
    gathered = accumulation * (inside + total)
    sent = others * (gathered + trained) // spread.processes
    largest, changed = max(map(_bytes, parts), default=0), max(map(_trained, parts), default=0)
    return Exchange(trained, 0, total - inside, largest, changed, sent, whole)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _trained(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
