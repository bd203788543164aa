"""What a run says of code of the user's that rewards answers."""

from __future__ import annotations

from dude_peft.config.schema import TrainSection
from dude_peft.rewards.memory import IS_LIMITED
from dude_peft.show import shown


def reward_notes(train: TrainSection) -> list[str]:
    """A line for each Python function that a run will call; `train` is resolved."""
    rewards = [] if train.rewarded is None else train.rewarded.rewards
    unlimited = "" if IS_LIMITED else "; this system does not limit its memory"
    return [
        f"train.grpo.trust_reward_files: {each.function} of {shown(each.file, 300)} runs with your permissions "
        f"(sha256 {(each.sha256 or '')[:12]}){unlimited}"
        for each in rewards
        if each.file is not None
    ]
