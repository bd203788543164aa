"""One run from configuration to result: check what can be checked, load, measure, train, measure again, save.

The order is the point: everything that needs no weights is checked first, so that a mistake costs seconds, and the
adapter is saved last of all that can go wrong. What needs torch is imported only after the first checks. Of several
processes the first one shows and writes; all load, measure and train: a sharded model works in all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.config.reading import dump_config
from dude_peft.config.schema import AdapterSection, DpoSection, RunConfig
from dude_peft.data.renderer import start_ahead
from dude_peft.errors import ArtifactError, StoppedError
from dude_peft.folder.identity import NAME as RUN
from dude_peft.folder.identity import Identity
from dude_peft.folder.lock import locked_folder
from dude_peft.folder.record import (
    ADAPTER,
    CONFIG,
    METRICS,
    PAGE,
    PICTURE,
    RANKS,
    ROLLOUTS,
    SCORES,
    RunReport,
    Score,
)
from dude_peft.folder.run_folder import RunFolder, save_adapter
from dude_peft.machine import processes
from dude_peft.machine.environment import environment
from dude_peft.machine.precision import precision_kept
from dude_peft.model.load import with_only_gguf
from dude_peft.rewards.notes import reward_notes
from dude_peft.show import shown
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports
from dude_peft.training.context import RunContext
from dude_peft.training.next_commands import tell_next_of
from dude_peft.training.picture import check_picture, labels, loss_curve, rank_map
from dude_peft.training.placement import check_placement, placed_as
from dude_peft.training.stages import Stages, measures_pass_rates
from dude_peft.training.start import Start, with_start
from dude_peft.training.strategy import check_strategy
from dude_peft.training.task_scores import ScorerOf, TaskScorer, scorer_for
from dude_peft.training.variables import check_variables
from dude_peft.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from dude_peft.data.sight import Sight
    from dude_peft.folder.checkpoint import Checkpoint
    from dude_peft.measure.base_weights import WeightOf
    from dude_peft.rewards.judge import Judge
    from dude_peft.training.budget import Spent
    from dude_peft.training.fit import Fit
    from dude_peft.training.held_out_scorer import HeldOutScorer
    from dude_peft.training.loading import Base
    from dude_peft.training.run_data import RunData

CardOf = Callable[[Path, dict[str, Any]], str]
"""The model card of an adapter, from its folder and the run's report."""

PageOf = Callable[[Path, "WeightOf | None"], Path]
"""Writes the page about a finished run's folder, with the base weights in memory, and tells where."""


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    weights_only: bool = False,
    strategy: str = "ddp",
    scorer_of: ScorerOf | None = None,
    card_of: CardOf | None = None,
    write_page: PageOf | None = None,
    quiet: bool = False,
) -> RunReport:
    """Fine-tunes as `config` says and fills `config.output_dir`, the adapter among it only if all went well.

    A run that was interrupted goes on from its newest checkpoint, bit by bit; one that is finished is only told of.

    Args:
        config: the run, for example from `load_config`.
        overwrite: start anew in an output folder that is not empty; foreign files in it stay.
        weights_only: start anew from the newest checkpoint's adapter, where the rest of the checkpoint is lost.
        strategy: of several processes (`launch`): ddp, fsdp2 or zero3.
        scorer_of: who scores evaluation.tasks: `dude_peft.evaluation.in_training.TasksOfRun`; without tasks, nobody.
        card_of: who writes the adapter's README.md: `dude_peft.exporting.run_card.card_of_run`; without, it is PEFT's.
        write_page: who writes the page about the run: `dude_peft.reporting.run.page_of`, built on this room; without,
            nobody.
        quiet: print nothing.

    Raises:
        ConfigError: a setting, model or output folder that cannot be used, or the folder of another run.
        DataError: rows that cannot be trained on, or other rows than those that the run began with.
        ArtifactError: no checkpoint is whole, or the base model is another one.
        NumericsError: NaN or Inf, or a start that is not the base model.
        ResourceError: disk or memory.
        BusyError: another process runs in the folder.
        StoppedError: Ctrl-C or SIGTERM; a checkpoint is there.
    """
    check_picture()
    processes.is_launched()  # a place among processes that no launcher gave is refused
    config, start = with_start(config)
    resolved = config.resolved()
    resolved = resolved.model_copy(update={"model": with_only_gguf(resolved.model)})
    folder = RunFolder(config.output_dir, overwrite=overwrite, writes=processes.is_first())
    try:
        scorer = scorer_for(resolved.evaluation, resolved.data.special_tokens, scorer_of)
        silent = quiet or not processes.is_first()
        context = _context(resolved, folder, strategy, quiet=silent)
        this = _Run(context, start, scorer, card_of, write_page, weights_only=weights_only)
        with gathered_warnings(context.warn), context.stop.listening(), this.judging(), context.held:
            return this.go()
    finally:
        folder.release()


