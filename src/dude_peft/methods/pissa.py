"""PiSSA: principal factors, no magnitude."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import principal_split

PISSA = Method(
    "pissa",
    principal_split,
    frozen_start=True,
    magnitude="none",
    learning_rate=3e-4,
    summary="principal factors, no magnitude",
    choose="a principal start, where the adapter itself has to be served",
    start="truncated SVD",
    paper="arXiv 2404.02948",
    certainty="public code",
)
