"""The stages of a run's training rows (`train.curriculum`): made before it begins, and read again after that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dude_peft.config.schema import CurriculumSection, RunConfig
from dude_peft.folder.record import STAGES
from dude_peft.training.context import RunContext

if TYPE_CHECKING:
    from dude_peft.data.batches import Company
    from dude_peft.rewards.judge import Judge
    from dude_peft.training.curriculum import Curriculum
    from dude_peft.training.curriculum_order import CurriculumOrder
    from dude_peft.training.run_data import RunData


def measures_pass_rates(config: RunConfig) -> bool:
    """Whether the base model answers the training prompts before it is trained."""
    return config.train.curriculum is not None and config.train.curriculum.by == "pass_rate"


class Stages:
    """Which rows are trained on when: found by `by_length` or `by_pass_rate`, then put in order."""

    def __init__(self, context: RunContext, settings: CurriculumSection, data: RunData) -> None:
        """`settings`: of the run's curriculum; `data`: its rows."""
        self._context, self._settings, self._data = context, settings, data
        self._curriculum: Curriculum | None = None
        self._text = ""
        self._order: CurriculumOrder | None = None

    @property
    def order(self) -> CurriculumOrder:
        """Of the rows, once they are in order."""
        assert self._order is not None
        return self._order

    @property
    def sha256(self) -> str:
        """Of curriculum.jsonl."""
        from dude_peft.training.curriculum import sha256_of

        return sha256_of(self._text)

    def write(self) -> None:
        """curriculum.jsonl."""
        self._context.folder.write(STAGES, self._text)

    def record(self) -> dict[str, Any]:
        """What is reported of them."""
        assert self._curriculum is not None
        return self._curriculum.record(self.order.bounds)

    def by_length(self) -> None:
        """Short rows first, which no model has to be there for."""
        import numpy as np

        self._kept()  # tells of a damaged file, which is made again
        self._stage(self._data.train.lengths.astype(np.float64))

    def by_pass_rate(self, model: Any, tokenizer: Any, company: Company, judge: Judge | None) -> None:
        """Rows that the base model answers right come first; measured now, or read where an earlier process kept it.

        Args:
            model: the base model.
            tokenizer: of it.
            company: which prompts share a batch.
            judge: of the answers, where the objective rewards them.
        """
        from dude_peft.training.curriculum import values_in

        kept = self._kept()
        if kept is not None:
            self._stage(values_in(kept, self._settings))
        else:
            self._stage(self._pass_rates(model, tokenizer, company, judge))

    def put_in_order(self, arguments: Any) -> None:
        """Says in which steps each stage is trained on; `arguments`: of the Trainer."""
        from dude_peft.training.curriculum_order import CurriculumOrder
        from dude_peft.training.fit import trainer_steps

        assert self._curriculum is not None
        train = self._context.config.train
        rewarded = train.rewarded
        self._order = CurriculumOrder(
            [stage.rows.tolist() for stage in self._curriculum.stages],
            train.seed,
            answers=1 if rewarded is None else rewarded.num_generations,
            step=train.per_device_train_batch_size * train.gradient_accumulation_steps * arguments.world_size,
            iterations=1 if rewarded is None else rewarded.num_iterations,
            batch=0 if rewarded is None else train.per_device_train_batch_size,
            processes=1 if rewarded is None else arguments.world_size,
            steps_of=lambda places: trainer_steps(arguments, places),
        )
        for line in self._curriculum.told(self._order.bounds):
            self._context.display.say(line)
        for line in self._curriculum.doubts():
            self._context.warn(line)

    def _kept(self) -> str | None:
        """The text of curriculum.jsonl that an earlier process of the run has written."""
        folder = self._context.folder
        return None if folder.earlier is None else folder.read_stages(folder.earlier.stages, self._context.warn)

    def _stage(self, values: Any) -> None:
        from dude_peft.training.curriculum import staged

        self._curriculum = staged(self._settings, values)
        self._text = self._curriculum.text(self._data.train.source)
        if (earlier := self._context.folder.earlier) is not None:
            earlier.check_stages(self.sha256)

    def _pass_rates(self, model: Any, tokenizer: Any, company: Company, judge: Judge | None) -> Any:
        from dude_peft.training.pass_rates import PassRates

        context, train = self._context, self._data.train
        config, stop = context.config, context.stop
        stop.after("while pass rates were measured; what is measured is kept, run the same command again")
        measured = PassRates(
            model,
            tokenizer,
            self._settings,
            seed=config.data.seed,
            batch_size=config.evaluation.batch_size,
            company=company,
            bf16=config.train.bf16,
            rewarded=config.train.rewarded,
            judge=judge,
        ).measure(
            train,
            train.source,
            train.conversation,
            say=context.display.say,
            stage=context.display.stage,
            check=stop.raise_if_wanted,
        )
        stop.after("before training began; nothing is lost")
        return measured
