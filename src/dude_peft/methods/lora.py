"""LoRA: a random A, B at zero, no magnitude."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import zero_split

LORA = Method(
    "lora",
    zero_split,
    frozen_start=False,
    magnitude="none",
    learning_rate=1e-3,
    summary="A random, B zero, no magnitude",
    choose="the fastest step, and every program serves it",
    paper="arXiv 2106.09685",
    certainty="public code",
)
