"""DuDe with the exact gradient, a control: the row norm is no constant."""

from dataclasses import replace

from dude_peft.methods.dude import DUDE

DUDE_EXACT = replace(
    DUDE,
    name="dude-exact",
    norm_gradient="exact",
    summary="dude with the gradient through the row norm",
    choose="to see what the constant norm of dude costs",
    paper="arXiv 2505.14367",
    certainty="control",
)
