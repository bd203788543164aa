"""Settings of an adapter that its method does not look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dude_peft.methods.method import Method


def idle_settings(method: Method, asked: Mapping[str, Any]) -> list[str]:
    """Of the settings that a user has changed those without effect, each in a line that says why.

    A comparison gives all methods the same settings, so that none of them can be an error.

    Args:
        method: entry of the table.
        asked: name of a setting, as `DudeConfig` has it -> value, for all that are not at their default.
    """
    reasons = {
        **dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern"), None if method.ranked else "has no rank"),
        "svd_tol": None if method.start == "truncated SVD" else "starts without a truncated SVD",
        "norm_gradient": None if method.normalised else "normalises no rows",
    }
    idle = [(name, why) for name, why in reasons.items() if why is not None and name in asked]
    return [f"adapter.{name} has no effect: method {method.name!r} {why}" for name, why in idle]
