"""torch's nn.MultiheadAttention as a target: its input projection (3E, E) and its output projection (E, E).

The module multiplies by both itself and calls no layer, and torch's fused kernels read both from outside, so each is
adapted as a stack of experts is: the module computes with the effective matrix. As in PEFT, the module's name means
both, the three parts of the input projection share one pair of factors, and a file calls the two NAME and
NAME.base_layer.out_proj. A magnitude belongs to a row, so every row of q, k and v has its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dude_peft.artifact.form import OUT_PROJECTION
from dude_peft.parents import fits
from dude_peft.tuner.experts import DudeExperts
from dude_peft.tuner.frozen import Frozen, is_plain
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.stacks import stack_in

_IN, _WEIGHT = "in_proj_weight", "weight"


def why_no_attention(module: nn.MultiheadAttention) -> str | None:
    """Why it cannot be adapted, as the end of "target 'x' ..."; None where it can."""
    if not module._qkv_same_embed_dim:
        return "is a MultiheadAttention with kdim or vdim, which PEFT does not adapt either"
    out: Any = module.out_proj
    out = out.get_base_layer() if isinstance(out, DudeProjection) else out
    projections = [module.in_proj_weight, getattr(out, _WEIGHT, None)]
    plain = all(isinstance(each, Tensor) and is_plain(each) for each in projections)
    if not plain or not isinstance(out, nn.Linear):
        return "is a MultiheadAttention with a quantised or split weight, which is not supported"
    return None


def projections_of(name: str, module: nn.Module) -> dict[str, Frozen]:
    """Both projections of an attention, adapted or not, by the names of their layers.

    Args:
        name: of the attention in the model.
        module: itself, or the layer of ours in its place.
    """
    if isinstance(module, DudeAttention):
        return {name: module, name + OUT_PROJECTION: module.out_projection}
    return {name: stack_in(module, _IN), name + OUT_PROJECTION: stack_in(module.get_submodule("out_proj"), _WEIGHT)}


@fits()
class DudeProjection(DudeExperts):
    """A matrix that a module multiplies by itself, with any number of adapters."""

    def place(self, module_name: str) -> str:
        """As PEFT has it: the module's own name."""
        return module_name

    def orthogonality(self, adapter_name: str, groups: int) -> tuple[Tensor, Tensor]:
        """As of a linear layer."""
        return DudeLinear.orthogonality(self, adapter_name, groups)


@fits()
class DudeAttention(DudeProjection):
    """An nn.MultiheadAttention, and as a layer its input projection; that of the output lies inside it."""

    def __init__(self, base_layer: Any, layer_name: str) -> None:
        super().__init__(base_layer, layer_name, _IN)
        base_layer.out_proj = DudeProjection(base_layer.out_proj, layer_name + OUT_PROJECTION, _WEIGHT)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The attention without layers of ours; PEFT calls it once everything is merged or taken out."""
        base: nn.Module = self.get_base_layer()
        base.out_proj = self.out_projection.get_base_layer()
        return base

    @property
    def out_projection(self) -> DudeProjection:
        """The layer of the output projection."""
        found: Any = self.get_base_layer().out_proj
        return found
