"""PiSSA: principal factors, no magnitude."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import principal_split

PISSA = Method(
    "pissa",
    principal_split,
    principal=True,
    magnitude=False,
    learning_rate=1e-4,
    summary="principal factors, no magnitude",
    paper="arXiv 2404.02948",
)
