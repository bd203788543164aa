"""How the changes of several adapters become one: `tuner.combine`, by the name that merging has for it."""

from dude_peft.tuner.combine import KINDS, Combination

__all__ = ["KINDS", "Combination"]
