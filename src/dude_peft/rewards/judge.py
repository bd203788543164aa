"""Rewards of a run, asked for in a process of their own with limits on its time and memory; reward models in this one.

A regular expression may take hours, math-verify reads what a model wrote, and a function of the user's may do anything:
none of them can be stopped in the same process. A fault of any of them ends the run, with the prompt that it was about:
numbers that are not there cannot be learned from.
"""

from __future__ import annotations

import importlib.util
import json
import math
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dude_peft.config.schema import GrpoSection
from dude_peft.data.formats import Row
from dude_peft.errors import ConfigError, DataError, ResourceError
from dude_peft.installing import install
from dude_peft.line_child import LineChild
from dude_peft.reward_file import source_of
from dude_peft.show import shown

if TYPE_CHECKING:
    from dude_peft.rewards.reward_model import RewardModel

_START_SECONDS = 120.0
_LARGEST = 1e30
"""Beyond it, squares of rewards leave float64's range in sums."""
_CORRECT = "correct it, and start over (--overwrite)"


@dataclass(frozen=True)
class Group:
    """Answers to one prompt."""

    place: str
    """Of its row: `file.jsonl:12`."""
    prompt: str
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    answer: str
    """Of the row."""
    asked: Row | None = None
    """The row, whose last message stands for the answers: for reward models, which read conversations."""


