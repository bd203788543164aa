"""The peak memory of a training step, as a bill: what lives in a process at the moment at which the most does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dude_peft.config.schema import (
    CpoSection,
    DpoSection,
    GrpoSection,
    Paired,
    RewardModelSection,
    RunConfig,
    TrainSection,
)
from dude_peft.data.batches import Example
from dude_peft.planning.adapted import adapted_model
from dude_peft.planning.dry_step import DryStep, Judged, dry_step
from dude_peft.planning.layers import every_layer, shorten
from dude_peft.planning.live_bytes import Stretch
from dude_peft.planning.optimizers import state_bytes, step_bytes
from dude_peft.planning.packed import PackedLinear
from dude_peft.planning.seen import seen_batch
from dude_peft.planning.spread import ALONE, Exchange, Spread, exchange_of
from dude_peft.show import reason_of
from dude_peft.tuner import DudeLinear

# A process that has done nothing yet: libraries, and on a GPU its context and the workspace of its products. Assumed.
RUNTIME_BYTES = 768 << 20


@dataclass(frozen=True)
class Static:
    """What lives all the time, from shapes alone."""

    trainable_parameters: int
    total_parameters: int
    weights: int
    """Bytes of the frozen model in one process."""
    adapter_frozen: int
    """Bytes of A0, B0, m0 and what is cached of them."""
    trained: tuple[Tensor, ...]
    """What one process has of the trained parameters, on the meta device."""
    packed_parameters: int
    """Those of quantised layers."""
    dtype: torch.dtype
    """Of the weights that are not quantised."""


@dataclass(frozen=True)
class Bill:
    """Bytes at the peak, by what they are for; `total` is their sum."""

    weights: int
    adapter_frozen: int
    trained: int
    optimizer: int
    gradients: int
    activations: int
    """Kept for the backward at that moment."""
    logits_and_loss: int
    """Where the peak is in the loss: what the head of the model makes."""
    working: int
    """Elsewhere: what the layer, or the optimizer, makes for a moment."""
    runtime: int
    """Libraries and the device's own; assumed, not computed."""
    exchanged: int = 0
    """Of several processes: blocks gathered from all of them, or gradients as they are sent."""
    reward_models: int = 0
    """Models that give rewards, beside the one that learns."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Cost:
    """What a run costs, as far as it can be known without its weights."""

    static: Static
    bill: Bill
    peak_in: str
    """The part of the step in which the most lives."""
    flops: int
    """Of the matrix products of one forward and backward pass."""
    flops_before: int
    """Of these, what comes before the layers: the vision tower's."""
    exchange: Exchange
    """What the processes of the run send one another."""
    uncounted: str = ""
    """Why the step could not be run without weights, where it could not; then the bill has no activations."""


@dataclass(frozen=True)
class _Moment:
    where: str
    activations: int
    gradients: int
    working: int
    exchanged: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.working + self.exchanged


def cost(
    config: RunConfig,
    settings: Any,
    where: str,
    length: int,
    *,
    gpu: bool,
    begins: int = 0,
    whole: bool = False,
    spread: Spread = ALONE,
    example: Example | None = None,
) -> Cost:
    """The bill of a run's training step in one process.

    Args:
        config: the resolved run.
        settings: of the model, from `train.model.load_settings`; is not changed.
        where: from `train.model.locate`.
        length: tokens of the longest row; the batch is filled with such rows.
        gpu: whether a GPU trains.
        begins: tokens in front of the first judged one of any row, where answers are judged.
        whole: run all layers instead of one of each kind; slower, and the same.
        spread: the processes that train together.
        example: with the most images of those that are learned; None where none has any.

    Raises:
        ConfigError: whatever the real run would refuse.
        DataError: an image was changed since the rows were read.
    """

    def adapted() -> Any:
        own = type(settings).from_dict(settings.to_dict())
        return adapted_model(config, own, where, sees=example is not None)

    model, train = adapted(), config.train
    static = _static(model, spread)
    exchange = exchange_of(model, spread, train.gradient_accumulation_steps)
    # Features of images are added behind layers by their numbers (deepstack), so none is left out then.
    order = [] if whole else shorten(model) if example is None else every_layer(model)
    kinds = len(set(order))
    rows, uncounted = rows_of_batch(train), ""
    batch = None if example is None else seen_batch(example, rows, length)
    # Trainer takes all batches of an optimizer step at once. One more waits where they are made: on the CPU.
    taken, waiting = train.gradient_accumulation_steps, int(not gpu)
    options: dict[str, Any] = {
        "bf16": train.autocasts,
        "checkpointing": train.gradient_checkpointing,
        "packed": config.data.packing,
        "chunked": train.chunks_loss,
        "judged": _judged(train, length, begins),
        "gpu": gpu,
        "batch": batch,
        "batches": taken + waiting,
    }
    try:
        step = dry_step(model, kinds, rows, length, **options)
        if not step.has(kinds):  # layers that share, skip or repeat one another cannot be put together from one each
            order = []
            step = dry_step(adapted(), 0, rows, length, **options)
    except Exception as error:  # of any operator that cannot be traced: experts in float32, say
        step, order = DryStep(), []
        uncounted = reason_of(error, 160)
    trained = sum(parameter.nbytes for parameter in static.trained)
    # From the second pass on all gradients are there, and whole: they are sent with the last pass.
    held = exchange.trained if train.gradient_accumulation_steps > 1 else None
    moments = [
        replace(moment, gradients=spread.share(moment.gradients) if held is None else held)
        for moment in _moments(step, order, exchange)
    ]
    at_once = step_bytes(train.optim, static.trained, gpu=gpu)
    moments.append(_Moment("the optimizer's step", 0, trained, at_once, exchange.kept))
    if batch is not None:  # those of the last step are still there
        moments.append(_Moment("the next images", 0, 0, (2 * taken + waiting) * _bytes([*batch.values()])))
    peak = max(moments, key=lambda moment: moment.total)
    in_head = peak.where == _HEAD
    bill = Bill(
        weights=static.weights,
        adapter_frozen=static.adapter_frozen,
        trained=trained,
        optimizer=state_bytes(train.optim, static.trained),
        gradients=peak.gradients,
        activations=peak.activations,
        logits_and_loss=peak.working if in_head else 0,
        working=0 if in_head else peak.working,
        runtime=RUNTIME_BYTES,
        exchanged=peak.exchanged,
    )
    return Cost(
        static, bill, peak.where, _flops(step, order), step.before.flops + step.after.flops, exchange, uncounted
    )


