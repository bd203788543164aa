"""EDoRA: LoRA-XS with a trained magnitude."""

from dataclasses import replace

from dude_peft.methods.lora_xs import LORA_XS

# The authors start C near zero, so near W0; here it is zero, and the start is W0.
EDORA = replace(
    LORA_XS,
    name="edora",
    magnitude="trained",
    learning_rate=1e-3,
    summary="lora-xs with a trained magnitude",
    choose="few trained numbers, and a magnitude",
    paper="arXiv 2501.12067",
)
