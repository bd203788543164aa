"""Frozen magnitude, a control: DuDe whose rows keep the norms of W0's."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import principal_split

FROZEN_M = Method(
    "frozen-m",
    principal_split,
    frozen_start=True,
    magnitude="fixed",
    learning_rate=3e-4,
    summary="dude with the magnitude fixed at the row norms of W0",
    choose="to see whether it is the trained magnitude that helps",
    start="truncated SVD",
    paper="this project",
    certainty="control",
)
