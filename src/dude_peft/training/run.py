"""One run from configuration to result: check what can be checked, load, measure, train, measure again, save.

The order is the point: everything that needs no weights is checked first, so that a mistake costs seconds, and the
adapter is saved last of all that can go wrong. What needs torch is imported only after the first checks. Of several
processes the first one shows and writes; all load, measure and train: a sharded model works in all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.config.reading import dump_config
from dude_peft.config.schema import AdapterSection, DpoSection, KtoSection, ModelSection, RunConfig
from dude_peft.errors import ArtifactError, ConfigError, StoppedError
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
    STAGES,
    RunReport,
    Score,
    score_from,
)
from dude_peft.folder.run_folder import RunFolder, save_adapter
from dude_peft.machine import processes
from dude_peft.machine.environment import environment, hardware, versions
from dude_peft.model.load import with_only_gguf
from dude_peft.rewards.notes import reward_notes
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports
from dude_peft.training.picture import check_picture, loss_curve, rank_map
from dude_peft.training.placement import (
    check_adapted,
    check_map,
    check_placed,
    check_placement,
    placed_as,
    placement_notes,
)
from dude_peft.training.start import Start, put_on, with_start
from dude_peft.training.strategy import check_dense, check_strategy
from dude_peft.training.task_scores import ScorerOf, TaskScorer, scorer_for
from dude_peft.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from dude_peft.data.batches import Company
    from dude_peft.data.sight import Sight
    from dude_peft.folder.checkpoint import Checkpoint
    from dude_peft.measure.base_weights import WeightOf
    from dude_peft.rewards.judge import Judge
    from dude_peft.training.budget import Spent
    from dude_peft.training.curriculum import Curriculum
    from dude_peft.training.curriculum_order import CurriculumOrder
    from dude_peft.training.fit import Fit
    from dude_peft.training.held_out_scorer import HeldOutScorer
    from dude_peft.training.run_data import RunData

CardOf = Callable[[Path, dict[str, Any]], str]
"""The model card of an adapter, from its folder and the run's report."""

PageOf = Callable[[Path, "WeightOf | None"], Path]
"""Writes the page about a finished run's folder, with the base weights in memory, and tells where."""

_JUDGING = ("test", "questions")
"""Sets that held-out scores are of."""
_GGUF_NOTE = "the base weights come from a GGUF file, dequantised"


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
    config, start = with_start(config)
    resolved = config.resolved()
    resolved = resolved.model_copy(update={"model": with_only_gguf(resolved.model)})
    folder = RunFolder(config.output_dir, overwrite=overwrite, writes=processes.is_first())
    try:
        scorer = scorer_for(resolved.evaluation, resolved.data.special_tokens, scorer_of)
        silent = quiet or not processes.is_first()
        this = _Run(resolved, start, folder, weights_only, strategy, scorer, card_of, write_page, quiet=silent)
        with gathered_warnings(this.warn), this.stop.listening(), this.judging(), this.held:
            return this.go()
    finally:
        folder.release()


