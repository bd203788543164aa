"""One training step of a model without weights, forward and backward, under fake tensors.

The tensors say they are on the CPU: there our layer runs block by block, whose temporaries are as small as those of the
Triton kernels, and the attention is the fused one. The step is Trainer's: autocast around the model, the outputs back
in float32, the loss with the model's own function, or with ours where answers are judged. Of the model's outputs
Trainer keeps the loss alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dude_peft.measure.token_logps import logps_at
from dude_peft.model.outputs import can_keep_few, is_scorer
from dude_peft.planning.layers import decoder_layers
from dude_peft.planning.liger import loss_in_chunks
from dude_peft.planning.live_bytes import NOTHING, LiveBytes, Stretch
from dude_peft.planning.seen import known


@dataclass(frozen=True)
class Judged:
    """What a loss of answers takes: log-probabilities of tokens at the end of each row."""

    answer: int
    """Tokens that are judged."""
    logits: int
    """Tokens whose logits are computed, where the model can leave out the others."""
    imitated: int
    """Tokens of the first half of the rows, the better answers, whose cross-entropy counts too; 0 for none."""


@dataclass
class DryStep:
    """The parts of a step, in the order in which they happen."""

    before: Stretch = NOTHING
    """Inputs, embeddings, masks, the vision tower."""
    forward: list[Stretch] = field(default_factory=list)
    """The forward of every kind of layer."""
    head: Stretch = NOTHING
    """Final norm, logits, loss, and their backward."""
    backward: list[Stretch] = field(default_factory=list)
    """The backward of every kind of layer, by kind."""
    after: Stretch = NOTHING
    """The backward of what is before the layers."""

    def has(self, kinds: int) -> bool:
        """Whether every layer ran, once each and one after the other."""
        return len(self.forward) == len(self.backward) == kinds


def dry_step(
    model: nn.Module,
    kinds: int,
    rows: int,
    length: int,
    *,
    bf16: bool,
    checkpointing: bool,
    packed: bool = False,
    chunked: bool = False,
    judged: Judged | None = None,
    gpu: bool = False,
    batch: dict[str, Tensor] | None = None,
    batches: int = 1,
) -> DryStep:
    """Runs the step and takes its memory apart.

    Args:
        model: adapted, on the meta device, with `kinds` decoder layers (`layers.shorten`); it is used up.
        kinds: 0 for a model that was not shortened: then all of the step is its head.
        rows: of the batch.
        length: tokens of a row.
        bf16: bfloat16 autocast.
        checkpointing: gradient checkpointing.
        packed: the rows are laid end to end, as one.
        chunked: the loss is taken in chunks, as Liger does.
        judged: what a loss of answers takes; None for the cross-entropy of all tokens.
        gpu: whether a GPU trains.
        batch: with images, whose numbers are known; None for one of text, by its size.
        batches: with images that are in memory together.
    """
    adapted: Any = model
    step = DryStep()
    with FakeTensorMode(allow_non_fake_inputs=True):
        adapted._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        if checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.config.use_cache = False
        adapted.train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        with known() if batch else nullcontext(), LiveBytes(trained, gpu=gpu) as live:
            _watch(decoder_layers(adapted, kinds), step, live)
            others: list[Tensor] = []
            if batch is None:
                ids = torch.zeros(*((1, rows * length) if packed else (rows, length)), dtype=torch.long)
                beside = "position_ids" if packed else "attention_mask"
                given = {"input_ids": ids, beside: torch.ones_like(ids), "labels": ids}
            else:
                given = {name: tensor.clone() for name, tensor in batch.items()}  # which is counted
                others = [torch.empty(t.shape, dtype=t.dtype) for t in given.values() for _ in range(batches - 1)]
            loss = _loss(adapted, given, bf16, chunked, judged)
            loss.backward()
            last = live.stretch()
            del others
    if kinds:
        if len(step.backward) < kinds:  # nothing before the layers has a gradient
            step.backward.append(last)
        else:
            step.after = last
        step.backward.reverse()  # it came last layer first
    else:
        step.head = last
    return step


def _loss(model: Any, batch: dict[str, Tensor], bf16: bool, chunked: bool, judged: Judged | None) -> Any:
    if chunked:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return loss_in_chunks(model, batch)
    scores = is_scorer(model)
    few: dict[str, int] = {}
    if scores or judged is not None:  # any loss of a few numbers is as large as another
        del batch["labels"]
        if judged is not None and judged.logits < batch["input_ids"].shape[1] and can_keep_few(model):
            few = {"logits_to_keep": judged.logits}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = model(**batch, **few)
    found = convert_to_fp32(outputs) if bf16 else outputs
    if judged is not None:
        return _summed(found.logits, judged)
    return found.logits.sum() if scores else found.loss


def _summed(logits: Tensor, judged: Judged) -> Tensor:
    loss = _of_the_last(logits, judged.answer)
    return loss + _of_the_last(logits[: len(logits) // 2], judged.imitated) if judged.imitated else loss


def _of_the_last(logits: Tensor, tokens: int) -> Tensor:
    places = torch.arange(logits.shape[0] * logits.shape[1]).view(logits.shape[:2])[:, -tokens:].flatten()
    return logps_at(logits.flatten(0, 1), places, torch.zeros_like(places)).sum()


def _watch(layers: list[nn.Module], step: DryStep, live: LiveBytes) -> None:
    """Has each layer's forward and backward counted for itself."""
    if not layers:
        return

    def begins(layer: nn.Module, inputs: Any) -> None:
        if step.forward:  # checkpointing runs it once more
            return
        step.before = live.stretch()
        if inputs and inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: arrives(-1))

    def ends(layer: nn.Module, inputs: Any, output: Any) -> None:
        number = len(step.forward)
        if number == len(layers):
            return
        step.forward.append(live.stretch())
        hidden: Any = output if isinstance(output, Tensor) else output[0]
        hidden.register_hook(lambda gradient: arrives(number))

    def arrives(number: int) -> None:
        """The gradient of a layer's output is there: what was behind the layer is done."""
        if number == len(layers) - 1:
            step.head = live.stretch()
        else:
            step.backward.append(live.stretch())

    layers[0].register_forward_pre_hook(begins)
    for layer in layers:
        layer.register_forward_hook(ends)
