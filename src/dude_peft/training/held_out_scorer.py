"""What a run's model makes of the held-out rows: losses, answers, pairs and rewards, of whichever its objective has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dude_peft.config.schema import KtoSection, RewardModelSection, RunConfig
from dude_peft.data.answers import expected_answer, is_match
from dude_peft.errors import NumericsError
from dude_peft.folder.record import Answer, Score
from dude_peft.machine.processes import from_first, is_first
from dude_peft.measure.intervals import wilson_interval
from dude_peft.measure.score import complete, held_out_loss, item_losses
from dude_peft.task_types import CAUSAL
from dude_peft.training.label_scores import LabelMeter
from dude_peft.training.model_checks import most_tokens
from dude_peft.training.pair_scores import PairMeter
from dude_peft.training.reward_scores import mean_rewards
from dude_peft.training.scored_pairs import ScoreMeter

if TYPE_CHECKING:
    from dude_peft.data.batches import Company
    from dude_peft.rewards.judge import Judge
    from dude_peft.terminal.display import Display
    from dude_peft.training.run_data import HeldOut


class HeldOutScorer:
    """Scores one model on one set of held-out rows, before, while and after it trains."""

    def __init__(
        self,
        config: RunConfig,
        held_out: HeldOut,
        model: Any,
        tokenizer: Any,
        companies: tuple[Company, Company],
        judge: Judge | None,
        *,
        share: bool,
        spread: bool,
    ) -> None:
        """Nothing is scored yet.

        Args:
            config: of the run.
            held_out: the rows.
            model: in training.
            tokenizer: its own.
            companies: which rows share a batch of losses, and which prompts one of answers.
            judge: of rewards.
            share: compute what rows begin with once, as `item_losses` has it.
            spread: each process of the run scores a part of the rows, likewise.
        """
        self._settings, self._objective = config.evaluation, config.train
        self._max_length = config.data.max_length
        self._held_out, self._model, self._tokenizer, self._judge = held_out, model, tokenizer, judge
        self._company, self._answering = companies
        self._share, self._spread = share, spread
        self._pad_id = int(tokenizer.pad_token_id)
        self._meter: PairMeter | LabelMeter | ScoreMeter | None = None

    def forget_base(self) -> None:
        """Lets pairs measure the base model anew: autocast may wrap it from here on."""
        self._meter = None

    def means(self) -> dict[str, float]:
        """The loss, and the other means that a step of training is told with."""
        if self._objective.preference is not None:
            found = self._pairs().scores(self._model)
            return {"loss": found.mean, **found.means}
        loss = held_out_loss(
            self._model,
            self._held_out.examples,
            pad_id=self._pad_id,
            batch_size=self._settings.batch_size,
            company=self._company,
            share=self._share,
            spread=self._spread,
        )
        if self._judge is None:
            return {"loss": loss}
        return {"loss": loss, **self._rewards(self._answers())}

    def score(self, when: str, display: Display) -> Score:
        """All of it, row by row.

        Args:
            when: before or after, for people.
            display: shows how far it is.

        Raises:
            NumericsError: the loss is NaN or Inf.
        """
        held_out = self._held_out
        work = len(held_out.examples) + len(held_out.prompts)
        with display.stage(f"held-out rows, {when}", work) as advance:
            found: Any
            if self._objective.preference is not None:
                found = self._pairs().scores(self._model, advance)
            else:
                found = item_losses(
                    self._model,
                    held_out.examples,
                    pad_id=self._pad_id,
                    batch_size=self._settings.batch_size,
                    company=self._company,
                    share=self._share,
                    spread=self._spread,
                    advance=advance,
                )
            texts = self._answers(advance)
            rewards = self._rewards(texts)
        answers = tuple(
            Answer(row.prompt[-1].told, expected_answer(row), text, is_match(text, row))
            for row, text in zip(held_out.asked, texts, strict=True)
        )
        loss, preference = found.mean, None
        if self._objective.preference is not None:
            count = len(found.losses)
            interval = wilson_interval(found.right, count)
            unit = "answers" if isinstance(self._objective.preference, KtoSection) else "pairs"
            preference = {unit: count, "right": found.right, "interval": interval, **found.means}
        if not math.isfinite(loss):
            raise NumericsError(f"the held-out loss {when} training is {loss}; lower train.learning_rate")
        right = sum(answer.right for answer in answers)
        interval = wilson_interval(right, len(answers))
        lost = found.losses, found.tokens
        return Score(loss, right, len(answers), interval, answers, *lost, preference, rewards or None)

    def _answers(self, advance: Callable[[int], None] = lambda rows: None) -> list[str]:
        """The likeliest answers to held-out questions; a model that scores has none."""
        if self._objective.task_type != CAUSAL:
            return []
        return complete(
            self._model,
            self._tokenizer,
            self._held_out.prompts,
            max_new_tokens=self._settings.max_new_tokens,
            batch_size=self._settings.batch_size,
            company=self._answering,
            share=self._share,
            spread=self._spread,
            advance=advance,
        )

    def _rewards(self, texts: list[str]) -> dict[str, float]:
        """What they are rewarded with; nothing where the objective rewards nothing."""
        rewarded = self._objective.rewarded
        if rewarded is None or self._judge is None:
            return {}
        held_out, found = self._held_out, {}
        if is_first():
            found = mean_rewards(self._judge, rewarded, held_out.asked, held_out.prompts, texts, self._tokenizer)
        return from_first(found)  # of a function that is not the same twice, too

    def _pairs(self) -> PairMeter | LabelMeter | ScoreMeter:
        if self._meter is None:
            settings, examples = self._objective.preference, self._held_out.examples
            assert settings is not None
            size, pad_id = self._settings.batch_size, self._pad_id
            how = self._company, self._spread
            if isinstance(settings, KtoSection):
                longest = most_tokens(self._model, self._max_length)
                self._meter = LabelMeter(examples, settings, pad_id, size, longest, *how)
            elif isinstance(settings, RewardModelSection):
                self._meter = ScoreMeter(examples, settings, pad_id, size, *how)
            else:
                self._meter = PairMeter(examples, settings, pad_id, size, *how)
        return self._meter