def _judged(train: TrainSection, length: int, begins: int) -> Judged | None:
    section = train.section
    if section is None or isinstance(section, RewardModelSection):
        return None
    answer = max(length - begins, 1)
    # As `fit` has it: logits in front of the answers are left out, but orpo learns questions too.
    few = isinstance(section, DpoSection | CpoSection | GrpoSection)
    logits = min(answer + 1, length) if few else length  # the token before predicts the first judged one
    imitates = isinstance(section, Paired) and section.nll > 0
    return Judged(answer, logits, imitated=(answer if few else length) if imitates else 0)


def rows_of_batch(train: TrainSection) -> int:
    """Rows in one forward pass; a pair is two."""
    return train.per_device_train_batch_size * train.sides


def _static(model: nn.Module, spread: Spread) -> Static:
    frozen_parts = {
        id(buffer)
        for layer in model.modules()
        if isinstance(layer, DudeLinear)
        for name, buffer in layer.named_buffers()
        if not name.startswith("base_layer.")
    }
    parameters = list(model.parameters())
    trained = [p.detach() for p in parameters if p.requires_grad]
    buffers = list(model.buffers())
    packed = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    return Static(
        trainable_parameters=sum(p.numel() for p in trained),
        total_parameters=sum(p.numel() for p in parameters) + sum(p.numbers - p.weight.numel() for p in packed),
        weights=_bytes(
            [spread.kept(p) for p in parameters if not p.requires_grad]
            + [b for b in buffers if id(b) not in frozen_parts]
        ),
        adapter_frozen=_bytes([b for b in buffers if id(b) in frozen_parts]),
        trained=tuple(spread.kept(parameter) for parameter in trained),
        packed_parameters=sum(layer.numbers for layer in packed),
        dtype=next((p.dtype for p in parameters if p.is_floating_point() and not p.requires_grad), torch.float32),
    )


_HEAD = "the loss"
_BEFORE = "what is before the layers: embeddings, images"


def _moments(step: DryStep, order: list[int], exchange: Exchange) -> list[_Moment]:
    """The memory of the whole model's step at its parts, put together from one layer of each kind.

    Layers of one kind leave behind the same and need the same, so a sum over the layers is exact.
    """
    forward, backward = exchange.in_forward, exchange.in_backward
    parts = [(_BEFORE, step.before, forward)]
    parts += [(f"the forward of layer {index}", step.forward[kind], forward) for index, kind in enumerate(order)]
    parts.append((_HEAD, step.head, exchange.in_loss if order else max(forward, backward)))
    parts += [(f"the backward of layer {i}", step.backward[order[i]], backward) for i in reversed(range(len(order)))]
    parts.append((f"the backward of {_BEFORE}", step.after, backward))
    moments = []
    live = gradients = 0
    for where, stretch, exchanged in parts:
        moments.append(_Moment(where, live, gradients, stretch.peak, exchanged))
        live += stretch.net
        gradients += stretch.gradients
    return moments


def _flops(step: DryStep, order: list[int]) -> int:
    ends: list[Stretch] = [step.before, step.head, step.after]
    layers = [step.forward[kind] for kind in order] + [step.backward[kind] for kind in order]
    return sum(stretch.flops for stretch in ends + layers)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
