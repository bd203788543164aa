"""The base model of a run: loaded, compared with the rows, and what it is found to be, before an adapter is on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dude_peft.answer.fingerprint import answering_parts
from dude_peft.config.schema import ModelSection
from dude_peft.machine import processes
from dude_peft.measure.score import begin_alike
from dude_peft.model.load import gguf_note, load_empty, load_model, load_settings
from dude_peft.model.prefix import shares_exactly
from dude_peft.model.probe import Nature, company_note, company_of, nature_of, quiet_router_
from dude_peft.model.quantised import asked_of, check_trains, method_of, stored_config
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL
from dude_peft.training.context import RunContext
from dude_peft.training.half import half_warning
from dude_peft.training.liger import apply_liger_, check_loss, restored
from dude_peft.training.model_checks import (
    check_answers_fit,
    check_attention,
    check_fits,
    check_mapped,
    check_nature,
    check_packs,
    probe,
    record_of_head,
)
from dude_peft.training.one_load import load_once
from dude_peft.training.placement import check_map, check_placed, placement_notes
from dude_peft.training.stages import measures_pass_rates
from dude_peft.training.strategy import has_whole, is_split, shares_base

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dude_peft.data.batches import Company
    from dude_peft.training.run_data import RunData


@dataclass(frozen=True)
class Base:
    """What a run knows of its base model."""

    nature: Nature
    company: Company
    """Which held-out prompts share a batch."""
    share: bool
    """Whether what held-out rows begin with is computed once."""
    head: dict[str, Any] | None
    """What is recorded of the head that a reward model starts with."""
    parts: list[Any] | None
    """What the scores of the base model depend on, where other runs may know them."""
    kernels: str
    """Liger's version and those of its kernels that the model has; empty without."""


def load_base(
    context: RunContext, where: str, data: RunData, tokenizer: Any, device: torch.device, *, resumed: bool, images: bool
) -> tuple[Any, Tensor | None, Base]:
    """Loads the base model of a run, and looks at it.

    Of a split model the first process does all of that, as the only process of a run would; on its CPU, since the model
    may be larger than its device.

    Args:
        context: of the run.
        where: the model is, from `locate`.
        data: the rows of the run.
        tokenizer: of the model.
        device: to compute on.
        resumed: whether training goes on from a checkpoint.
        images: whether the model sees images.

    Returns:
        The model; what it makes of the first rows, where this process has its weights (`probe`); what it is.

    Raises:
        ConfigError: the model cannot be loaded, or not be used so.
        ArtifactError: the checkpoint is damaged.
        DataError: rows that it cannot read.
        NumericsError: it gives NaN or Inf.
        ResourceError: memory.
    """
    config, pad_id = context.config, int(tokenizer.pad_token_id)
    split, whole = is_split(context.strategy), has_whole(context.strategy)
    writes = config.train.task_type == CAUSAL
    with context.phase("model"), context.display.waiting("loading the model"):
        model: Any
        if isinstance(config.model.device_map, dict):
            check_map(load_empty(config.model, where, config.train.task_type), config.model)
        if shared := _shares_base(context, where, device):
            model = load_once(context, where)
        elif whole:
            how: Any = {"task_type": config.train.task_type, "head_seed": config.train.seed}
            model = load_model(_section(context), where, **how)
        else:
            model = load_empty(_section(context), where)
        if config.model.device_map is not None:
            check_placed(model)
        head = None
        if not writes:  # where it reads the score: at the last token that is another one
            model.config.get_text_config().pad_token_id = pad_id
            head = record_of_head(model, config.train.seed)
        check_trains(getattr(model, "hf_quantizer", None), stored_config(model.config))
        check_fits(model, data.largest_id, data.longest, tokenizer)
        _check_answers(context, model, data)
        if split:
            model.generation_config = processes.from_first(model.generation_config)
        elif config.model.device_map is None:
            model.to(device)
        kernels = _with_liger(context, model)
        # The same in all processes: what follows from it, they do together.
        nature: Any = processes.from_first(nature_of(model, pad_id) if whole else None)
        check_nature(nature, config)
        if config.train.chunks_loss:
            check_loss(model, nature)
        if not split:
            check_attention(model, config.model.attn_implementation)
        quiet_router_(model)
        if warning := half_warning(model.dtype, scaled=config.train.fp16):
            context.warn(warning)
        notes = nature.notes(config.train.objective)
        notes += placement_notes(model, checkpoints=config.train.gradient_checkpointing)
        if quantised := stored_config(model.config):
            notes.append(f"the base model is quantised ({shown(method_of(quantised))})")
        company: Company = "any"
        held_out = data.held_out is not None
        answers = config.train.rewarded is not None or measures_pass_rates(config)
        if answers or (writes and held_out and config.evaluation.batch_size > 1):
            company = processes.from_first(company_of(model, pad_id) if whole else company)
            notes.append(company_note(nature.name, company))
        share = writes and not images and _shares(context, model, data, (nature.company, company), pad_id)
        parts = None
        scores = held_out and config.train.section is None
        # A resumed run has its own; of offloaded weights the hashes would take as long as the scores.
        if scores and not resumed and processes.count() == 1 and not config.model.is_hooked:
            parts = answering_parts(model, tokenizer)
        logits = probe(model, data.train, pad_id) if whole else None
        if shared and logits is not None:
            check_mapped(logits)
        if config.data.packing and whole:
            check_packs(model)
    for note in filter(None, (*notes, gguf_note(config.model))):
        context.display.say(f"note: {note}")
    return model, logits, Base(nature, company, share, head, parts, kernels)


