"""Rewards that need no code of yours: the right final answer, a format, a length."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dude_peft.data.answers import same_answer

Reward = Callable[..., Sequence[Any]]
"""Lists `prompts`, `completions`, `completion_ids` and `answer`, one entry an answer -> a number each."""


def builtin(settings: Mapping[str, Any], longest: int) -> Reward:
    """The reward of a section (`config.schema.RewardSection`, as JSON) that is no function.

    Args:
        settings: the section.
        longest: max_completion_length.
    """
    if settings["kind"] == "format":
        return _format(settings["pattern"])
    if settings["kind"] == "length":
        return _length(longest, settings["soft_punish_cache"])
    return _math if settings["kind"] == "math" else _answer


def _answer(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 where the final answer is the row's."""
    return [float(same_answer(given, wanted)) for given, wanted in zip(completions, answer, strict=True)]


def _math(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """The same by math-verify, of what follows `####` on both sides, if that is there."""
    from math_verify import parse, verify

    def final(text: str) -> str:
        return text.rpartition("####")[2]  # all of it where there is none

    return [float(verify(parse(final(w)), parse(final(g)))) for g, w in zip(completions, answer, strict=True)]


def _format(pattern: str) -> Reward:
    """1 where the whole answer, without space around it, matches."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda completions: [float(compiled.fullmatch(text.strip()) is not None) for text in completions]


def _length(longest: int, cache: int) -> Reward:
    """0 up to longest - cache tokens, then down to -1 at longest: DAPO, arXiv 2503.14476, equation 13."""

    def reward(completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return [max(-1.0, min(0.0, (longest - cache - len(ids)) / cache)) for ids in completion_ids]

    return reward
