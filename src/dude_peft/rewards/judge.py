"""Rewards of a run, asked for in a process of their own with limits on its time and memory.

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
from typing import Any

from dude_peft.config.schema import GrpoSection
from dude_peft.errors import ConfigError, DataError, ResourceError
from dude_peft.line_child import LineChild
from dude_peft.reward_file import source_of
from dude_peft.show import shown

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


class Judge:
    """Rewards answers; its process starts with it and ends with `close`."""

    def __init__(self, settings: GrpoSection) -> None:
        """Starts the process, in which the files of `settings`, resolved, run.

        Raises:
            ConfigError: math-verify is not installed, or a file raises or hangs while it is read.
            ResourceError: no process can be started.
        """
        self.names = [reward.title for reward in settings.rewards]
        self._timeout, self._gib = settings.reward_timeout, settings.reward_memory_gib
        rewards = []
        for each in settings.rewards:
            if each.kind == "math" and importlib.util.find_spec("math_verify") is None:
                raise ConfigError("train.grpo.rewards: math needs math-verify: pip install math-verify; or use answer")
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
            name, fault = self.names[found["reward"]], shown(found["fault"], 400)
            more = f"; it may take {self._gib:g} GiB, raise train.grpo.reward_memory_gib" if "memory" in found else ""
            raise ConfigError(f"train.grpo.rewards: {name}: {fault}{more}")
        self.beside: dict[str, str] = found["beside"]
        """sha256 of each file that the files of `settings` have imported from their own folders."""

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
        self._child.stop()

    def _scores(self, number: int, asked: dict[str, Any], group: Group) -> list[float]:
        count = len(group.completions)
        try:
            found = self._ask({"reward": number, "of": asked}, self._timeout)
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
            raise self._fault(number, f"raised {shown(found['fault'], 400)}", group)
        values = found["scores"]
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
        self._child.write(json.dumps(request).encode("ascii") + b"\n")
        return dict(json.loads(self._child.line(seconds)))
