"""The same run through TRL's SFTTrainer, with TRL's own packing and collator."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from dude_peft.data.token_set import TokenSet
from dude_peft.train.trainer import RunTrainer


class TrlRunTrainer(RunTrainer, SFTTrainer):
    """SFTTrainer with our checkpoints, order and checks."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """TRL's collator keeps no numbers of rows, so faults are named by their step alone."""
        return super().training_step(model, {**inputs, "rows": None}, num_items_in_batch)


def trl_trainer(
    model: PeftModel,
    arguments: SFTConfig,
    examples: TokenSet,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
) -> TrlRunTrainer:
    """A TrlRunTrainer over the same token ids and labels as the other trainer gets.

    Args:
        model: with its adapter.
        arguments: an SFTConfig of the run.
        examples: tokenised already; TRL packs them, if it shall.
        tokenizer: for padding.
        callbacks: of the run.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        rows = Dataset.from_generator(_rows, gen_kwargs={"examples": examples, "sha256": examples.sha256})
        return TrlRunTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )


def lengths(dataset: Any) -> list[int]:
    """Tokens of each place in a prepared dataset."""
    if "seq_lengths" in dataset.column_names:
        return [sum(found) for found in dataset["seq_lengths"]]
    return [len(ids) for ids in dataset["input_ids"]]


def _rows(examples: TokenSet, sha256: str) -> Any:
    for index in range(len(examples)):
        yield examples[index]
