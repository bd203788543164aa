"""What the base model of a run makes of its held-out rows, measured once for all runs of the same model and rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from dude_peft.answer.cache import key_of, shared_cache
from dude_peft.folder.record import Score, score_from
from dude_peft.machine.environment import hardware
from dude_peft.training.context import RunContext
from dude_peft.training.loading import Base
from dude_peft.training.run_data import RunData

_JUDGING = ("test", "questions")
"""Sets that held-out scores are of."""


def known_or_measured(
    context: RunContext,
    base: Base,
    data: RunData,
    tokenizer_parts: Mapping[str, str],
    device: Any,
    measure: Callable[[], tuple[Score | None, float]],
) -> tuple[Score | None, float]:
    """The score of the base model, and how long measuring it took, now or when an earlier run here did it.

    Args:
        context: of the run.
        base: whose `parts` tell it from others.
        data: the rows of the run.
        tokenizer_parts: of what makes tokens of them.
        device: to compute on.
        measure: does it now.
    """
    assert base.parts is not None
    settings, train = context.config.evaluation, context.config.train
    how: list[Any] = [settings.batch_size, settings.max_new_tokens, base.nature.company, base.company, base.share]
    if train.autocasts:
        how.append("bf16" if train.bf16 else "fp16")
    hashes = (data.sha256, data.tokens_sha256)
    rows = [{name: part for name, part in each.items() if name in _JUDGING} for each in hashes]
    key = key_of(*base.parts, rows, tokenizer_parts, how, hardware(device))
    with shared_cache("base scores", key, context.display.say, context.stop.raise_if_wanted) as cache:
        if "score" not in cache:
            found, seconds = measure()
            cache.add({"score": None if found is None else asdict(found), "seconds": seconds})
            return found, seconds
        try:
            known = score_from(cache["score"]), float(cache["seconds"])
        except (TypeError, KeyError, ValueError) as error:
            raise cache.damaged() from error
        context.display.say("held-out rows, before: known from an earlier run of this base model")
        return known
