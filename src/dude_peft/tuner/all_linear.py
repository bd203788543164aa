"""What target_modules="all-linear" means: every linear layer of the language model that an adapter can do good on.

PEFT's own meaning has every linear layer but the output's. We leave out what a user has to ask for by name: encoders of
images and sound beside a language model, what projects their output into it, gates and routers (their choice of an
expert jumps, and one output has no principal directions to train), and layers smaller than the rank. What is left out
is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dude_peft.show import shown
from dude_peft.tuner import frozen
from dude_peft.tuner.config import DudeConfig

# A name, or the end of one: `gate`, `router.layer`, `shared_expert_gate`; no `gate_proj`.
_GATE = re.compile(r"(^|[._])(gate|router)(\.|$)")
_KNOWN = (nn.Linear, Conv1D, BaseTunerLayer)
"""What PEFT's all-linear finds."""
_UNFIT, _STACKED, _FUSED = "cannot be adapted", "stacked tensors", "part of an attention"
_SEES, _CHOOSES = "not used by text", "gate or router"
_SMALL = "smaller than r="


def choose(model: nn.Module, layers: Iterable[tuple[str, nn.Module]], config: DudeConfig) -> tuple[set[str], str]:
    """The names of the layers that all-linear adapts, and one line on the others.

    Args:
        model: the base model.
        layers: names and frozen layers that PEFT finds, without those that the configuration excludes.
        config: its ranks are looked at.

    Returns:
        Names; and what was left out and why, empty where nothing was.
    """
    towers = dict.fromkeys([*_towers(model), *_projectors(model)])
    kept, small = set(), set()
    left: dict[tuple[str, str], int] = {}
    for name, part in model.named_modules():
        stacks = [f"{name}.{last}" for last, p in part.named_parameters(recurse=False) if p.ndim == 3]
        if name.rpartition(".")[2] == "experts" and any(not _is_named(stack, config) for stack in stacks):
            left["experts", _STACKED] = left.get(("experts", _STACKED), 0) + 1
    for name, layer in layers:
        last, tower = name.rpartition(".")[2], next((t for t in towers if name.startswith(f"{t}.")), None)
        rank, _ = config.rank_and_alpha(name)
        if tower is not None:
            group = (tower, _SEES)
        elif isinstance(layer, NonDynamicallyQuantizableLinear):
            group = (last, _FUSED)
        elif not frozen.is_supported(layer):
            group = (last, _UNFIT)
        elif _is_gate(name, layer):
            group = (last, _CHOOSES)
        elif rank > min(frozen.layer_shape(layer)):
            group = (last, f"{_SMALL}{rank}")
            small.add(name)
        else:
            kept.add(name)
            continue
        left[group] = left.get(group, 0) + 1
    if not kept:  # the check of ranks behind us says why
        return small, ""
    return kept, _line(left)


def packed_layers(model: nn.Module) -> list[str]:
    """Names of a quantised model's linear layers that are none of torch's, as GPTQ's: PEFT's all-linear has torch's."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is None:
        return []
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        name
        for name, module in model.named_modules()
        if module is not output
        and not isinstance(module, _KNOWN)
        and not frozen.is_map(module)
        and frozen.is_supported(module)
    ]


def _towers(model: nn.Module) -> Sequence[str]:
    """Names of the encoders of images or sound inside a language model."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        return []
    return [
        name
        for name, part in model.named_modules()
        # Whisper's encoder is configured as the whole is: it is half of the model, not a tower beside it.
        if isinstance(part, PreTrainedModel)
        and "text" not in part.input_modalities
        and type(part.config) is not type(model.config)
    ]


def _projectors(model: nn.Module) -> Sequence[str]:
    """Names of what stands beside the decoder of a model with towers: what text never passes through."""
    if not _towers(model) or not isinstance(model, PreTrainedModel):
        return []
    names = {id(part): name for name, part in model.named_modules()}
    decoder = names.get(id(model.get_decoder()), "")
    whole, _, own = decoder.rpartition(".")
    output = model.get_output_embeddings()
    beside = [] if not decoder else [(name, part) for name, part in model.get_submodule(whole).named_children()]
    return [f"{whole}.{name}".lstrip(".") for name, part in beside if name != own and part is not output]


def _is_gate(name: str, layer: nn.Module) -> bool:
    out, in_ = frozen.layer_shape(layer)
    return out < in_ and (_GATE.search(name) is not None or "Router" in type(layer).__name__)


def _is_named(stack: str, config: DudeConfig) -> bool:
    return any(stack == name or stack.endswith(f".{name}") for name in config.target_parameters or ())


def _line(left: dict[tuple[str, str], int]) -> str:
    if not left:
        return ""
    parts = [f"{shown(name)} ({count} layer{'s' * (count > 1)}, {why})" for (name, why), count in left.items()]
    reasons = {why for _, why in left}
    ways = []
    if reasons & {_SEES, _CHOOSES}:
        ways.append("list a layer in target_modules to adapt it")
    if _FUSED in reasons:
        ways.append("list the nn.MultiheadAttention itself in target_modules to adapt it")
    if _STACKED in reasons:
        ways.append("name stacked tensors in target_parameters to adapt them")
    if any(why.startswith(_SMALL) for why in reasons):
        ways.append("give a small layer a smaller r with rank_pattern")
    return "; ".join([f"target_modules='all-linear' leaves out {', '.join(parts)}", *ways])
