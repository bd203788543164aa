"""What an adapter changes in a model, found by the names that its file has for it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dude_peft.artifact.form import OUT_PROJECTION
from dude_peft.tuner import frozen
from dude_peft.tuner.attention import projections_of
from dude_peft.tuner.experts import innermost, layers_in
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.stacks import stack_of


def targets_named(model: nn.Module, names: Iterable[str]) -> dict[str, frozen.Frozen]:
    """Layers, stacks of experts and projections of attentions, adapted or not, as far as the model has them."""
    modules, found = dict(model.named_modules()), dict[str, frozen.Frozen]()
    for name in names:
        attention = modules.get(name.removesuffix(OUT_PROJECTION))
        if attention is not None and isinstance(_base_module(attention), nn.MultiheadAttention):
            found[name] = projections_of(name.removesuffix(OUT_PROJECTION), attention)[name]
            continue
        module = modules.get(name)
        if module is None:
            place, _, last = name.rpartition(".")
            outer = modules.get(place)
            own = [] if outer is None else [one for one in layers_in(outer) if one.parameter_name == last]
            stack = own[0] if own else None if outer is None else stack_of(innermost(outer), last)
            if stack is not None:
                found[name] = stack
        elif frozen.is_supported(_base_module(module)):
            found[name] = module
    return found


def _base_module(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, DudeLinear) else module
