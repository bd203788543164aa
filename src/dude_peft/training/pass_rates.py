"""Pass rates: of the base model's own answers to each training prompt, the share that is right.

They are measured before training, once: what is drawn follows from the model, the prompts and the settings alone. What
answers score is kept batch by batch in the cache, under a hash of all that. So an interrupted measurement goes on, and
a second run of the same model and rows measures nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dude_peft.answer.cache import AnswerCache, key_of, shared_cache
from dude_peft.answer.decoding import Decoding
from dude_peft.answer.fingerprint import answering_parts
from dude_peft.config.schema import CurriculumSection, GrpoSection
from dude_peft.data.answers import same_answer
from dude_peft.data.batches import Company, grouped
from dude_peft.data.formats import Row
from dude_peft.errors import DataError, ResourceError
from dude_peft.folder.state import load_random_state, random_state
from dude_peft.machine.out_of_memory import is_out_of_memory
from dude_peft.rewards.judge import Group, Judge
from dude_peft.training.drawn import Drawn, asked_and_answer, draw, text_of


@dataclass(frozen=True)
class _Asked:
    """A prompt, and what its answers are compared with."""

    ids: list[int]
    answer: str
    place: str
    """Of its first row."""
    asked: Row | None
    """That row, where a reward model reads it."""


@dataclass(frozen=True)
class PassRates:
    """Measures a base model."""

    model: Any
    """Without an adapter."""
    tokenizer: Any
    settings: CurriculumSection
    """Completed."""
    seed: int
    """Of the sampling."""
    batch_size: int
    """Answers drawn at once."""
    company: Company = "any"
    """Which prompts may share a batch."""
    bf16: bool = False
    """Whether the model works under autocast."""
    rewarded: GrpoSection | None = None
    """Of grpo."""
    judge: Judge | None = None
    """Of grpo: who rewards answers."""

    def measure(
        self,
        examples: Sequence[Mapping[str, list[int]]],
        place_of: Callable[[int], str],
        conversation_of: Callable[[int], Row],
        *,
        say: Callable[[str], None],
        stage: Callable[[str, int], Any],
        check: Callable[[], None],
    ) -> NDArray[np.float64]:
        """The pass rate of each example; those with one prompt and one answer share it.

        Args:
            examples: to train on, each with an answer.
            place_of: an example's number -> its place in the data.
            conversation_of: an example's number -> what it asks (`TokenSet.conversation`); only for reward models.
            say: hears what the cache has.
            stage: opens a bar of so many prompts (`Display.stage`).
            check: raises where the run has been told to end.

        Raises:
            DataError: an answer that nothing can be compared with, or a reward that fails.
            NumericsError: NaN or Inf in the logits.
            ResourceError: memory or disk.
        """
        asked, of = self._asked(examples, place_of, conversation_of)
        samples = self.settings.samples
        assert samples is not None, "the settings are completed"
        together = max(1, self.batch_size // samples)
        batches = grouped([len(each.ids) for each in asked], together, self.company)
        before = random_state()
        with self._cache(asked, say, check) as cache:
            if len(cache):
                say(f"pass rates: {len(cache):,} of {len(asked):,} prompts are measured already")
            with stage("pass rates of the base model", len(asked)) as advance:
                for number, batch in enumerate(batches):
                    if not all(str(index) in cache for index in batch):
                        check()
                        cache.add(self._scored([asked[index] for index in batch], batch, number))
                    advance(len(batch))
            passes = [self._passes(cache, index) for index in range(len(asked))]
        load_random_state(*before)
        return np.array([passes[number] / samples for number in of], np.float64)

    def _asked(
        self,
        examples: Sequence[Mapping[str, list[int]]],
        place_of: Callable[[int], str],
        conversation_of: Callable[[int], Row],
    ) -> tuple[list[_Asked], list[int]]:
        """The different prompts with their answers, and which one each example has."""
        numbers: dict[tuple[Any, ...], int] = {}
        reads = self.rewarded is not None and self.rewarded.reads_conversations
        asked: list[_Asked] = []
        of = []
        for index in range(len(examples)):
            ids, answer = asked_and_answer(examples[index], self.tokenizer)
            if not answer:
                raise DataError(
                    f"{place_of(index)}: no answer to compare with, and a pass rate needs one in every row; remove the "
                    "row, or set train.curriculum.by: length"
                )
            row = conversation_of(index) if reads else None
            key = (tuple(ids), answer, *(() if row is None else (row.messages, row.tools)))
            if key not in numbers:
                numbers[key] = len(asked)
                asked.append(_Asked(ids, answer, place_of(index), row))
            of.append(numbers[key])
        return asked, of

    def _cache(
        self, asked: Sequence[_Asked], say: Callable[[str], None], check: Callable[[], None]
    ) -> AbstractContextManager[AnswerCache]:
        """Within: what is measured already, and a place for more."""
        digest = hashlib.sha256()
        for each in asked:
            said = [] if each.asked is None else [[asdict(one) for one in each.asked.messages], each.asked.tools]
            digest.update(json.dumps([each.ids, each.answer, *said]).encode("ascii") + b"\n")
        key = key_of(
            *answering_parts(self.model, self.tokenizer),
            digest.hexdigest(),
            [self._decoding.max_new_tokens, self._decoding.temperature, self._decoding.top_p, self.seed],
            [self.settings.samples, self.batch_size, self.company, self.bf16],
            self._reward,
        )
        return shared_cache("pass rates", key, say, check)

    @property
    def _decoding(self) -> Decoding:
        settings = self.settings
        assert settings.max_new_tokens is not None
        return Decoding(settings.max_new_tokens, settings.temperature or 1.0, settings.top_p or 1.0, self.seed)

    @property
    def _reward(self) -> dict[str, Any]:
        """What decides the scores of answers."""
        if self.rewarded is None:
            return {"kind": "ended, with the row's answer"}
        (chosen,) = (each for each in self.rewarded.rewards if each.title == self.settings.reward)
        own = chosen.model_dump(mode="json", exclude={"name", "weight", "file", "model"})
        verifier = {"math-verify": metadata.version("math-verify")} if chosen.kind == "math" else {}
        helpers: dict[str, Any] = {}
        if chosen.kind == "function" and self.judge is not None:
            helpers = {"beside": self.judge.beside}
        elif chosen.kind == "model" and self.judge is not None:
            helpers = {"model": self.judge.record["models"][chosen.title]}
        return own | {"longest": self.rewarded.max_completion_length} | verifier | helpers

    def _scored(self, asked: Sequence[_Asked], indices: Sequence[int], number: int) -> dict[str, list[float]]:
        """Scores of the answers to some prompts, by the prompts' numbers."""
        samples = self.settings.samples or 1
        prompts = [each.ids for each in asked for _ in range(samples)]
        size = 1 if self.company == "none" else self.batch_size
        batches = [list(range(begin, min(begin + size, len(prompts)))) for begin in range(0, len(prompts), size)]
        self._decoding.start(number)
        self.model.eval()
        try:
            name = "the base model"
            drawn = draw(self.model, self.tokenizer, prompts, batches, self._decoding, name=name, bf16=self.bf16)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(
                f"{max(map(len, batches))} answers to prompts of up to {max(map(len, prompts))} tokens do not fit into "
                "memory; lower evaluation.batch_size or train.curriculum.max_new_tokens"
            ) from error
        parts = [drawn[begin : begin + samples] for begin in range(0, len(drawn), samples)]
        each = zip(indices, asked, parts, strict=True)
        return {str(index): self._scores(prompt, answers) for index, prompt, answers in each}

    def _scores(self, asked: _Asked, answers: Sequence[Drawn]) -> list[float]:
        if self.rewarded is None or self.judge is None:
            return [float(each.ended and same_answer(each.text, asked.answer)) for each in answers]
        group = Group(
            asked.place,
            text_of(self.tokenizer, asked.ids),
            [each.text for each in answers],
            [each.ids for each in answers],
            asked.answer,
            asked.asked,
        )
        column = [each.title for each in self.rewarded.rewards].index(self.settings.reward or "")
        return [scores[column] for scores in self.judge.score(group)]

    def _passes(self, cache: AnswerCache, index: int) -> int:
        threshold = 1.0 if self.settings.threshold is None else self.settings.threshold
        scores = cache.parts(str(index), *[(int, float)] * (self.settings.samples or 1))
        return sum(score >= threshold for score in scores)
