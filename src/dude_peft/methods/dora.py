"""DoRA: LoRA's start and a trained magnitude."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import zero_split

DORA = Method(
    "dora",
    zero_split,
    frozen_start=False,
    magnitude="trained",
    learning_rate=5e-4,
    summary="LoRA's start and a trained magnitude",
    choose="a magnitude without an SVD at the start",
    paper="arXiv 2402.09353",
    certainty="public code",
)
