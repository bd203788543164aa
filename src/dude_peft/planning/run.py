"""`dude plan`: everything that can be known of a run without its weights, cheap checks first.

Exit codes are the real run's: what it would refuse is refused here in the same words.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.config.schema import DpoSection, KtoSection, RunConfig, ShareSection
from dude_peft.data.objectives import KINDS
from dude_peft.errors import ConfigError
from dude_peft.folder.run_folder import check_output_dir
from dude_peft.installing import install
from dude_peft.machine.launch import number_of
from dude_peft.model.load import code_note, load_settings, load_tokenizer, locate, with_only_gguf
from dude_peft.rewards.notes import reward_notes
from dude_peft.terminal.display import Display
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports
from dude_peft.training.image_rows import check_images
from dude_peft.training.placement import check_placement
from dude_peft.training.run_data import glance, seeing
from dude_peft.training.start import with_start
from dude_peft.training.strategy import check_packed, check_strategy, shares_base
from dude_peft.training.task_scores import ScorerOf, scorer_for

if TYPE_CHECKING:
    from dude_peft.planning.bill import Cost
    from dude_peft.planning.device import Device
    from dude_peft.planning.placed import Placed
    from dude_peft.planning.report import Plan
    from dude_peft.planning.rows import Rows
    from dude_peft.planning.spread import Spread


def plan(
    config: RunConfig,
    *,
    device_memory: str | None = None,
    strategy: str = "ddp",
    processes: int = 1,
    scorer_of: ScorerOf | None = None,
    quiet: bool = False,
) -> Plan:
    """Finds out what the run will need, and shows it; whether that is there, `Plan.check` tells.

    Args:
        config: the run, for example from `load_config`.
        device_memory: of the GPU that will train ("80GiB"), of each where there are several; default: this machine's.
        strategy: of several processes: ddp, fsdp2 or zero3.
        processes: how many train together.
        scorer_of: who would score evaluation.tasks, as for the run itself.
        quiet: print nothing.

    Raises:
        ConfigError: a setting, model or target that the run would refuse.
        DataError: rows that the run would refuse.
    """
    display = Display(quiet=quiet)
    warnings: list[str] = []
    with gathered_warnings(warnings.append):
        number_of(strategy, processes)
        config, _ = with_start(config)
        config = config.model_copy(update={"model": with_only_gguf(config.model)})
        where = locate(config.model)
        if note := code_note(config.model):
            warnings.append(note)
        check_output_dir(Path(config.output_dir))
        glance(config)
        by_bitsandbytes = config.train.optim.endswith("bit") or config.train.optim == "ademamix"
        if by_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(f"train.optim: {config.train.optim} needs bitsandbytes: {install('bitsandbytes')}")
        scorer = scorer_for(config.evaluation, config.data.special_tokens, scorer_of)
        check_placement(config, processes)
        warnings += check_strategy(config, strategy, processes, scored=scorer is not None)
        with display.waiting("imports"), quiet_imports():
            import dude_peft.planning.bill  # noqa: F401  # what takes seconds, in one place
            from dude_peft.planning.device import device
            from dude_peft.planning.spread import Spread
            from dude_peft.training.extra_arguments import handed_on
            from dude_peft.training.fit import check_trackers
        check_trackers(config.train)
        handed_on(config.train)
        tokenizer = load_tokenizer(config.model, where, config.data.chat_template)
        if scorer is not None:
            with display.waiting("tasks"):
                scorer.check(tokenizer)
        spread = Spread(strategy, processes)
        made = _made(config.resolved(), where, tokenizer, device(device_memory), spread, warnings, display)
    if not quiet:
        made.show(display)
    return made


def _made(
    config: RunConfig,
    where: str,
    tokenizer: Any,
    device: Device,
    spread: Spread,
    warnings: list[str],
    display: Display,
) -> Plan:
    from dude_peft.methods import METHODS
    from dude_peft.methods.idle import idle_settings
    from dude_peft.methods.learning_rate import learning_rate_warning
    from dude_peft.model.load import dtype_of
    from dude_peft.model.quantised import asked_of, check_installed, check_runs, method_of, stored_config
    from dude_peft.planning.adapted import adapted_model
    from dude_peft.planning.bill import cost
    from dude_peft.planning.disk import disk
    from dude_peft.planning.optimizers import state_bytes
    from dude_peft.planning.placed import placed
    from dude_peft.planning.remedies import remedies
    from dude_peft.planning.report import Plan
    from dude_peft.training.liger import check_head, check_liger

    reward_models = 0
    if not config.adapter.foreign:
        warnings += idle_settings(METHODS[config.adapter.method], config.adapter.changed())
    spent = None
    if config.adapter.budget is not None:
        from dude_peft.planning.budget import planned

        with display.waiting("spending the budget"), quiet_imports():
            spent = planned(config, load_settings(config.model, where), where, warnings.append)
        config = config.model_copy(update={"adapter": spent.adapter})
    method, train = METHODS.get(config.adapter.method), config.train  # None of stock PEFT's
    warnings += reward_notes(train)
    from_rows = train.from_rows
    assert train.learning_rate is not None, "a resolved configuration has a rate"
    if method is not None and (text := learning_rate_warning(method, train.learning_rate, from_rows=from_rows)):
        warnings.append(text)
    if config.model.is_hooked:
        warnings.append("model.device_map: the time is counted as if the model were on one device")
    if train.fp16:
        warnings.append("train.fp16: counted as train.bf16, which has the same size")
    if train.objective == "mol":
        warnings.append("train.objective: mol: the general rows and the base model's pass over them are not counted")
    if isinstance(train.preference, KtoSection):
        warnings.append(
            "train.objective: kto: the base model's passes, and those over mismatched answers, are not counted in the "
            "time, which they make about twice as long; they need no memory beyond the step's"
        )
    elif train.rewarded is not None:
        warnings.append(
            "train.objective: grpo: the answers that the model gives, and their rewards, are counted neither in the "
            "time, of which they are the largest part, nor in the memory"
        )
        if train.rewarded.reads_conversations:
            with display.waiting("reward models"), quiet_imports():
                reward_models = _bytes_of_reward_models(config, warnings)
    elif train.preference is not None and train.preference.has_base:
        once = isinstance(train.preference, DpoSection) and train.preference.precompute_ref_log_probs
        longer = "" if once else ", which it makes about a third longer"
        warnings.append(
            f"train.objective: {train.objective}: the base model's pass over every pair is not counted in the time"
            f"{longer}; it needs no memory beyond the step's"
        )
    if train.curriculum is not None:
        warnings.append(
            "train.curriculum: steps are counted of all rows; rows that are left out make them fewer, whole steps for "
            "each stage a few more"
        )
    if "optim_args" in train.extra_arguments:
        warnings.append("train.extra_arguments.optim_args: what the optimizer keeps because of it is not counted")
    if train.torch_compile:
        warnings.append("train.torch_compile: the plan is of the step without compiling, in memory and in time")
    with display.waiting("model and targets"), quiet_imports():
        settings = load_settings(config.model, where)
        if config.adapter.init_from is not None:
            from dude_peft.training.full_precision import full_precision

            full_precision(config, settings)
        asked, stored = asked_of(config.model), stored_config(settings)
        if asked is not None or stored is not None:
            packed_as = method_of(stored or {}) if asked is None else asked.method
            check_packed(spread.strategy, spread.processes, packed_as)
        if asked is not None and stored is None:
            check_installed(asked.method)
            if device.here:
                check_runs(asked, dtype_of(config.model, settings, where), "cuda" if device.gpu else "cpu")
        if device.here:
            check_liger(train, settings, "cuda" if device.gpu else "cpu")
        # Adapting writes into the configuration.
        model = adapted_model(config, type(settings).from_dict(settings.to_dict()), where)
        check_head(model, train)
    with display.waiting("rows"):
        rows = _rows(config, where, tokenizer, model)
    if rows is not None and rows.images:
        check_images(config, 1, spread.strategy, spread.processes)
        if rows.counted < rows.rows:
            warnings.append(
                f"rows with images: {rows.counted} of {rows.rows} rows were looked at; the bill is of a batch of the "
                "row that has the most image tokens among these"
            )
    positions = getattr(settings.get_text_config(), "max_position_embeddings", None) or config.data.max_length
    length = min(config.data.max_length, positions) if rows is None else rows.longest

    begins, widest = (0, None) if rows is None else (rows.begins, rows.widest)

    def shares(changed: RunConfig) -> bool:
        quantised = changed.model.gguf_file is None and bool(asked_of(changed.model) or stored)
        # Answers come from merged weights, and PEFT's methods may fold their start into the base: pages of its own.
        if changed.train.rewarded is not None or changed.adapter.foreign:
            return False
        return shares_base(changed, spread.strategy, spread.processes, gpu=device.gpu, quantised=quantised)

    def billed(changed: RunConfig, tokens: int, places: Placed | None) -> Cost:
        found = cost(changed, settings, where, tokens, gpu=device.gpu, begins=begins, spread=spread, example=widest)
        bill = replace(found.bill, reward_models=reward_models)
        if shares(changed):
            bill = replace(bill, weights=-(-bill.weights // spread.processes))
        if places is not None:
            bill = places.on(bill, checkpointing=changed.train.gradient_checkpointing)
        return replace(found, bill=bill)

    def evaluate(changed: RunConfig, tokens: int) -> Cost:
        return billed(changed, tokens, placed(changed, settings, where, device))

    with display.waiting("dry step"):
        places = placed(config, settings, where, device)
        found = billed(config, length, places)
    states = state_bytes(train.optim, [p for p in model.parameters() if p.requires_grad])
    made = Plan(config, device, found, rows, length, disk(model, method, states, config.output_dir))
    made.warnings, made.budget, made.spread = warnings, spent, spread
    made.shares, made.placed = shares(config), places
    if found.uncounted:
        warnings.append(f"activations are not counted, because the step cannot run without weights: {found.uncounted}")
    if spread.strategy == "zero3" and spread.processes > 1:
        warnings.append("zero3 is counted as fsdp2; DeepSpeed's own buffers are not counted")
    if made.memory > device.memory and not found.uncounted:
        with display.waiting("changes that would make it fit"):
            share = device.memory if device.gpu else device.memory // spread.processes
            tried = remedies(config, found, length, share, evaluate)
            # Of a run with a budget r says the scaling alone.
            made.remedies = [each for each in tried if spent is None or "adapter.r" not in each.settings]
    if device.here and rows is not None:
        made.measure_speed()
    return made


def _bytes_of_reward_models(config: RunConfig, warnings: list[str]) -> int:
    """What the run keeps of them; a quantised one is told of instead."""
    total = 0
    assert config.train.rewarded is not None
    for each in config.train.rewarded.rewards:
        if each.kind == "model":
            from dude_peft.rewards.reward_model import reward_model_bytes

            found = reward_model_bytes(each, config.model.dtype)
            if found is None:
                warnings.append(f"train.grpo.rewards: {each.title}: a quantised reward model is not counted")
            total += found or 0
    return total


def _rows(config: RunConfig, where: str, tokenizer: Any, model: Any) -> Rows | None:
    from dude_peft.model.processor import sight_of
    from dude_peft.planning.rows import count_rows, is_local

    data, kind = config.data, KINDS[config.train.objective]
    eyes = seeing(config.train.objective, sight_of(config.model, where, tokenizer))
    held_out = None if isinstance(data.test, ShareSection) else data.test
    if config.evaluation.enabled and held_out is not None and is_local(held_out):
        count_rows(data, tokenizer, model, held_out=True, kind=kind, eyes=eyes)  # for its errors
    rewarded = config.train.rewarded
    answers = None if rewarded is None else rewarded.max_completion_length
    return count_rows(data, tokenizer, model, kind=kind, answers=answers, eyes=eyes) if is_local(data.train) else None