def _with_liger(context: RunContext, model: Any) -> str:
    train = context.config.train
    if not train.use_liger_kernel:
        return ""
    context.held.enter_context(restored())
    told = apply_liger_(model, train)
    context.display.say(f"note: kernels of {told}; all numbers of this run are with them")
    return told


def _shares_base(context: RunContext, where: str, device: torch.device) -> bool:
    model, count = context.config.model, processes.count()
    if count == 1:
        return False
    quantised = model.gguf_file is None and bool(asked_of(model) or stored_config(load_settings(model, where)))
    return shares_base(context.config, context.strategy, count, gpu=device.type != "cpu", quantised=quantised)


def _section(context: RunContext) -> ModelSection:
    """The model section; a split model takes its attention up on the device, which may be the only one for it."""
    section = context.config.model
    return section.model_copy(update={"attn_implementation": None}) if is_split(context.strategy) else section


def _check_answers(context: RunContext, model: Any, data: RunData) -> None:
    """Whether everything that the model is to write fits behind its prompts."""
    config = context.config
    if config.train.task_type == CAUSAL and data.held_out is not None:
        asked, key = max(map(len, data.held_out.prompts), default=0), "evaluation.max_new_tokens"
        check_answers_fit(model, asked, config.evaluation.max_new_tokens, key, "held-out rows")
    if (rewarded := config.train.rewarded) is not None:
        asked, key = int(data.train.asked.max()), "train.grpo.max_completion_length"
        check_answers_fit(model, asked, rewarded.max_completion_length, key)
    drawn = None if config.train.curriculum is None else config.train.curriculum.max_new_tokens
    if drawn is not None:
        check_answers_fit(model, int(data.train.asked.max()), drawn, "train.curriculum.max_new_tokens")


def _shares(context: RunContext, model: Any, data: RunData, companies: tuple[Company, Company], pad_id: int) -> bool:
    """Whether held-out rows begin alike and may be scored so: decided on the base model, the same after a resume.

    Not under autocast, where near ties fall otherwise, nor with graphs that are compiled for whole rows. Where weights
    lie elsewhere, it is their way that takes the time.
    """
    config, held_out = context.config, data.held_out
    if held_out is None or config.train.autocasts or config.train.torch_compile or config.model.is_hooked:
        return False
    examples: Any = held_out.examples if config.train.preference is None else []
    if not begin_alike(examples, held_out.prompts, batch_size=config.evaluation.batch_size, companies=companies):
        return False
    return bool(processes.from_first(shares_exactly(model, pad_id) if has_whole(context.strategy) else None))
