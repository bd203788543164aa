"""The same run through TRL's SFTTrainer, with TRL's own packing and collator."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from dude_peft.data.labels import IGNORE
from dude_peft.data.token_set import TokenSet
from dude_peft.errors import ConfigError
from dude_peft.model.probe import quiet_router_, trains_cross_entropy
from dude_peft.parents import fits
from dude_peft.training.trainer import RunTrainer

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


def trl_trainer(
    model: Any,
    arguments: SFTConfig,
    examples: TokenSet,
    tokenizer: Any,
    router: float,
    ours: dict[str, Any],
) -> RunTrainer:
    """An SFTTrainer with our checkpoints, order and checks, on the token ids and labels that the other trainer gets.

    Args:
        model: with its adapter.
        arguments: of the run.
        examples: tokenised already; TRL packs them, if it shall.
        tokenizer: for padding.
        router: weight of the router's loss; 0 where the model adds none.
        ours: what RunTrainer takes beyond transformers' settings.

    Raises:
        ConfigError: TRL lost the labels, or its loss of this model is not the cross-entropy of its logits.
    """
    from datasets import Dataset

    if "router_aux_loss_coef" in {field.name for field in dataclasses.fields(arguments)}:
        arguments.router_aux_loss_coef = router  # else TRL adds one to every mixture of experts
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        rows = Dataset.from_generator(_rows, gen_kwargs={"examples": examples, "sha256": examples.tokens_sha256})
        trainer: RunTrainer = _trainer_class()(
            **ours, model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
        )
    dataset: Any = trainer.train_dataset
    if "labels" not in dataset.column_names:
        raise ConfigError(
            "train.trainer: this version of TRL loses the labels when it packs, and would train on prompts; run: pip "
            "install -U 'dude-peft[trl]', or set data.packing: false"
        )
    quiet_router_(model)  # TRL asks for its loss in each forward
    trainer.current_gradient_accumulation_steps = 1
    if not trains_cross_entropy(model, functools.partial(_loss, trainer, model), router):
        raise ConfigError(
            f"train.trainer: TRL's loss of {type(model.get_base_model()).__name__} is not the cross-entropy of its "
            "logits; set train.trainer: transformers"
        )
    return trainer


def _loss(trainer: RunTrainer, model: Any, batch: dict[str, Tensor], items: Tensor) -> Tensor:
    # Processes hold equal batches here; Trainer hands out as many times the loss, and their gradients' mean.
    loss: Tensor = trainer.compute_loss(model, batch, num_items_in_batch=items) / trainer.args.world_size
    return loss


def lengths(dataset: Any) -> list[int]:
    """Tokens of each place in a prepared dataset."""
    if "seq_lengths" in dataset.column_names:
        return [sum(found) for found in dataset["seq_lengths"]]
    return [len(ids) for ids in dataset["input_ids"]]


@functools.cache
def _trainer_class() -> Any:
    """Made when it is asked for, since TRL is an extra."""
    from trl.trainer.sft_trainer import SFTTrainer

    @fits()
    class TrlRunTrainer(RunTrainer, SFTTrainer):
        @override
        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            """TRL's collator keeps no numbers of rows, so faults are named by their step alone."""
            return super().training_step(model, {**inputs, "rows": None}, num_items_in_batch)

    return TrlRunTrainer


def _rows(examples: TokenSet, sha256: str) -> Iterator[dict[str, list[int]]]:
    """`sha256` names the rows for the cache of datasets, which would hash the object otherwise."""
    for index in range(len(examples)):
        example = examples[index]
        # Nothing predicts the first token, and Trainer shall not count it.
        yield {**example, "labels": [IGNORE, *example["labels"][1:]]}
