"""The reference of pairs, measured before training: what the base model makes of each answer.

What is measured follows from the model, the tokens and the batches alone. So an interrupted measurement goes on, and a
second run of the same model and pairs, at another rate say, measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dude_peft.answer.cache import key_of, shared_cache
from dude_peft.answer.fingerprint import answering_parts
from dude_peft.data.batches import Company, grouped, pad_right
from dude_peft.errors import ResourceError
from dude_peft.machine.environment import hardware
from dude_peft.machine.out_of_memory import is_out_of_memory
from dude_peft.training.context import RunContext
from dude_peft.training.judged_loss import logps_of
from dude_peft.training.run_data import RunData
from dude_peft.training.training_set import TrainingSet

_KIND = "reference log-probabilities"
_SIDES = ("", "rejected_")


@dataclass(frozen=True)
class Reference:
    """Measures a base model."""

    model: Any
    """Without an adapter."""
    tokenizer: Any
    batch_size: int
    """Conversations at once."""
    company: Company = "any"
    """Which conversations may share a batch."""
    bf16: bool = False
    """Whether the model works under autocast."""

    def measure(
        self,
        pairs: TrainingSet,
        tokens_sha256: str,
        *,
        say: Callable[[str], None],
        stage: Callable[[str, int], Any],
        check: Callable[[], None],
    ) -> Tensor:
        """Log p of the better and the worse answer of each pair, summed over tokens; (pairs, 2) float32.

        Args:
            pairs: to train on.
            tokens_sha256: hash of their tokens and masks.
            say: hears what the cache has.
            stage: opens a bar of so many conversations (`Display.stage`).
            check: raises where the run has been told to end.

        Raises:
            ResourceError: memory or disk.
        """
        # The better and the worse conversation of each pair in turn; tokens stay on the disk until they are wanted.
        lengths = [
            len(pair[f"{side}input_ids"]) for pair in (pairs[index] for index in range(len(pairs))) for side in _SIDES
        ]
        how = [self.batch_size, self.company, self.bf16, hardware(self.model.device)]
        key = key_of(*answering_parts(self.model, self.tokenizer), tokens_sha256, len(lengths), how)
        self.model.eval()
        with shared_cache(_KIND, key, say, check) as cache:
            if len(cache):
                say(f"{_KIND}: {len(cache):,} of {len(lengths):,} conversations are measured already")
            with stage(f"the base model on {len(pairs):,} pairs", len(lengths)) as advance:
                for batch in grouped(lengths, self.batch_size, self.company):
                    if not all(str(index) in cache for index in batch):
                        check()
                        found = self._logps([_conversation(pairs, index) for index in batch])
                        cache.add({str(index): [value] for index, value in zip(batch, found, strict=True)})
                    advance(len(batch))
            values = [cache.parts(str(index), float)[0] for index in range(len(lengths))]
        return torch.tensor(values, dtype=torch.float32).view(-1, 2)

    @torch.no_grad()  # not inference_mode: the first forward of a model makes the buffers that training writes
    def _logps(self, rows: list[dict[str, list[int]]]) -> list[float]:
        batch = pad_right(rows, int(self.tokenizer.pad_token_id))
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        try:
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                found: list[float] = logps_of(self.model, batch).float().tolist()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            longest = max(len(row["input_ids"]) for row in rows)
            raise ResourceError(
                f"{len(rows)} conversations of up to {longest} tokens do not fit into memory; lower "
                "evaluation.batch_size or data.max_length"
            ) from error
        return found


def reference_of(context: RunContext, model: Any, tokenizer: Any, company: Company, data: RunData) -> Tensor:
    """The reference of a run's pairs; a stop meanwhile keeps what is measured.

    Args:
        context: of the run.
        model: without an adapter.
        tokenizer: of it.
        company: which conversations may share a batch.
        data: the rows of the run.
    """
    config, stop = context.config, context.stop
    stop.after("while the reference was measured; what is measured is kept, run the same command again")
    measured = Reference(model, tokenizer, config.evaluation.batch_size, company, config.train.bf16).measure(
        data.train,
        data.tokens_sha256["train"],
        say=context.display.say,
        stage=context.display.stage,
        check=stop.raise_if_wanted,
    )
    stop.after("before training began; nothing is lost")
    return measured


def _conversation(pairs: TrainingSet, number: int) -> dict[str, list[int]]:
    pair, side = pairs[number // 2], _SIDES[number % 2]
    return {name: pair[f"{side}{name}"] for name in ("input_ids", "labels")}
