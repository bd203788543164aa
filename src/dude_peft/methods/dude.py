"""DuDe: principal factors and a trained magnitude."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import principal_split

DUDE = Method(
    "dude",
    principal_split,
    principal=True,
    magnitude=True,
    learning_rate=1e-4,
    summary="principal factors and a trained magnitude",
    paper="arXiv 2505.14367",
)
