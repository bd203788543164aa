"""DuDe: principal factors and a trained magnitude."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import principal_split

DUDE = Method(
    "dude",
    principal_split,
    frozen_start=True,
    magnitude="trained",
    learning_rate=3e-4,
    summary="principal factors and a trained magnitude",
    choose="principal directions and a magnitude, from the base model bit by bit",
    start="truncated SVD",
    paper="arXiv 2505.14367",
)
