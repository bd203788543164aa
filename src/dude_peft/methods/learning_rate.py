"""A learning rate that belongs to another method is the most common reason why a method looks bad."""

from __future__ import annotations

from dude_peft.methods.method import Method

_FAR = 5.0


def learning_rate_warning(method: Method, learning_rate: float) -> str | None:
    """One line where the rate is more than five times the method's own; None where it is not.

    Args:
        method: entry of the table.
        learning_rate: peak of the run.

    Source: arXiv 2602.04998, Qwen3-0.6B, r = 128, mean of GSM8K and MATH, three seeds: at 2e-4 LoRA reaches 49.6 and
    PiSSA 43.8; at 2e-5 LoRA 48.4 and PiSSA 49.4.
    """
    if learning_rate <= _FAR * method.learning_rate:
        return None
    times = learning_rate / method.learning_rate
    suits = f"{method.rate_of}, the relative of {method.name}" if method.rate_of else method.name
    return (
        f"train.learning_rate {learning_rate:g} is {times:.0f} times the {method.learning_rate:g} that suits {suits}. "
        "Leave it out for the method's default."
    )
