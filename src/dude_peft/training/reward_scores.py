"""What the likeliest answers to held-out prompts are rewarded with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dude_peft.config.schema import GrpoSection
from dude_peft.data.formats import Row
from dude_peft.rewards.judge import Group, Judge


def mean_rewards(
    judge: Judge,
    settings: GrpoSection,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
    tokenizer: Any,
) -> dict[str, float]:
    """`reward`, the mean of the weighted sums, and of each reward `rewards/NAME/mean`; 0 rows have no mean.

    Args:
        judge: who rewards.
        settings: of the objective.
        rows: that were asked.
        prompts: token ids of what they ask.
        texts: the answers.
        tokenizer: counts their tokens.

    Raises:
        DataError: a reward fails.
    """
    scores = []
    for row, asked, text in zip(rows, prompts, texts, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        question = str(tokenizer.decode(asked, skip_special_tokens=True))
        scores += judge.score(Group(row.source, question, [text], [ids], row.answer.strip(), row))
    if not scores:
        return {}
    means = [sum(column) / len(scores) for column in zip(*scores, strict=True)]
    total = sum(mean * reward.weight for mean, reward in zip(means, settings.rewards, strict=True))
    each = {f"rewards/{reward.title}/mean": mean for mean, reward in zip(means, settings.rewards, strict=True)}
    return {"reward": total, **each}
