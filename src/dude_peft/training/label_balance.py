"""Whether labelled answers can teach KTO something: both labels, in a proportion that its paper recommends."""

from __future__ import annotations

from dude_peft.config.schema import STRONGEST, KtoSection
from dude_peft.data.token_set import TokenSet
from dude_peft.errors import DataError

_MOST = 4 / 3
_NEAR = 0.05  # a proportion of 0.96 is no reason to warn


def told_of_labels(examples: TokenSet, settings: KtoSection) -> list[str]:
    """One line for what is odd about the labels: one of them alone, a proportion outside 1:1 to 4:3, contradictions.

    The proportion is that of equation 8 of KTO (arXiv 2402.01306): weight times number of wanted answers, over the same
    of unwanted ones.
    """
    wanted = int(examples.labels.sum())
    unwanted = len(examples) - wanted
    lines = _one_label(examples, "what to avoid or prefer cannot be learned")
    if not lines:
        share = settings.desirable_weight * wanted / (settings.undesirable_weight * unwanted)
        if not 1 - _NEAR <= share <= _MOST + _NEAR:
            lines.append(
                f"{wanted} wanted and {unwanted} unwanted answers weigh {share:.2f} to 1; 1 to 1.33 is advised: "
                f"{_remedy(wanted, unwanted, share, settings)}"
            )
    if found := examples.contradictions:
        lines.append(f"{found} answers to the same question are labelled both true and false; keep one label")
    return lines


def _remedy(wanted: int, unwanted: int, share: float, settings: KtoSection) -> str:
    """The weight that makes up for a label that weighs too little, the other weight as it is."""
    if share < 1:
        name, weight = "desirable_weight", settings.undesirable_weight * unwanted / wanted
    else:
        name, weight = "undesirable_weight", settings.desirable_weight * wanted / unwanted
    if weight > STRONGEST:
        return "no weight makes up for that; add answers with the rarer label"
    return f"set train.kto.{name}: {weight:.3g}"


def told_of_held_out(examples: TokenSet) -> list[str]:
    """One line where held-out answers have one label alone."""
    return _one_label(examples, "the scores do not show whether the two are told apart")


def _one_label(examples: TokenSet, why: str) -> list[str]:
    found = set(examples.labels.tolist())
    if len(found) == 2:
        return []
    label, other = ("true", "unwanted") if True in found else ("false", "wanted")
    return [f"all {len(examples)} labels are {label}: {why}; add {other} answers"]


def check_enough(examples: TokenSet, key: str, settings: KtoSection) -> None:
    """Raises DataError, beginning with `key`, where there is no second answer to estimate KL from."""
    if settings.loss_type == "kto" and len(examples) < 2:
        raise DataError(
            f"{key}: one labelled answer leaves no other to estimate KL from; give 2 or more, or set "
            "train.kto.loss_type: apo_zero_unpaired"
        )


def check_margin(examples: TokenSet, metric: str) -> None:
    """Raises DataError where `metric` needs held-out answers of both labels, and there are none."""
    if metric == "rewards/margins" and len(set(examples.labels.tolist())) < 2:
        raise DataError(
            "data.test: evaluation.metric_for_best_model: rewards/margins needs held-out answers of both labels; add "
            "some, or use loss"
        )
