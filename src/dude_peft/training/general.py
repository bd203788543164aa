"""What a run does to general ability: the loss on held-out general rows, and how far they have moved from the base.

kl_base_tuned = KL(base || tuned): what the base says, and the tuned model no longer does; objective mol lowers it
kl_tuned_base = KL(tuned || base): what the tuned model says, and the base would not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from typing_extensions import override

from dude_peft.data.batches import Company, grouped, pad_right
from dude_peft.errors import NumericsError
from dude_peft.measure.divergence import divergence
from dude_peft.parents import fits
from dude_peft.training.objective import judged
from dude_peft.training.training_set import GeneralTest
from dude_peft.tuner.untouched import as_base

_CHUNK = 2**24
"""Wide numbers held at a time."""


@torch.no_grad()  # not inference_mode: the first forward of a sharded model makes the buffers that training writes
def general_scores(
    model: Any,
    examples: Sequence[Mapping[str, Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int,
    company: Company = "any",
) -> dict[str, float]:
    """`loss`, `kl_base_tuned`, `kl_tuned_base`: means in nats over all judged tokens; every token counts the same."""
    model.eval()
    sums, tokens = {"loss": 0.0, "kl_base_tuned": 0.0, "kl_tuned_base": 0.0}, 0
    lengths = [len(example["input_ids"]) for example in examples]
    for indices in grouped(lengths, batch_size, company):
        batch = pad_right([examples[index] for index in indices], pad_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        places, labels = judged(batch.pop("labels"))
        tuned = model(**batch, use_cache=False).logits.flatten(0, 1)[places]
        with as_base(model):
            base = model(**batch, use_cache=False).logits.flatten(0, 1)[places]
        size = max(1, _CHUNK // tuned.shape[1])
        for mine, its, wanted in _chunks(size, tuned, base, labels):
            sums["loss"] += float(torch.nn.functional.cross_entropy(mine.float(), wanted, reduction="sum"))
            sums["kl_base_tuned"] += float(divergence(its, mine).sum())
            sums["kl_tuned_base"] += float(divergence(mine, its).sum())
        tokens += len(places)
    return {name: total / max(tokens, 1) for name, total in sums.items()}


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)


@dataclass
@fits()
class GeneralMeter(TrainerCallback):
    """Measures general rows before training, every eval_steps, and behind the last step; writes lines of metrics."""

    test: GeneralTest
    scores: Callable[[], dict[str, float]]
    """`general_scores` of the model in training."""
    eval_steps: int | None
    write: Callable[[Mapping[str, Any]], None]
    """One line of metrics.jsonl."""
    say: Callable[[str], None]

    def state(self) -> list[dict[str, float]]:
        """What a checkpoint keeps, as JSON."""
        return list(self.test.measured)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.test.measured:
            self._measure(0)

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step, every = int(state.global_step), self.eval_steps
        if step >= state.max_steps or (every is not None and step % every == 0):
            self._measure(step)
            model.train()

    def _measure(self, step: int) -> None:
        scores = self.scores()
        for name, value in scores.items():
            if not math.isfinite(value):
                raise NumericsError(
                    f"on data.general_test, {name} is {value} at step {step}; lower train.learning_rate"
                )
        self.test.measured.append({"step": step, **scores})
        self.write({"step": step, **{f"general_{name}": value for name, value in scores.items()}})
        self.say(
            f"step {step}  general loss {scores['loss']:.4f}  KL(base || tuned) {scores['kl_base_tuned']:.2e}  "
            f"KL(tuned || base) {scores['kl_tuned_base']:.2e}"
        )
