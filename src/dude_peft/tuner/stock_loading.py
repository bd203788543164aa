"""Whether stock PEFT can load an adapter of ours on its base model; asked of PEFT itself, whose steps these are.

PEFT refuses some layers by name (`out_proj` of Mamba), and in families whose experts transformers stacks (DeepSeek-V3,
Qwen3-Next) it takes every `gate_proj`, `up_proj` and `down_proj` of a configuration for the experts'. Where a module
multiplies by a layer's weight instead of calling the layer (`dt_proj` of Jamba), PEFT leaves its change out, silently.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Collection
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from dude_peft.artifact.form import OUT_PROJECTION
from dude_peft.show import shown


def warn_if_refused(model: Any, stock: LoraConfig, layers: Collection[str]) -> None:
    """Say of an adapter that is about to be saved that stock PEFT will not load it."""
    if refusal := stock_refusal(model, stock, layers):
        warnings.warn(f"{refusal}; use dude_peft.load_adapter, or make a plain model with dude merge", stacklevel=3)


def stock_refusal(model: Any, stock: LoraConfig, layers: Collection[str]) -> str:
    """Why stock PEFT does not load the adapter; empty where it does.

    Args:
        model: the base model, adapted or not; the meta device does.
        stock: the configuration that stock PEFT reads.
        layers: names of the adapted layers.
    """
    layers = [name for name in layers if not name.endswith(OUT_PROJECTION)]  # whose attention has it along
    settings = getattr(model, "config", None)
    kind = getattr(settings, "model_type", None)
    if kind is None:  # PEFT looks no further either
        return _left_out(model, layers)
    read = copy.deepcopy(stock)
    try:
        convert_peft_config_for_transformers(read, model=model, conversions=None)
        for name in layers:
            _check_lora_target_modules_mamba(read, model, name.rpartition(".")[2])
    except ValueError as error:
        reason = str(error).partition(". ")[0].removeprefix("[PEFT:PeftType.LORA] ")
        return f"stock PEFT refuses this adapter on a {shown(kind)} model ({shown(reason, 200)})"
    lost = [name for name in layers if not check_target_module_exists(read, name)]
    if lost:
        return (
            f"stock PEFT does not load this adapter on a {shown(kind)} model: it mistakes {len(lost)} layers for "
            f"experts (first: '{shown(lost[0])}')"
        )
    return _left_out(model, layers)


def _left_out(model: Any, layers: Collection[str]) -> str:
    skipped = [name for name in layers if _multiplies_weight(model, name)]
    if not skipped:
        return ""
    count = f"{len(skipped)} such layer{'s' * (len(skipped) > 1)}"
    return (
        f"stock PEFT leaves out the change of '{shown(skipped[0])}' ({count}), because the model reads that weight "
        "directly"
    )


def _multiplies_weight(model: Any, layer: str) -> bool:
    """Whether the module that holds the layer multiplies by its weight in Python instead of calling it."""
    parent, _, name = layer.rpartition(".")
    kind: Any = type(model.get_submodule(parent))
    return f"self.{name}.weight @" in _source(kind)


@functools.cache  # Python parses a whole file for it, and every checkpoint asks
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # no source to be had
        return ""
