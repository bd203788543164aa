"""DoRA: LoRA's start and a trained magnitude."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import zero_split

DORA = Method(
    "dora",
    zero_split,
    principal=False,
    magnitude=True,
    learning_rate=2e-4,
    summary="LoRA's start and a trained magnitude",
    paper="arXiv 2402.09353",
)
