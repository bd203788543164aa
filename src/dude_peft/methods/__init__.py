"""The table of methods. Adding one: a file beside these, and a line here."""

from dude_peft.methods.dora import DORA
from dude_peft.methods.dude import DUDE
from dude_peft.methods.lora import LORA
from dude_peft.methods.method import Method, Split, SplitOptions
from dude_peft.methods.pissa import PISSA
from dude_peft.methods.rslora import RSLORA

METHODS: dict[str, Method] = {method.name: method for method in (DUDE, DORA, PISSA, LORA, RSLORA)}

__all__ = ["METHODS", "Method", "Split", "SplitOptions"]
