"""DoRA with the exact gradient, a control: the row norm is no constant."""

from dataclasses import replace

from dude_peft.methods.dora import DORA

DORA_EXACT = replace(
    DORA,
    name="dora-exact",
    norm_gradient="exact",
    summary="dora with the gradient through the row norm",
    choose="to see what the constant norm of dora costs",
    paper="arXiv 2505.14367",
    certainty="control",
)
