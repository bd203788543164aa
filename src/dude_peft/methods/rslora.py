"""Rank-stabilised LoRA: LoRA with s = alpha / sqrt(r)."""

from dude_peft.methods.method import Method
from dude_peft.methods.splits import zero_split

RSLORA = Method(
    "rslora",
    zero_split,
    frozen_start=False,
    magnitude="none",
    learning_rate=5e-4,
    rank_stabilized=True,
    summary="LoRA with the scaling lora_alpha / sqrt(r), for large ranks",
    choose="large ranks",
    paper="arXiv 2312.03732",
    certainty="public code",
)