class Judge:
    """Rewards answers; its process starts with it and ends with `close`."""

    def __init__(self, settings: GrpoSection, dtype: str = "auto", device: Any = "cpu") -> None:
        """Loads the reward models, and starts the process in which the files of `settings`, resolved, run.

        Args:
            settings: of the objective.
            dtype: of reward models (`load_reward_model`).
            device: of these.

        Raises:
            ConfigError: math-verify is not installed, a file raises or hangs while it is read, or a reward model that
                cannot be used.
            ArtifactError: a reward model is damaged.
            ResourceError: no process can be started, or a reward model does not fit into memory.
        """
        self.names = [reward.title for reward in settings.rewards]
        self._timeout, self._gib = settings.reward_timeout, settings.reward_memory_gib
        self._models: dict[int, RewardModel] = {}
        for number, each in enumerate(settings.rewards):
            if each.kind == "model":
                from dude_peft.rewards.reward_model import load_reward_model

                self._models[number] = load_reward_model(each, dtype, device)
        self._numbers = [number for number in range(len(self.names)) if number not in self._models]
        """Of the rewards in the process."""
        self.beside: dict[str, str] = {}
        """sha256 of each file that the files of `settings` have imported from their own folders."""
        self._child: LineChild | None = None
        if self._numbers:
            self._start(settings)

    def _start(self, settings: GrpoSection) -> None:
        rewards = []
        for each in (settings.rewards[number] for number in self._numbers):
            if each.kind == "math" and importlib.util.find_spec("math_verify") is None:
                how = install("math-verify")
                raise ConfigError(f"train.grpo.rewards: math needs math-verify: {how}; or use answer")
            own = each.model_dump()
            if each.file is not None:
                own["source"] = source_of(each.file, each.sha256 or "")
            rewards.append(own)
        self._child = LineChild("dude_peft.rewards.child")
        try:
            first = {
                "rewards": rewards,
                "longest": settings.max_completion_length,
                "seconds": self._timeout,
                "gib": self._gib,
            }
            found = self._ask(first, _START_SECONDS)
        except (OSError, queue.Empty) as error:
            self.close()
            raise ResourceError("the process for rewards does not start; look at what their files import") from error
        if "fault" in found:
            self.close()
            name, fault = self.names[self._numbers[found["reward"]]], shown(found["fault"], 400)
            more = f"; it may take {self._gib:g} GiB, raise train.grpo.reward_memory_gib" if "memory" in found else ""
            raise ConfigError(f"train.grpo.rewards: {name}: {fault}{more}")
        self.beside = found["beside"]

    @cached_property
    def record(self) -> dict[str, Any]:
        """What decides rewards beside the configuration, as JSON (`Identity.rewards`)."""
        models = {self.names[number]: model.record() for number, model in self._models.items()}
        return {"beside": self.beside, "models": models}

    def try_out(self, asked: Row) -> list[str]:
        """Lets the reward models read what a row asks; a line for each that does not read all of it.

        Raises:
            DataError: one cannot read it, or gives no finite number.
        """
        lines = []
        for number, model in self._models.items():
            self._scores(number, {}, Group(asked.source, asked.prompt[-1].content, [""], [[]], "", asked))
            if missing := model.unwritten(asked):
                lines.append(
                    f"train.grpo.rewards: {self.names[number]}: its template does not write {', '.join(missing)}, so "
                    "its scores do not depend on it"
                )
        return lines

    def score(self, group: Group) -> list[list[float]]:
        """Of each answer what each reward gives it, in their order.

        Raises:
            DataError: a reward raises, hangs, takes too much memory, or gives other than one finite number an answer.
        """
        count = len(group.completions)
        asked = {
            "prompts": [group.prompt] * count,
            "completions": list(group.completions),
            "completion_ids": [list(ids) for ids in group.completion_ids],
            "answer": [group.answer] * count,
        }
        by_reward = [self._scores(number, asked, group) for number in range(len(self.names))]
        return [list(each) for each in zip(*by_reward, strict=True)]

    def close(self) -> None:
        """Ends the process."""
        if self._child is not None:
            self._child.stop()

    def _scores(self, number: int, asked: dict[str, Any], group: Group) -> list[float]:
        if number in self._models:
            return self._checked(number, self._by_model(number, group), group)
        return self._checked(number, self._in_process(number, asked, group), group)

    def _by_model(self, number: int, group: Group) -> list[float]:
        from dude_peft.rewards.reward_model import UnscoredError

        assert group.asked is not None, "who has reward models brings the row"
        try:
            return self._models[number].scores(group.asked, group.completions)
        except UnscoredError as error:
            raise self._fault(number, error.what, group, error.todo) from None

    def _in_process(self, number: int, asked: dict[str, Any], group: Group) -> list[Any]:
        assert self._child is not None
        try:
            found = self._ask({"reward": self._numbers.index(number), "of": asked}, self._timeout)
        except queue.Empty:
            self.close()
            todo = "raise train.grpo.reward_timeout to resume, or correct it and start over (--overwrite)"
            raise self._fault(number, f"took longer than {self._timeout:g} s", group, todo) from None
        except OSError as error:
            ending = self._child.ending()
            todo = "correct it, or if it ran out of memory raise train.grpo.reward_memory_gib, and start over"
            todo = f"{todo} (--overwrite)" if ending.startswith("signal") or ending == "status 1" else _CORRECT
            raise self._fault(number, f"ended its process with {ending}", group, todo) from error
        if "memory" in found:
            self.close()
            todo = "raise train.grpo.reward_memory_gib to resume, or correct it and start over (--overwrite)"
            what = f"needs more than {self._gib:g} GiB of memory ({shown(found['fault'], 200)})"
            raise self._fault(number, what, group, todo)
        if "fault" in found:
            raise self._fault(number, f"failed: {shown(found['fault'], 400)}", group)
        return list(found["scores"])

    def _checked(self, number: int, values: list[Any], group: Group) -> list[float]:
        count = len(group.completions)
        if len(values) != count:
            raise self._fault(number, f"gave {len(values)} numbers for {count} answers", group)
        for value, completion in zip(values, group.completions, strict=True):
            if value is None or not math.isfinite(value) or abs(value) > _LARGEST:
                given = "nothing" if value is None else f"{value:g}"
                raise self._fault(number, f"gave {given} for the answer {shown(repr(completion), 80)}", group)
        return [float(value) for value in values]

    def _fault(self, number: int, what: str, group: Group, todo: str = _CORRECT) -> DataError:
        return DataError(
            f"{group.place}: the reward {self.names[number]} {what}, on the prompt {shown(repr(group.prompt), 120)}; "
            f"{todo}"
        )

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._child is not None
        self._child.write(json.dumps(request).encode("ascii") + b"\n")
        return dict(json.loads(self._child.line(seconds)))
