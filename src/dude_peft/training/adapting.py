"""The adapter of a run on its base model, sure that a fresh one changes nothing yet.

The first process makes it, or it is loaded: from a checkpoint, or from `adapter.start`. All others get the same.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from dude_peft.machine import processes
from dude_peft.machine.ddp import keep_frozen_from_ddp
from dude_peft.machine.sharding import split
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL
from dude_peft.training.budget import Spent
from dude_peft.training.context import RunContext
from dude_peft.training.end_token import end_token_warning
from dude_peft.training.full_precision import FullPrecision
from dude_peft.training.liger import check_head
from dude_peft.training.model_checks import (
    check_attention,
    check_beginning,
    check_reference,
    check_shares,
    check_start,
    check_whole,
    distance,
    keep_fingerprints,
    probe,
)
from dude_peft.training.placement import check_adapted
from dude_peft.training.run_data import RunData
from dude_peft.training.start import Start, put_on
from dude_peft.training.strategy import is_split
from dude_peft.tuner import DudeConfig, load_adapter
from dude_peft.tuner.foreign import adapt_foreign, check_disabled, load_foreign
from dude_peft.tuner.load import put_on_empty
from dude_peft.tuner.same_base import with_remedy


@dataclass(frozen=True)
class Origin:
    """Where the adapter of a run comes from."""

    checkpoint: Path | None
    """The adapter that an earlier process of the run has saved."""
    given: Start | None
    """`adapter.start`."""
    spent: Spent | None
    """The budget behind its ranks."""
    from_base: bool
    """Whether the run began as the base model, as far as it is known before the adapter is there."""


@dataclass(frozen=True)
class Adapted:
    """A base model with the adapter of the run."""

    model: Any
    exact: bool
    """Whether a fresh adapter leaves the base model as it is."""
    from_base: bool
    """Whether the run began, or begins, as the base model."""

    def told(self, origin: Origin, data: RunData) -> str:
        """How much of it trains, on what, and where it begins, in one line."""
        trainable, total = self.model.get_nb_trainable_parameters()
        begun = f"the start {'equals' if self.exact else 'is not'} the base model bit by bit"
        if origin.checkpoint is not None:
            begun = f"started from {shown(origin.checkpoint, 300)}"
        elif origin.given is not None:
            begun = f"started from {shown(origin.given.folder, 300)}, which " + (
                "equals the base model bit by bit"
                if self.from_base
                else "is not its base model alone: scores before training are with it"
            )
        return (
            f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %), on {len(data.train):,} "
            f"examples of {data.train.counts.tokens:,} tokens; {begun}"
        )


def adapt(
    context: RunContext,
    origin: Origin,
    model: Any,
    base: Tensor | None,
    data: RunData,
    tokenizer: Any,
    device: torch.device,
    *,
    scored: bool,
) -> Adapted:
    """Puts the adapter of the run on its base model, in every process; a model that is split is handed out here.

    Args:
        context: of the run.
        origin: of the adapter.
        model: the base model, as `load_base` gives it.
        base: what it makes of the first rows.
        data: the rows of the run.
        tokenizer: of the model.
        device: to compute on.
        scored: whether evaluation.tasks are scored.

    Raises:
        ConfigError: a setting that does not fit the model.
        ArtifactError: the adapter belongs to another base model, or is damaged.
        NumericsError: NaN or Inf, or a fresh adapter that changes the model.
    """
    pad_id = int(tokenizer.pad_token_id)
    adapted = None
    if base is not None:
        adapted = _Adapting(context, origin, model, base, data, pad_id).adapted(scored=scored)
        check_adapted(adapted.model)
        check_head(adapted.model, context.config.train)
        writes = context.config.train.task_type == CAUSAL
        if writes and (warning := end_token_warning(adapted.model, data.train, tokenizer)):
            context.warn(warning)
    if is_split(context.strategy):
        adapted = _split(context, adapted, model, data, pad_id, device)
    assert adapted is not None, "a model that is not split is whole in every process"
    return adapted


class _Adapting:
    """A whole base model, in one process or in each of several, and its adapter."""

    def __init__(
        self, context: RunContext, origin: Origin, model: Any, base: Tensor, data: RunData, pad_id: int
    ) -> None:
        self._context, self._origin, self._model = context, origin, model
        self._base, self._data, self._pad_id = base, data, pad_id

    def adapted(self, *, scored: bool) -> Adapted:
        """Loaded, or made once, by the first process, and loaded from its file by others."""
        context, given, checkpoint = self._context, self._origin.given, self._origin.checkpoint
        config = context.config
        transformers.set_seed(config.train.seed)
        load = load_foreign if config.adapter.foreign else load_adapter
        found: Any = None
        exact, from_base = True, self._origin.from_base
        if checkpoint is not None:
            with with_remedy(
                f"restore the base model that this run started with ({shown(config.model.name_or_path, 300)} has "
                "changed), or add --overwrite to start over"
            ):
                found = load(self._model, str(checkpoint), is_trainable=True)
        elif given is not None:
            found = put_on(self._model, given, config)
            from_base = bool(torch.equal(self._base, self._logits(found)))
            check_beginning(config, from_base=from_base)
            if scored and not from_base:
                context.warn(
                    "evaluation.tasks: the base model that is scored is adapter.start's base without the start"
                )
        elif processes.is_first() and config.adapter.foreign:
            found, exact = self._foreign()
        elif processes.is_first():
            found = self._fresh()
        if config.train.has_base and found is not None:
            check_reference(found, self._base, self._logits, config.train.objective)
        if processes.count() > 1 and not is_split(context.strategy):
            made = checkpoint is None and given is None
            with context.folder.shared_start(found if made else None) as start:
                processes.from_first(None)
                if made and not processes.is_first():
                    found = load(self._model, str(start), is_trainable=True)
                processes.from_first(None)
        if processes.count() > 1 and not config.adapter.foreign:
            if context.strategy != "ddp":
                check_whole(found, context.strategy)
            keep_fingerprints(found)
            if context.strategy == "ddp":
                keep_frozen_from_ddp(found)
        transformers.set_seed(config.train.seed)
        return Adapted(found, exact, from_base)

    def _logits(self, model: Any) -> Tensor:
        return probe(model, self._data.train, self._pad_id)

    def _fresh(self) -> Any:
        """One of ours; it starts as the base model, or is refused."""
        config, spent = self._context.config, self._origin.spent
        # Its keys are DudeConfig's own.
        settings = DudeConfig(**config.adapter.settings(), task_type=config.train.task_type)
        full = None if config.adapter.init_from is None else FullPrecision(config)
        with nullcontext() if full is None else full.starts():
            adapted = peft.get_peft_model(self._model, settings)
        if full is not None:
            self._context.display.say(f"note: {full.told()}")
        check_start(self._base, self._logits(adapted))
        if spent is not None:
            spent.check(adapted)
        return adapted

    def _foreign(self) -> tuple[Any, bool]:
        """One that stock PEFT makes; where its start is not the base model, the run says how far it is off."""
        section = self._context.config.adapter
        assert section.peft is not None
        adapted = adapt_foreign(self._model, section.peft)
        fault = f"the start of {section.method} gives NaN or Inf; change its settings"

        def look(model: Any) -> Tensor:
            return probe(model, self._data.train, self._pad_id, fault)

        moved = distance(self._base, look(adapted))
        check_disabled(adapted, self._base, look)
        if moved:
            self._context.warn(
                f"the start of {section.method} is not the base model: it changes the logits by up to {moved:.2g}, so "
                "the first losses of the run are not the base model's"
            )
        return adapted, moved == 0


def _split(
    context: RunContext, whole: Adapted | None, model: Any, data: RunData, pad_id: int, device: torch.device
) -> Adapted:
    """The first process's adapted model, cut and handed out, sure that each process computes what that one did."""
    found = None if whole is None else whole.model
    settings: Any = processes.from_first(None if found is None else found.peft_config["default"])
    known: Any = processes.from_first(None if whole is None else (whole.exact, whole.from_base))
    before = None if found is None else probe(found, data.train, pad_id)
    if found is None:
        found = put_on_empty(model, settings)
    split(found, device)
    check_shares(before, probe(found, data.train, pad_id))
    if (wanted := context.config.model.attn_implementation) is not None:
        model.set_attn_implementation(wanted)
        check_attention(found, wanted)
    transformers.set_seed(context.config.train.seed)
    return Adapted(found, *known)
