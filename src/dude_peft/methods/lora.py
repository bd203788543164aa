"""LoRA: a random A, B at zero, no magnitude."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import zero_split

LORA = Method(
    "lora",
    zero_split,
    principal=False,
    magnitude=False,
    learning_rate=2e-4,
    summary="A random, B zero, no magnitude",
    paper="arXiv 2106.09685",
)
