"""The table of methods. Adding one: a file beside these, and a line here."""

# ruff: noqa: F401
from dude_peft.methods.delta import Delta, DeltaStart
from dude_peft.methods.method import Method
from dude_peft.methods.splits import Split, SplitOptions

# The rows, in the order in which they are shown.
# isort: off
from dude_peft.methods.dude import DUDE
from dude_peft.methods.dora import DORA
from dude_peft.methods.pissa import PISSA
from dude_peft.methods.lora import LORA
from dude_peft.methods.rslora import RSLORA
from dude_peft.methods.olora import OLORA
from dude_peft.methods.milora import MILORA
from dude_peft.methods.lora_xs import LORA_XS
from dude_peft.methods.edora import EDORA
from dude_peft.methods.vera import VERA
from dude_peft.methods.osora import OSORA
from dude_peft.methods.salt import SALT
from dude_peft.methods.spectral import SPECTRAL
from dude_peft.methods.random_basis import RANDOM_BASIS
from dude_peft.methods.frozen_m import FROZEN_M
from dude_peft.methods.dude_exact import DUDE_EXACT
from dude_peft.methods.dora_exact import DORA_EXACT
from dude_peft.methods.full import FULL
# isort: on

_ROWS = [row for row in tuple(globals().values()) if isinstance(row, Method)]
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
if len(METHODS) < len(_ROWS):
    raise TypeError(f"two methods have one name: {', '.join(row.name for row in _ROWS)}; give each its own")

__all__ = ["METHODS", "Delta", "DeltaStart", "Method", "Split", "SplitOptions"]