class _Run:
    def __init__(
        self,
        config: RunConfig,
        given: Start | None,
        folder: RunFolder,
        weights_only: bool,
        strategy: str,
        scorer: TaskScorer | None,
        card_of: CardOf | None,
        write_page: PageOf | None,
        *,
        quiet: bool,
    ) -> None:
        from dude_peft.machine.stop import Stop
        from dude_peft.training.progress import Display

        self.config = config
        self.asked: AdapterSection | None = None if config.adapter.budget is None else config.adapter
        """The adapter section whose budget becomes ranks; `config` has these as soon as they are known."""
        self.spent: Spent | None = None
        self.given = given
        """The adapter that the run was told to begin with."""
        self.folder = folder
        self.weights_only = weights_only
        self.strategy = strategy
        self.scorer = scorer
        self.card_of = card_of
        self.write_page = write_page
        self.display = Display(quiet=quiet)
        self.stop = Stop(self.display.warn)
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.tokenizer: Any = None
        self.reference: Tensor | None = None
        """What the base model makes of the pairs, where it was measured before training."""
        self.base_parts: list[Any] | None = None
        """What the scores of the base model depend on, where other runs may know them."""
        self.sight: Sight | None = None
        """How the model sees images; None where it has no processor."""
        self.model: Any = None
        self.nature: Any = None
        self.company: Company = "any"
        """Which held-out prompts share a batch."""
        self.share = False
        """Whether what held-out rows begin with is computed once."""
        self.resumed: Checkpoint | None = None
        self.exact = True
        """Whether a fresh adapter leaves the base model as it is."""
        self.start: Path | None = None
        """The adapter that training starts from; None for a fresh one."""
        self.from_base = True
        """Whether the run began, or begins, as the base model."""
        self.held_out: HeldOutScorer | None = None
        """Of held-out rows, where there are any, once the model is there."""
        self.is_split = strategy == "fsdp2" and processes.count() > 1
        """Whether each process has a share of the model, which the first one loads."""
        self.has_whole = not self.is_split or processes.is_first()
        """Whether this process loads the model."""
        self.judge: Judge | None = None
        """Of the model's own answers, where the objective rewards them."""
        self.curriculum: Curriculum | None = None
        """The stages of the training rows, where there are any."""
        self.stages_text = ""
        """curriculum.jsonl of them."""
        self.head: dict[str, Any] | None = None
        """What is recorded of the head that a reward model starts with."""
        self.order: CurriculumOrder | None = None
        """Of its rows."""
        self.held = ExitStack()
        """What the run has until its end: the lock of its offload folder, Liger's kernels in transformers."""
        self.liger = ""
        """Its version, and the kernels that the model has."""

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
        with self._phase("checks"):
            from dude_peft.model.load import code_note, load_tokenizer, locate
            from dude_peft.training.run_data import glance

            where = locate(config.model)
            for note in filter(None, (code_note(config.model), *reward_notes(config.train))):
                self.warn(note)
            if self.folder.earlier is not None:
                config = self._as_before(self.folder.earlier)
                self.folder.earlier.check_config(config.model_dump(mode="json"))
                self.folder.earlier.check_start(None if self.given is None else self.given.sha256)
                self.from_base = bool(self.folder.earlier.start.get("is_base", True))
            self._check_rate()
            check_placement(config, processes.count())
            if config.model.offload_folder is not None:
                self.held.enter_context(locked_folder(config.model.offload_folder, "model.offload_folder"))
            for note in check_strategy(config, self.strategy, processes.count(), scored=self.scorer is not None):
                self.warn(note)
            glance(config)
        with self._phase("imports"), quiet_imports():
            from dude_peft.model.processor import sight_of
            from dude_peft.training.fit import training_arguments
        arguments = training_arguments(config, self.strategy)
        self._check_quantisation(where, arguments.device)
        self._check_liger(where, arguments.device)
        with self._phase("data"):
            self.tokenizer = load_tokenizer(config.model, where, config.data.chat_template)
            self.sight = sight_of(config.model, where, self.tokenizer)
            if self.scorer is not None:
                with display.waiting("reading the tasks"):
                    self.scorer.check(self.tokenizer)
            data = self._read(arguments.world_size)
        if (finished := processes.from_first(self._finished())) is not None:
            return finished
        self._find_checkpoint()
        stages = config.train.curriculum
        if stages is not None and stages.by == "length":
            self.curriculum = self._staged(None, data)
            self._put_in_order(arguments)
        if config.train.rewarded is not None:
            self._start_rewards(config, data, arguments.device)
        self._load(where, data, arguments.device)
        if self.order is None:
            self._put_in_order(arguments)
        self.stop.raise_if_wanted()
        self._begin(data, arguments.world_size)
        if data.held_out is not None:
            from dude_peft.training.held_out_scorer import HeldOutScorer

            companies = (self.nature.company, self.company)
            self.held_out = HeldOutScorer(
                self.config, data.held_out, self.model, self.tokenizer, companies, self.judge, share=self.share
            )

        before, behind_seconds = self._before(data)
        if self.held_out is not None:
            self.held_out.forget_base()
        self.stop.raise_if_wanted()
        fitted = self._train(data, arguments, behind_seconds)
        after = self._score("after")
        data.verify_unchanged()
        with self._phase("saving"):
            self._save(fitted, before, after)
        tasks = self._score_tasks()
        self.seconds["total"] = round(time.perf_counter() - begun, 2)
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
            f"{self.seconds['total']:.0f} s in all"
        )
        display.say(f"adapter: {shown(self.folder.path / ADAPTER, None)}")
        self._tell_next(report, paged=self._write_page())
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
                self._settle(AdapterSection.model_validate(settled))
            except ValueError as error:  # pydantic's
                name = shown(self.folder.path / RUN, 300)
                raise ArtifactError(f"{name} is damaged: its ranks are none; add --overwrite to start over") from error
        return self.config

    def _settle(self, adapter: AdapterSection) -> None:
        self.config = self.config.model_copy(update={"adapter": adapter})

    def _before(self, data: RunData) -> tuple[Score | None, float]:
        """What the model that the run begins with knows of the held-out rows, and the seconds that finding out took."""
        found = None if self.resumed is None else self.folder.read_before(self.warn)
        kept = processes.from_first(found)
        if kept is not None:
            return kept
        if self.resumed is not None and not self.from_base and data.held_out is not None:
            self.warn("the scores from before training are lost, and the model that they were of is not there any more")
            return None, 0.0
        before, seconds = self._measured_before(data)
        if before is not None:
            self.folder.write_before(before, seconds)
        return before, seconds

    def _measured_before(self, data: RunData) -> tuple[Score | None, float]:
        """Measured now, or by an earlier run of the same base model, rows and settings here; and how long that took."""

        def measure() -> tuple[Score | None, float]:
            with self.model.disable_adapter() if self.from_base else nullcontext():
                found = self._score("before")
            return found, self.seconds.get("evaluation_before", 0.0)

        if self.base_parts is None or not self.from_base:
            return measure()
        from dude_peft.answer.cache import key_of, shared_cache

        settings = self.config.evaluation
        how = [settings.batch_size, settings.max_new_tokens, self.nature.company, self.company, self.share]
        hashes = (data.sha256, data.tokens_sha256)
        rows = [{name: part for name, part in each.items() if name in _JUDGING} for each in hashes]
        key = key_of(*self.base_parts, rows, self._tokenizer_parts(data), how, hardware(self.model.device))
        with shared_cache("base scores", key, self.display.say, self.stop.raise_if_wanted) as cache:
            if "score" not in cache:
                found, seconds = measure()
                cache.add({"score": None if found is None else asdict(found), "seconds": seconds})
                return found, seconds
            try:
                known = score_from(cache["score"]), float(cache["seconds"])
            except (TypeError, KeyError, ValueError) as error:
                raise cache.damaged() from error
            self.display.say("held-out rows, before: known from an earlier run of this base model")
            return known

    def _check_rate(self) -> None:
        from dude_peft.methods import METHODS
        from dude_peft.methods.idle import idle_settings
        from dude_peft.methods.learning_rate import learning_rate_warning

        if self.config.adapter.foreign:
            return
        for line in idle_settings(METHODS[self.config.adapter.method], (self.asked or self.config.adapter).changed()):
            self.warn(line)
        rate = self.config.train.learning_rate
        assert rate is not None, "a resolved configuration has a rate"
        from_rows = self.config.train.from_rows
        if warning := learning_rate_warning(METHODS[self.config.adapter.method], rate, from_rows=from_rows):
            self.warn(warning)

    def _read(self, world_size: int) -> RunData:
        from dude_peft.data.clock import moment, set_moment
        from dude_peft.training.image_rows import check_images
        from dude_peft.training.run_data import read

        earlier = self.folder.earlier
        set_moment(processes.from_first(moment() if earlier is None else earlier.moment or moment()))
        with self.display.waiting("reading the rows"):
            data = read(self.config, self.tokenizer, self.sight)
        check_images(self.config, data.images, world_size)
        if earlier is not None:
            earlier.check_data(data.sha256)
            earlier.check_tokens(data.tokens_sha256)
            earlier.check_tokenizer(self._tokenizer_parts(data))
        for warning in data.warnings:
            self.warn(warning)
        if len(data.train) < world_size:
            self.warn(
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
            self._tell_next(report, paged=(self.folder.path / PAGE).is_file())
        return report

    def _start_rewards(self, config: RunConfig, data: RunData, device: Any) -> None:
        """The rewards of the run, those that it began with, before the model is loaded."""
        from dude_peft.rewards.judge import Judge

        rewarded, earlier = config.train.rewarded, self.folder.earlier
        assert rewarded is not None
        with self._phase("rewards"), self.display.waiting("starting the rewards"):
            self.judge = Judge(rewarded, config.model.dtype, device)
        if earlier is not None:
            earlier.check_rewards(self.judge.record)
        if rewarded.reads_conversations:
            longest = data.train.conversation(int(data.train.asked.argmax()))
            for warning in self.judge.try_out(longest):
                self.warn(warning)

    def _find_checkpoint(self) -> None:
        """Where training goes on, told apart before the model is loaded; the first process decides for all."""
        if self.folder.earlier is not None and self.weights_only:
            self.start = self.folder.checkpoints.newest_adapter(self.warn)
            self.warn(f"only the adapter of {self.start.parent.name} is used: optimizer and schedule start over")
        elif self.folder.earlier is not None:
            self.resumed = self.folder.checkpoints.newest(self.warn)
            if self.resumed is None:
                self.display.say("this run was interrupted before its first checkpoint; it starts from the beginning")
            else:
                self.display.say(f"resuming from the checkpoint of step {self.resumed.step}")
                self.start = self.resumed.path / ADAPTER
        self.resumed, self.start = processes.from_first((self.resumed, self.start))

    def _load(self, where: str, data: RunData, device: Any) -> None:
        """Loads the model and puts the adapter on it, sure that a fresh one changes nothing yet.

        Of a split model the first process does all of that, as the only process of a run would, and hands out the
        shares; on its CPU, since the model may be larger than its device.
        """
        from dude_peft.answer.fingerprint import answering_parts
        from dude_peft.model.load import load_empty, load_model
        from dude_peft.model.probe import company_note, company_of, nature_of, quiet_router_
        from dude_peft.model.quantised import check_trains, method_of, stored_config
        from dude_peft.training.end_token import end_token_warning
        from dude_peft.training.half import half_warning
        from dude_peft.training.liger import check_head, check_loss
        from dude_peft.training.model_checks import (
            check_answers_fit,
            check_attention,
            check_fits,
            check_nature,
            check_packs,
            probe,
            record_of_head,
        )

        config, display = self.config, self.display
        pad_id = int(self.tokenizer.pad_token_id)
        if self.asked is not None:
            import dude_peft.training.budget  # noqa: F401  # before the model is there
        with self._phase("model"), display.waiting("loading the model"):
            model: Any
            if isinstance(config.model.device_map, dict):
                check_map(load_empty(config.model, where, config.train.task_type), config.model)
            if self.has_whole:
                how: Any = {"task_type": config.train.task_type, "head_seed": config.train.seed}
                model = load_model(self._model_section(), where, **how)
            else:
                model = load_empty(self._model_section(), where)
            writes = config.train.task_type == CAUSAL
            if config.model.device_map is not None:
                check_placed(model)
            if not writes:  # where it reads the score: at the last token that is another one
                model.config.get_text_config().pad_token_id = pad_id
                self.head = record_of_head(model, config.train.seed)
            check_trains(getattr(model, "hf_quantizer", None), stored_config(model.config))
            check_fits(model, data.largest_id, data.longest, self.tokenizer)
            if writes and data.held_out is not None:
                asked, key = max(map(len, data.held_out.prompts), default=0), "evaluation.max_new_tokens"
                check_answers_fit(model, asked, config.evaluation.max_new_tokens, key, "held-out rows")
            if (rewarded := config.train.rewarded) is not None:
                asked, key = int(data.train.asked.max()), "train.grpo.max_completion_length"
                check_answers_fit(model, asked, rewarded.max_completion_length, key)
            drawn = None if config.train.curriculum is None else config.train.curriculum.max_new_tokens
            if drawn is not None:
                check_answers_fit(model, int(data.train.asked.max()), drawn, "train.curriculum.max_new_tokens")
            if self.is_split:
                model.generation_config = processes.from_first(model.generation_config)
            elif config.model.device_map is None:
                model.to(device)
            self._apply_liger(model)
            # The same in all processes: what follows from it, they do together.
            self.nature = processes.from_first(nature_of(model, pad_id) if self.has_whole else None)
            check_nature(self.nature, config)
            if config.train.chunks_loss:
                check_loss(model, self.nature)
            if not self.is_split:
                check_attention(model, config.model.attn_implementation)
            quiet_router_(model)
            if warning := half_warning(model.dtype, scaled=config.train.fp16):
                self.warn(warning)
            notes = self.nature.notes(config.train.objective)
            notes += placement_notes(model, checkpoints=config.train.gradient_checkpointing)
            if quantised := stored_config(model.config):
                notes.append(f"the base model is quantised ({shown(method_of(quantised))})")
            answers = rewarded is not None or drawn is not None
            if answers or (writes and data.held_out is not None and config.evaluation.batch_size > 1):
                own = company_of(model, pad_id) if self.has_whole else self.company
                self.company = processes.from_first(own)
                notes.append(company_note(self.nature.name, self.company))
            self.share = writes and self._shares(model, data, pad_id)
            scores = data.held_out is not None and config.train.section is None
            # A resumed run has its own; of offloaded weights the hashes would take as long as the scores.
            if scores and self.resumed is None and processes.count() == 1 and not config.model.is_hooked:
                self.base_parts = answering_parts(model, self.tokenizer)
            base = probe(model, data.train, pad_id) if self.has_whole else None
            if config.data.packing and self.has_whole:
                check_packs(model)
        for note in [*filter(None, notes), *([_GGUF_NOTE] if config.model.gguf_file else [])]:
            display.say(f"note: {note}")
        if drawn is not None:
            with self._phase("pass_rates"):
                self.curriculum = self._staged(model, data)
        if isinstance(config.train.preference, DpoSection) and config.train.preference.precompute_ref_log_probs:
            with self._phase("reference"):
                self.reference = self._measured_reference(model, data)
        if self.asked is not None:
            with self._phase("budget"):
                spent = self._spend(model, data, pad_id) if processes.is_first() else self.asked
                self._settle(processes.from_first(spent))
            if self.spent is not None:
                display.ranks(self.spent)
        with self._phase("adapter"), display.waiting("making the adapter"):
            if self.has_whole:
                self._adapt(model, base, data, pad_id)
                check_adapted(self.model)
                check_head(self.model, config.train)
                if writes and (warning := end_token_warning(self.model, data.train, self.tokenizer)):
                    self.warn(warning)
            if self.is_split:
                self._split(model, data, pad_id, device)
        trainable, total = self.model.get_nb_trainable_parameters()
        begun = f"the start {'equals' if self.exact else 'is not'} the base model bit by bit"
        if self.start is not None:
            begun = f"started from {shown(self.start, 300)}"
        elif self.given is not None:
            begun = f"started from {shown(self.given.folder, 300)}, which " + (
                "equals the base model bit by bit"
                if self.from_base
                else "is not its base model alone: scores before training are with it"
            )
        display.say(
            f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %), on {len(data.train):,} "
            f"examples of {data.train.counts.tokens:,} tokens; " + begun
        )

    def _shares(self, model: Any, data: RunData, pad_id: int) -> bool:
        """Whether held-out rows begin alike and may be scored so: decided on the base model, the same after a resume.

        Not under autocast, where near ties fall otherwise, nor with graphs that are compiled for whole rows. Where
        weights lie elsewhere, it is their way that takes the time.
        """
        from dude_peft.measure.score import begin_alike
        from dude_peft.model.prefix import shares_exactly

        config, held_out = self.config, data.held_out
        other = config.train.autocasts or config.train.torch_compile or config.model.is_hooked
        if held_out is None or self.sight is not None or other:
            return False
        examples: Any = held_out.examples if config.train.preference is None else []
        companies = (self.nature.company, self.company)
        if not begin_alike(examples, held_out.prompts, batch_size=config.evaluation.batch_size, companies=companies):
            return False
        return bool(processes.from_first(shares_exactly(model, pad_id) if self.has_whole else None))

    def _staged(self, model: Any, data: RunData) -> Curriculum:
        """The stages of the training rows; pass rates are measured on the base model, or read where they were kept.

        By length no model is needed.
        """
        import numpy as np

        from dude_peft.training.curriculum import sha256_of, staged, values_in

        settings, earlier = self.config.train.curriculum, self.folder.earlier
        assert settings is not None
        text = None if earlier is None else self.folder.read_stages(earlier.stages, self.warn)
        if settings.by == "length":
            values = data.train.lengths.astype(np.float64)
        elif text is not None:
            values = values_in(text, settings)
        else:
            values = self._pass_rates(model, data)
        found = staged(settings, values)
        self.stages_text = found.text(data.train.source)
        if earlier is not None:
            earlier.check_stages(sha256_of(self.stages_text))
        return found

    def _pass_rates(self, model: Any, data: RunData) -> Any:
        from dude_peft.training.pass_rates import PassRates

        config = self.config
        assert config.train.curriculum is not None
        self.stop.after("while pass rates were measured; what is measured is kept, run the same command again")
        measured = PassRates(
            model,
            self.tokenizer,
            config.train.curriculum,
            seed=config.data.seed,
            batch_size=config.evaluation.batch_size,
            company=self.company,
            bf16=config.train.bf16,
            rewarded=config.train.rewarded,
            judge=self.judge,
        ).measure(
            data.train,
            data.train.source,
            data.train.conversation,
            say=self.display.say,
            stage=self.display.stage,
            check=self.stop.raise_if_wanted,
        )
        self.stop.after("before training began; nothing is lost")
        return measured

    def _measured_reference(self, model: Any, data: RunData) -> Any:
        """What the base model makes of the pairs, before an adapter is on it."""
        from dude_peft.training.reference import Reference

        evaluation, train = self.config.evaluation, self.config.train
        self.stop.after("while the reference was measured; what is measured is kept, run the same command again")
        measured = Reference(model, self.tokenizer, evaluation.batch_size, self.nature.company, train.bf16).measure(
            data.train,
            data.tokens_sha256["train"],
            say=self.display.say,
            stage=self.display.stage,
            check=self.stop.raise_if_wanted,
        )
        self.stop.after("before training began; nothing is lost")
        return measured

    def _put_in_order(self, arguments: Any) -> None:
        """Says in which steps each stage is trained on."""
        if self.curriculum is None:
            return
        from dude_peft.training.curriculum_order import CurriculumOrder
        from dude_peft.training.fit import trainer_steps

        train, rewarded = self.config.train, self.config.train.rewarded
        self.order = CurriculumOrder(
            [stage.rows.tolist() for stage in self.curriculum.stages],
            train.seed,
            answers=1 if rewarded is None else rewarded.num_generations,
            step=train.per_device_train_batch_size * train.gradient_accumulation_steps * arguments.world_size,
            iterations=1 if rewarded is None else rewarded.num_iterations,
            batch=0 if rewarded is None else train.per_device_train_batch_size,
            processes=1 if rewarded is None else arguments.world_size,
            steps_of=lambda places: trainer_steps(arguments, places),
        )
        for line in self.curriculum.told(self.order.bounds):
            self.display.say(line)
        for line in self.curriculum.doubts():
            self.warn(line)

    def _spend(self, model: Any, data: RunData, pad_id: int) -> AdapterSection:
        """The adapter section with ranks for its budget; by the first process, for all."""
        from dude_peft.training.budget import shapes_of, spend, targets, worths_of

        adapter, seed = self.config.adapter, self.config.train.seed
        if adapter.budget is None:  # an earlier process of this run knew
            return adapter
        with self.display.waiting("spending the budget"):
            layers = targets(model, adapter, self.config.train.task_type)
            worths = worths_of(model, layers, adapter, data.train, pad_id, seed)
            self.spent = spend(adapter, model.num_parameters(), shapes_of(layers), worths)
        return self.spent.adapter

    def _adapt(self, model: Any, base: Any, data: RunData, pad_id: int) -> None:
        """The adapter on the model: loaded, or made once, by the first process, and loaded from its file by others."""
        import peft
        import torch
        import transformers

        from dude_peft.training.full_precision import FullPrecision
        from dude_peft.training.model_checks import (
            check_beginning,
            check_reference,
            check_start,
            keep_fingerprints,
            probe,
        )
        from dude_peft.tuner import DudeConfig, load_adapter
        from dude_peft.tuner.foreign import load_foreign
        from dude_peft.tuner.same_base import with_remedy

        transformers.set_seed(self.config.train.seed)
        fresh = self.start is None
        load = load_foreign if self.config.adapter.foreign else load_adapter
        if not fresh:
            with with_remedy(
                f"restore the base model that this run started with ({shown(self.config.model.name_or_path, 300)} has "
                "changed), or add --overwrite to start over"
            ):
                self.model = load(model, str(self.start), is_trainable=True)
        elif self.given is not None:
            self.model = put_on(model, self.given, self.config)
            self.from_base = bool(torch.equal(base, probe(self.model, data.train, pad_id)))
            check_beginning(self.config, from_base=self.from_base)
            if self.scorer is not None and not self.from_base:
                self.warn("evaluation.tasks: the base model that is scored is adapter.start's base without the start")
        elif processes.is_first() and self.config.adapter.foreign:
            self.model = self._adapt_foreign(model, base, data, pad_id)
        elif processes.is_first():
            # Its keys are DudeConfig's own.
            settings = DudeConfig(**self.config.adapter.settings(), task_type=self.config.train.task_type)
            full = None
            if self.config.adapter.init_from is not None:
                full = FullPrecision(self.config)
            with nullcontext() if full is None else full.starts():
                self.model = peft.get_peft_model(model, settings)
            if full is not None:
                self.display.say(f"note: {full.told()}")
            check_start(base, probe(self.model, data.train, pad_id))
            if self.spent is not None:
                self.spent.check(self.model)
        objective = self.config.train.objective
        if self.config.train.has_base and self.model is not None:
            check_reference(self.model, base, lambda model: probe(model, data.train, pad_id), objective)
        if processes.count() > 1 and not self.is_split:
            made = fresh and self.given is None
            with self.folder.shared_start(self.model if made else None) as start:
                processes.from_first(None)
                if made and not processes.is_first():
                    self.model = load(model, str(start), is_trainable=True)
                processes.from_first(None)
        if processes.count() > 1 and not self.config.adapter.foreign:
            keep_fingerprints(self.model)
        transformers.set_seed(self.config.train.seed)

    def _model_section(self) -> ModelSection:
        """The model section; a split model takes its attention up on the device, which may be the only one for it."""
        section = self.config.model
        return section.model_copy(update={"attn_implementation": None}) if self.is_split else section

    def _split(self, model: Any, data: RunData, pad_id: int, device: Any) -> None:
        """The first process's adapted model, cut and handed out, sure that each process computes what that one did."""
        import transformers

        from dude_peft.machine.sharding import split
        from dude_peft.training.model_checks import check_attention, check_shares, probe
        from dude_peft.tuner.load import put_on_empty

        config: Any = processes.from_first(None if self.model is None else self.model.peft_config["default"])
        self.exact, self.from_base = processes.from_first((self.exact, self.from_base))
        before = None if self.model is None else probe(self.model, data.train, pad_id)
        if self.model is None:
            self.model = put_on_empty(model, config)
        split(self.model, device)
        check_shares(before, probe(self.model, data.train, pad_id))
        if (wanted := self.config.model.attn_implementation) is not None:
            model.set_attn_implementation(wanted)
            check_attention(self.model, wanted)
        transformers.set_seed(self.config.train.seed)

    def _adapt_foreign(self, model: Any, base: Any, data: RunData, pad_id: int) -> Any:
        """An adapter that stock PEFT makes; where its start is not the base model, the run says how far it is off."""
        from dude_peft.training.model_checks import distance, probe
        from dude_peft.tuner.foreign import adapt_foreign, check_disabled

        assert self.config.adapter.peft is not None
        name = self.config.adapter.method
        adapted = adapt_foreign(model, self.config.adapter.peft)
        fault = f"the start of {name} gives NaN or Inf; change its settings"
        moved = distance(base, probe(adapted, data.train, pad_id, fault))
        check_disabled(adapted, base, lambda model: probe(model, data.train, pad_id, fault))
        self.exact = moved == 0
        if moved:
            self.warn(
                f"the start of {name} is not the base model: it changes the logits by up to {moved:.2g}, so the first "
                "losses of the run are not the base model's"
            )
        return adapted

    def _check_quantisation(self, where: str, device: Any) -> None:
        """What can be told of a quantised base before its weights are read."""
        from dude_peft.model.load import dtype_of, load_settings
        from dude_peft.model.quantised import (
            asked_of,
            check_as_stored,
            check_plain,
            check_runs,
            method_of,
            packed_config,
            stored_config,
        )

        if self.config.adapter.init_from is not None and self.folder.earlier is None:
            from dude_peft.training.full_precision import full_precision

            full_precision(self.config, load_settings(self.config.model, where))
        if self.config.model.gguf_file is not None:  # dequantised, whatever it is
            return
        settings = load_settings(self.config.model, where)
        check_as_stored(self.config.model, settings)
        asked, stored = asked_of(self.config.model), stored_config(settings)
        if asked or stored:
            check_dense(self.strategy, processes.count())
            if self.config.model.device_map is not None:
                raise ConfigError("model.device_map: a quantised base is on one device; leave it out")
        if stored and packed_config(settings) is None:
            dtype = str(dtype_of(self.config.model, settings, where)).removeprefix("torch.")
            self.display.say(f"note: the checkpoint stores {shown(method_of(stored))}, dequantised to {dtype}")
        if self.asked is not None or self.config.adapter.foreign:
            check_plain(self.config.model, settings, "adapter.method" if self.asked is None else "adapter.budget")
        if asked is not None and stored is None:
            check_runs(asked, dtype_of(self.config.model, settings, where), device)

    def _check_liger(self, where: str, device: Any) -> None:
        if not self.config.train.use_liger_kernel:
            return
        from dude_peft.model.load import load_settings

        with self._phase("kernels"), quiet_imports():
            from dude_peft.training.liger import check_liger

            check_liger(self.config.train, load_settings(self.config.model, where), device)

    def _apply_liger(self, model: Any) -> None:
        if not self.config.train.use_liger_kernel:
            return
        from dude_peft.training.liger import apply_liger_, restored

        self.held.enter_context(restored())
        self.liger = apply_liger_(model, self.config.train)
        self.display.say(f"note: kernels of {self.liger}; all numbers of this run are with them")

    def _begin(self, data: RunData, world_size: int) -> None:
        """From here on the folder is this run's."""
        from dude_peft.data.clock import moment
        from dude_peft.training.curriculum import sha256_of

        self.folder.checkpoints.keep = self.config.train.save_total_limit
        now = environment(self.model.device, world_size, self.strategy)
        if (placed := placed_as(self.model)) is not None:
            now["device_map"] = placed
        if self.liger:
            now["kernels"] = self.liger
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
                stages="" if self.curriculum is None else sha256_of(self.stages_text),
                rewards={} if self.judge is None else self.judge.record,
            )
            self.folder.begin(identity, self.start)
            if self.spent is not None:
                self.folder.write(RANKS, rank_map(*self.spent.grid(), self.spent.line()))
        elif self.folder.earlier is not None and (changes := self.folder.earlier.differences(now)):
            told = ", ".join(changes)
            self.warn(f"the run started in another environment ({told}): results may differ in the last bits")
        if self.curriculum is not None:
            self.folder.write(STAGES, self.stages_text)

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
            warn=self.warn,
            watched="loss" if self.judge is None else "reward",
            stage_of=None if self.order is None else self.order.stage_of,
            resumed=self.resumed,
            held_out_scores=None if self.held_out is None else self.held_out.means,
            movement_steps=self.config.train.movement_steps,
            task_scores=None
            if scorer is None
            else lambda: scorer.score(self.model, self.tokenizer, self.folder.path / SCORES),
            behind_seconds=behind_seconds,
        )
        with self._phase("training"):
            fitted = Training(
                self.model,
                self.tokenizer,
                self.nature,
                data.train,
                arguments,
                self.config,
                loop,
                self.judge,
                self.company,
                self.order,
                self.reference,
            ).run()
        self.seconds["training"] = round(fitted.seconds, 2)
        best = fitted.best_step
        if best is not None and self.config.evaluation.load_best_model_at_end and best != fitted.steps:
            self.display.say(f"{metric_name(self.config.evaluation)} was best at step {best}; that adapter is kept")
            load_trained_state(self.model, self.folder.checkpoints.load_best(best, fitted.best_seal))
        return fitted

    def _score(self, when: str) -> Score | None:
        if self.held_out is None:
            return None
        with self._phase(f"evaluation_{when}"):
            return self.held_out.score(when, self.display)

    def _save(self, fitted: Fit, before: Score | None, after: Score | None) -> None:
        from dude_peft.folder.state import sharded_state
        from dude_peft.methods import METHODS

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
        own = METHODS.get(config.adapter.method)
        ranks = (config.adapter.r, *config.adapter.rank_pattern.values())
        what = config.adapter.method if own is None else f"{own.name}, {own.size(*ranks)}"
        title = f"{what}, on {shown(config.model.name_or_path)}"
        unit: tuple[str, ...] = ()
        if config.train.rewarded is not None:
            unit = ("reward",)
        elif config.train.preference is not None:
            judged = "an answer" if isinstance(config.train.preference, KtoSection) else "a pair"
            unit = (f"loss of {judged} ({config.train.objective})",)
        self.folder.write(PICTURE, loss_curve(steps, losses, held_out, title, *unit))

    def _score_tasks(self) -> dict[str, Any] | None:
        if self.scorer is None:
            return None
        with self._phase("tasks"):
            folder, name = self.folder.path / SCORES, str(self.folder.path / ADAPTER)
            return self.scorer.finish(self.model, self.tokenizer, folder, name=name, display=self.display)

    def _report(
        self,
        data: RunData,
        fitted: Fit,
        before: Score | None,
        after: Score | None,
        tasks: dict[str, Any] | None,
    ) -> RunReport:
        from dude_peft.artifact.manifest import seal_of

        config = self.config
        trainable, total = self.model.get_nb_trainable_parameters()
        return RunReport(
            method=config.adapter.method,
            seed=config.train.seed,
            config=config.model_dump(mode="json"),
            versions=versions(),
            hardware=hardware(self.model.device),
            model={
                "name_or_path": config.model.name_or_path,
                "class": type(self.model.get_base_model()).__name__,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "note": _GGUF_NOTE if config.model.gguf_file else "",
                **({} if self.head is None else {"head": self.head}),
            },
            data=data.record,
            trainable_parameters=trainable,
            total_parameters=total,
            steps=fitted.steps,
            tokens=fitted.tokens,
            tokens_per_second=round(fitted.tokens_per_second, 1),
            before=before,
            after=after,
            seconds=self.seconds,
            warnings=self.warnings,
            best_step=fitted.best_step,
            tasks=tasks,
            files=self.folder.listed(),
            adapter_seal=seal_of(self.folder.path / ADAPTER) if self.folder.writes else None,
            budget=None
            if self.asked is None or self.asked.budget is None
            else self.asked.budget.model_dump(mode="json"),
            curriculum=None
            if self.curriculum is None or self.order is None
            else self.curriculum.record(self.order.bounds),
        )

    def _tell_next(self, report: RunReport, *, paged: bool) -> None:
        """The commands that take the adapter up, and the one that writes the page, where there is none."""
        from dude_peft.terminal.next_steps import tell_next
        from dude_peft.training.next_commands import next_commands

        if self.config.model.trust_remote_code:
            self.display.say(
                "note: only dude train and dude plan run a model's own code; in Python, use transformers for the "
                f"base model and {'peft.PeftModel' if self.config.adapter.foreign else 'dude_peft.load_adapter'} for "
                "the adapter"
            )
        folder = self.folder.path
        commands = next_commands(self.config, folder, report)
        page = [] if paged else [["report", str(folder), "-o", f"{folder}.html"]]
        tell_next(self.display, *commands, *page)

    def warn(self, text: str) -> None:
        """Shows a warning and keeps it for the report."""
        self.warnings.append(text)
        self.display.warn(text)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