def _context(config: RunConfig, folder: RunFolder, strategy: str, *, quiet: bool) -> RunContext:
    from dude_peft.machine.stop import Stop
    from dude_peft.training.progress import Display

    display = Display(quiet=quiet)
    return RunContext(config, folder, strategy, display, Stop(display.warn))


class _Run:
    def __init__(
        self,
        context: RunContext,
        given: Start | None,
        scorer: TaskScorer | None,
        card_of: CardOf | None,
        write_page: PageOf | None,
        *,
        weights_only: bool,
    ) -> None:
        self.context = context
        self.folder, self.display, self.stop = context.folder, context.display, context.stop
        adapter = context.config.adapter
        self.asked: AdapterSection | None = None if adapter.budget is None else adapter
        """The adapter section whose budget becomes ranks; `config` has these as soon as they are known."""
        self.spent: Spent | None = None
        self.given = given
        """The adapter that the run was told to begin with."""
        self.weights_only = weights_only
        self.scorer = scorer
        self.card_of = card_of
        self.write_page = write_page
        self.tokenizer: Any = None
        self.sight: Sight | None = None
        """How the model sees images; None where it has no processor."""
        self.resumed: Checkpoint | None = None
        self.start: Path | None = None
        """The adapter that training starts from; None for a fresh one."""
        self.from_base = True
        """Whether the run began, or begins, as the base model."""
        self.model: Any = None
        self.base: Base
        """What is known of the base model, once it is loaded."""
        self.reference: Tensor | None = None
        """What the base model makes of the pairs, where it was measured before training."""
        self.held_out: HeldOutScorer | None = None
        """Of held-out rows, where there are any, once the model is there."""
        self.judge: Judge | None = None
        """Of the model's own answers, where the objective rewards them."""
        self.stages: Stages | None = None
        """Of the training rows, where there are any."""

    @property
    def config(self) -> RunConfig:
        """Of the run, with ranks as soon as they are known."""
        return self.context.config

    @contextmanager
    def judging(self) -> Iterator[None]:
        """At its end the process of rewards ends as well."""
        try:
            yield
        finally:
            if self.judge is not None:
                self.judge.close()

    def go(self) -> RunReport:
        begun = time.perf_counter()
        config, display = self.config, self.display
        display.say(f"DuDe {__version__}: {config.adapter.method} on {shown(config.model.name_or_path, 300)}")
        with self.context.phase("checks"):
            from dude_peft.model.load import code_note, load_tokenizer, locate
            from dude_peft.training.run_data import glance

            where = locate(config.model)
            for note in filter(None, (code_note(config.model), *reward_notes(config.train))):
                self.context.warn(note)
            if self.folder.earlier is not None:
                config = self._as_before(self.folder.earlier)
                self.folder.earlier.check_config(config.model_dump(mode="json"))
                self.folder.earlier.check_start(None if self.given is None else self.given.sha256)
                self.from_base = bool(self.folder.earlier.start.get("is_base", True))
            self._check_rate()
            check_variables(config.train)
            check_placement(config, processes.count())
            if config.model.offload_folder is not None:
                held = locked_folder(config.model.offload_folder, "model.offload_folder")
                self.context.held.enter_context(held)
            scored = self.scorer is not None
            for note in check_strategy(config, self.context.strategy, processes.count(), scored=scored):
                self.context.warn(note)
            glance(config)
        if config.data.template != "plain":
            start_ahead()
        with self.context.phase("imports"), quiet_imports():
            from dude_peft.model.processor import sight_of
            from dude_peft.training.fit import training_arguments
            from dude_peft.training.quantised_base import check_quantisation
        self.context.held.enter_context(precision_kept())
        arguments = training_arguments(config, self.context.strategy)
        check_quantisation(self.context, self.asked, where, arguments.device)
        if config.train.use_liger_kernel:
            with self.context.phase("kernels"), quiet_imports():
                from dude_peft.model.load import load_settings
                from dude_peft.training.liger import check_liger

                check_liger(config.train, load_settings(config.model, where), arguments.device)
        with self.context.phase("data"):
            self.tokenizer = load_tokenizer(config.model, where, config.data.chat_template)
            self.sight = sight_of(config.model, where, self.tokenizer)
            if self.scorer is not None:
                with display.waiting("reading the tasks"):
                    self.scorer.check(self.tokenizer)
            data = self._read(arguments.world_size)
        if (finished := processes.from_first(self._finished())) is not None:
            return finished
        self._find_checkpoint()
        if config.train.curriculum is not None:
            self.stages = Stages(self.context, config.train.curriculum, data)
            if not measures_pass_rates(config):
                self.stages.by_length()
                self.stages.put_in_order(arguments)
        if config.train.rewarded is not None:
            self._start_rewards(config, data, arguments.device)
        self._load(where, data, arguments.device)
        if self.stages is not None and measures_pass_rates(config):
            self.stages.put_in_order(arguments)
        self.stop.raise_if_wanted()
        self._begin(data, arguments.world_size)
        if data.held_out is not None:
            from dude_peft.training.held_out_scorer import HeldOutScorer

            companies = (self.base.nature.company, self.base.company)
            known = data.held_out, self.model, self.tokenizer, companies, self.judge
            # With zero3 it was not tried: each process has all rows.
            spread = self.context.strategy != "zero3"
            self.held_out = HeldOutScorer(self.config, *known, share=self.base.share, spread=spread)

        before, behind_seconds = self._before(data)
        if self.held_out is not None:
            self.held_out.forget_base()
        self.stop.raise_if_wanted()
        fitted = self._train(data, arguments, behind_seconds)
        after = self._score("after")
        data.verify_unchanged()
        with self.context.phase("saving"):
            self._save(fitted, before, after)
        tasks = self._score_tasks()
        self.context.seconds["total"] = round(time.perf_counter() - begun, 2)
        report = self._report(data, fitted, before, after, tasks)
        if self.card_of is not None and self.folder.writes and not config.adapter.foreign:  # PEFT wrote its own
            self.folder.write(f"{ADAPTER}/README.md", self.card_of(self.folder.path / ADAPTER, asdict(report)))
        self.folder.write_report(report)

        if before and after:
            count = config.evaluation.samples
            display.samples(before.answers[:count], after.answers[:count])
            display.before_after(before, after)
        display.say(
            f"{fitted.steps} steps, {fitted.tokens:,} tokens, {fitted.tokens_per_second:,.0f} tokens/s in training; "
            f"{self.context.seconds['total']:.0f} s in all"
        )
        display.say(f"adapter: {shown(self.folder.path / ADAPTER, None)}")
        tell_next_of(self.context, report, paged=self._write_page())
        return report

    def _write_page(self) -> bool:
        """Whether there is a page about the run, which is finished whatever becomes of it.

        The base weights are in memory: to find them again in files, dequantise or hash them would take longer than
        short runs. Where they are not, or nothing was measured to begin a page with, it waits for `dude report`.
        """
        if self.write_page is None or not self.folder.writes or not self.config.evaluation.enabled:
            return False
        from dude_peft.measure.base_weights import base_weights

        weight_of = None if self.config.adapter.foreign else base_weights(self.model)
        if weight_of is None and not self.config.adapter.foreign:
            return False
        self.stop.after("while the page was written; the run itself is finished, and dude report writes it")
        try:
            with self.display.waiting("writing the page"):
                page = self.write_page(self.folder.path, weight_of)
        except StoppedError:
            raise
        except Exception as error:  # of three libraries that draw and calculate; none of them is the run
            reason = shown(" ".join(str(error).split()) or type(error).__name__, 200)
            self.display.warn(f"there is no page about this run ({reason}); the run itself is finished")
            return False
        self.display.say(f"page: {shown(page, None)}")
        return True

    def _as_before(self, earlier: Identity) -> RunConfig:
        """With the ranks that an earlier process of this run has found, so that no row is looked at again."""
        settled = earlier.settled(self.config.adapter.model_dump(mode="json"))
        if settled is not None:
            try:
                self.context.settle(AdapterSection.model_validate(settled))
            except ValueError as error:  # pydantic's
                name = shown(self.folder.path / RUN, 300)
                raise ArtifactError(f"{name} is damaged: its ranks are none; add --overwrite to start over") from error
        return self.config

    def _before(self, data: RunData) -> tuple[Score | None, float]:
        """What the model that the run begins with knows of the held-out rows, and the seconds that finding out took."""
        found = None if self.resumed is None else self.folder.read_before(self.context.warn)
        kept = processes.from_first(found)
        if kept is not None:
            return kept
        if self.resumed is not None and not self.from_base and data.held_out is not None:
            self.context.warn(
                "the scores from before training are lost, and the model that they were of is not there any more"
            )
            return None, 0.0
        before, seconds = self._measured_before(data)
        if before is not None:
            self.folder.write_before(before, seconds)
        return before, seconds

    def _measured_before(self, data: RunData) -> tuple[Score | None, float]:
        """Measured now, or by an earlier run of the same base model, rows and settings here; and how long that took."""

        def measure() -> tuple[Score | None, float]:
            from dude_peft.training.autocast import as_in_training

            base = self.model.disable_adapter() if self.from_base else nullcontext()
            with base, as_in_training(self.model, self.config.train):
                found = self._score("before")
            return found, self.context.seconds.get("evaluation_before", 0.0)

        if self.base.parts is None or not self.from_base:
            return measure()
        from dude_peft.training.base_scores import known_or_measured

        parts = self._tokenizer_parts(data)
        return known_or_measured(self.context, self.base, data, parts, self.model.device, measure)

    def _check_rate(self) -> None:
        from dude_peft.methods import METHODS
        from dude_peft.methods.idle import idle_settings
        from dude_peft.methods.learning_rate import learning_rate_warning

        if self.config.adapter.foreign:
            return
        for line in idle_settings(METHODS[self.config.adapter.method], (self.asked or self.config.adapter).changed()):
            self.context.warn(line)
        rate = self.config.train.learning_rate
        assert rate is not None, "a resolved configuration has a rate"
        from_rows = self.config.train.from_rows
        if warning := learning_rate_warning(METHODS[self.config.adapter.method], rate, from_rows=from_rows):
            self.context.warn(warning)

    def _read(self, world_size: int) -> RunData:
        from dude_peft.data.clock import at, now
        from dude_peft.training.image_rows import check_images
        from dude_peft.training.run_data import read

        earlier = self.folder.earlier
        begun = now() if earlier is None else earlier.moment or now()
        self.context.held.enter_context(at(processes.from_first(begun)))
        with self.display.waiting("reading the rows"):
            data = read(self.config, self.tokenizer, self.sight)
        check_images(self.config, data.images, self.context.strategy, world_size)
        if earlier is not None:
            earlier.check_data(data.sha256)
            earlier.check_tokens(data.tokens_sha256)
            earlier.check_tokenizer(self._tokenizer_parts(data))
        for warning in data.warnings:
            self.context.warn(warning)
        if len(data.train) < world_size:
            self.context.warn(
                f"only {len(data.train)} training examples for {world_size} processes: some processes train on the "
                "same example"
            )
        return data

    def _tokenizer_parts(self, data: RunData) -> dict[str, str]:
        """Of the processor as well, where rows have images."""
        from dude_peft.data.tokenizer_parts import tokenizer_parts

        return tokenizer_parts(self.tokenizer) | (self.sight.parts if self.sight is not None and data.images else {})

    def _finished(self) -> RunReport | None:
        report = self.folder.finished()
        if report is not None:
            self.display.say(
                f"this run is finished: {report.steps} steps, adapter {shown(self.folder.path / ADAPTER, None)}; "
                "nothing is left to do (--overwrite starts over)"
            )
            tell_next_of(self.context, report, paged=(self.folder.path / PAGE).is_file())
        return report

    def _start_rewards(self, config: RunConfig, data: RunData, device: Any) -> None:
        """The rewards of the run, those that it began with, before the model is loaded."""
        from dude_peft.rewards.judge import Judge

        rewarded, earlier = config.train.rewarded, self.folder.earlier
        assert rewarded is not None
        with self.context.phase("rewards"), self.display.waiting("starting the rewards"):
            self.judge = Judge(rewarded, config.model.dtype, device)
        if earlier is not None:
            earlier.check_rewards(self.judge.record)
        if rewarded.reads_conversations:
            longest = data.train.conversation(int(data.train.asked.argmax()))
            for warning in self.judge.try_out(longest):
                self.context.warn(warning)

    def _find_checkpoint(self) -> None:
        """Where training goes on, told apart before the model is loaded; the first process decides for all."""
        if self.folder.earlier is not None and self.weights_only:
            self.start = self.folder.checkpoints.newest_adapter(self.context.warn)
            self.context.warn(
                f"only the adapter of {self.start.parent.name} is used: optimizer and schedule start over"
            )
        elif self.folder.earlier is not None:
            self.resumed = self.folder.checkpoints.newest(self.context.warn)
            if self.resumed is None:
                self.display.say("this run was interrupted before its first checkpoint; it starts from the beginning")
            else:
                self.display.say(f"resuming from the checkpoint of step {self.resumed.step}")
                self.start = self.resumed.path / ADAPTER
        self.resumed, self.start = processes.from_first((self.resumed, self.start))

    def _load(self, where: str, data: RunData, device: Any) -> None:
        """The base model, what is measured on it alone, and the adapter on it."""
        from dude_peft.training.adapting import Origin, adapt
        from dude_peft.training.loading import load_base

        context = self.context
        resumed, images = self.resumed is not None, self.sight is not None
        model, logits, self.base = load_base(
            context, where, data, self.tokenizer, device, resumed=resumed, images=images
        )
        if self.stages is not None and measures_pass_rates(self.config):
            with context.phase("pass_rates"):
                self.stages.by_pass_rate(model, self.tokenizer, self.base.company, self.judge)
        preference = self.config.train.preference
        if isinstance(preference, DpoSection) and preference.precompute_ref_log_probs:
            with context.phase("reference"):
                from dude_peft.training.reference import reference_of

                self.reference = reference_of(context, model, self.tokenizer, self.base.nature.company, data)
        if self.asked is not None:
            with context.phase("budget"):
                spent = self._spend(model, data) if processes.is_first() else self.asked
                context.settle(processes.from_first(spent))
            if self.spent is not None:
                self.display.ranks(self.spent)
        origin = Origin(self.start, self.given, self.spent, self.from_base)
        with context.phase("adapter"), self.display.waiting("making the adapter"):
            scored = self.scorer is not None
            adapted = adapt(context, origin, model, logits, data, self.tokenizer, device, scored=scored)
        self.model, self.parameters, self.from_base = adapted.model, adapted.parameters, adapted.from_base
        self.display.say(adapted.told(origin, data))

    def _spend(self, model: Any, data: RunData) -> AdapterSection:
        """The adapter section with ranks for its budget; by the first process, for all."""
        from dude_peft.training.budget import shapes_of, spend, targets, worths_of

        adapter, seed = self.config.adapter, self.config.train.seed
        if adapter.budget is None:  # an earlier process of this run knew
            return adapter
        with self.display.waiting("spending the budget"):
            layers = targets(model, adapter, self.config.train.task_type)
            pad_id = int(self.tokenizer.pad_token_id)
            worths = worths_of(model, layers, adapter, data.train, pad_id, seed)
            self.spent = spend(adapter, model.num_parameters(), shapes_of(layers), worths)
        return self.spent.adapter

    def _begin(self, data: RunData, world_size: int) -> None:
        """From here on the folder is this run's."""
        from dude_peft.data.clock import moment

        self.folder.checkpoints.keep = self.config.train.save_total_limit
        now = environment(self.model.device, world_size, self.context.strategy)
        if (placed := placed_as(self.model)) is not None:
            now["device_map"] = placed
        if self.base.kernels:
            now["kernels"] = self.base.kernels
        if self.resumed is None:
            identity = Identity(
                self.config.model_dump(mode="json"),
                data.sha256,
                now,
                tokens=data.tokens_sha256,
                tokenizer=self._tokenizer_parts(data),
                asked={} if self.asked is None else self.asked.model_dump(mode="json"),
                moment=moment(),
                start={} if self.given is None else {"sha256": self.given.sha256, "is_base": self.from_base},
                stages="" if self.stages is None else self.stages.sha256,
                rewards={} if self.judge is None else self.judge.record,
            )
            self.folder.begin(identity, self.start)
            if self.spent is not None:
                self.folder.write(RANKS, rank_map(*self.spent.grid(), self.spent.line()))
        elif self.folder.earlier is not None and (changes := self.folder.earlier.differences(now)):
            told = ", ".join(changes)
            self.context.warn(f"the run started in another environment ({told}): results may differ in the last bits")
        if self.stages is not None:
            self.stages.write()

    def _train(self, data: RunData, arguments: Any, behind_seconds: float) -> Fit:
        from dude_peft.folder.state import load_trained_state
        from dude_peft.training.fit import Training
        from dude_peft.training.loop import Loop, metric_name

        scorer, writes = self.scorer, self.folder.writes
        loop = Loop(
            display=self.display,
            stop=self.stop,
            evaluation=self.config.evaluation,
            name_of=data.train.source,
            save_adapter=save_adapter,
            checkpoints=self.folder.checkpoints if arguments.should_save else None,
            open_metrics=lambda kept: self.folder.lines(METRICS, kept) if writes else nullcontext(),
            open_rollouts=lambda kept: self.folder.lines(ROLLOUTS, kept) if writes and self.judge else nullcontext(),
            warn=self.context.warn,
            watched="loss" if self.judge is None else "reward",
            stage_of=None if self.stages is None else self.stages.order.stage_of,
            resumed=self.resumed,
            held_out_scores=None if self.held_out is None else self.held_out.means,
            movement_steps=self.config.train.movement_steps,
            task_scores=None
            if scorer is None
            else lambda: scorer.score(self.model, self.tokenizer, self.folder.path / SCORES),
            behind_seconds=behind_seconds,
        )
        with self.context.phase("training"):
            fitted = Training(
                self.model,
                self.tokenizer,
                self.base.nature,
                data.train,
                arguments,
                self.config,
                loop,
                self.judge,
                self.base.company,
                None if self.stages is None else self.stages.order,
                self.reference,
            ).run()
        self.context.seconds["training"] = round(fitted.seconds, 2)
        best = fitted.best_step
        if best is not None and self.config.evaluation.load_best_model_at_end and best != fitted.steps:
            self.display.say(f"{metric_name(self.config.evaluation)} was best at step {best}; that adapter is kept")
            load_trained_state(self.model, self.folder.checkpoints.load_best(best, fitted.best_seal))
        return fitted

    def _score(self, when: str) -> Score | None:
        if self.held_out is None:
            return None
        with self.context.phase(f"evaluation_{when}"):
            return self.held_out.score(when, self.display)

    def _save(self, fitted: Fit, before: Score | None, after: Score | None) -> None:
        from dude_peft.folder.state import sharded_state

        config = self.config
        state = sharded_state(self.model)
        plain = config.data.template == "plain" and bool(self.tokenizer.chat_template)
        writing: dict[str, str] = {"template": config.data.template, "special_tokens": config.data.special_tokens}
        self.folder.save_adapter(
            self.model,
            self.tokenizer,
            state,
            () if self.sight is None else self.sight.files,
            writing if plain or config.data.special_tokens != "text" else None,
        )
        self.folder.write(CONFIG, dump_config(config))
        steps, losses = zip(*fitted.curve, strict=True)
        held_out = [(0, before.watched)] if before else []
        held_out += fitted.held_out or ([(fitted.steps, after.watched)] if after else [])
        self.folder.write(PICTURE, loss_curve(steps, losses, held_out, *labels(config)))

    def _score_tasks(self) -> dict[str, Any] | None:
        if self.scorer is None:
            return None
        with self.context.phase("tasks"):
            folder, name = self.folder.path / SCORES, str(self.folder.path / ADAPTER)
            return self.scorer.finish(self.model, self.tokenizer, folder, name=name, display=self.display)

    def _report(
        self, data: RunData, fitted: Fit, before: Score | None, after: Score | None, tasks: dict[str, Any] | None
    ) -> RunReport:
        from dude_peft.training.run_report import report_of

        found = (data, fitted, before, after, tasks)
        more: dict[str, Any] = {"parameters": self.parameters, "asked": self.asked, "stages": self.stages}
        return report_of(self.context, self.base, self.model, *found, **more)
