"""`train.use_liger_kernel`: Liger's Triton kernels in a run's model, before anything is measured of it.

Trainer would put them in as training begins. Here the base model has them from its first forward on. So the scores
before and after training, and the check that a fresh adapter changes nothing, are of one model with the same kernels.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from dude_peft.answer.fingerprint import KERNELS
from dude_peft.config.schema import LigerKernel, TrainSection
from dude_peft.data.trial import text_ids, trial_length, trial_rows
from dude_peft.errors import ConfigError
from dude_peft.installing import install
from dude_peft.model.probe import Nature
from dude_peft.show import reason_of, shown

_KEY = "train.use_liger_kernel"
_FUSED = "fused_linear_cross_entropy"
_WITHOUT = f"set train.liger_kernel_config: {{{_FUSED}: false}}"
_FAR = 0.05
"""Of the loss, and of its gradient; in bfloat16 roundings make up to a hundredth."""


def check_liger(section: TrainSection, settings: Any, device: Any) -> None:
    """Looks whether the kernels are there, for this model and device, before weights are read.

    Args:
        section: of the run.
        settings: the model's configuration.
        device: that trains.

    Raises:
        ConfigError: they are not.
    """
    if not section.use_liger_kernel:
        return
    if find_spec("liger_kernel") is None:
        raise ConfigError(f"{_KEY}: liger-kernel is not installed: {install('liger-kernel')}")
    if torch.device(device).type not in ("cuda", "xpu") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"{_KEY} needs a GPU that Triton knows, and this run is on {device}; leave it out")
    if settings.get_text_config() is not settings:
        raise ConfigError(f"{_KEY}: a vision-language model was not tried with it; leave it out")
    if settings.model_type not in _families():
        raise ConfigError(f"{_KEY}: Liger has no kernels for models of type {shown(settings.model_type)}; leave it out")


def apply_liger_(model: Any, section: TrainSection) -> str:
    """Puts the kernels into a freshly loaded model.

    Args:
        model: without an adapter.
        section: of the run.

    Returns:
        Liger's version, and the names of the kernels in its words. The model keeps it, for whatever is kept of it.

    Raises:
        ConfigError: one that was asked for does not exist for this model.
    """
    from transformers.integrations.liger import apply_liger_kernel

    kind = model.config.model_type
    there = [name for name in inspect.signature(_families()[kind]).parameters if name != "model"]
    asked: Mapping[Any, bool] = section.liger_kernel_config or {}
    if unknown := next((name for name in asked if name not in there), None):
        known = ", ".join(name for name in there if name in get_args(LigerKernel))
        raise ConfigError(f"train.liger_kernel_config: Liger has no {unknown} for {shown(kind)}; it has {known}")
    wanted = {name: name in get_args(LigerKernel) and asked.get(name, True) for name in there}
    wanted |= {_FUSED: section.chunks_loss} if _FUSED in there else {}
    if section.chunks_loss and _FUSED not in there:
        raise ConfigError(f"{_KEY}: Liger has no fused loss for {shown(kind)}; {_WITHOUT}")
    apply_liger_kernel(model, wanted)  # type: ignore[no-untyped-call]
    told = f"Liger {version('liger-kernel')}: {', '.join(name for name, taken in wanted.items() if taken) or 'none'}"
    setattr(model, KERNELS, told)
    return told


def check_loss(model: Any, nature: Nature) -> None:
    """Tries the fused loss on short rows, beside the cross-entropy of the logits.

    Raises:
        ConfigError: it is another loss, has another gradient, or does not run here.
    """
    if not nature.own_loss:
        raise ConfigError(f"{_KEY}: a run takes the loss of {nature.name} from its logits; {_WITHOUT}")
    ids = torch.tensor(trial_rows(text_ids(model), 2, trial_length(model)), device=model.device)
    found = []
    try:
        for fused in (False, True):
            rows = model.get_input_embeddings()(ids).detach().requires_grad_()
            with torch.enable_grad():
                if fused:
                    loss = model(inputs_embeds=rows, labels=ids, use_cache=False, skip_logits=True).loss
                else:
                    logits = model(inputs_embeds=rows, use_cache=False).logits
                    loss = ForCausalLMLoss(logits, ids, logits.shape[-1])
                loss.backward()
            assert rows.grad is not None
            found.append((loss.detach().float(), rows.grad.float()))
        if all(_near(*pair) for pair in zip(*found, strict=True)):
            return
        fault = "its fused loss is not the cross-entropy of the logits"
    except Exception as error:  # whatever its kernels raise
        fault = reason_of(error, 160)
    finally:
        model.zero_grad()
    raise ConfigError(f"{_KEY} does not work on this model and device ({fault}); {_WITHOUT}, or leave it out")


def check_head(model: Any, section: TrainSection) -> None:
    """Looks at the head of an adapted model, with or without weights: the fused loss reads its weight alone.

    Raises:
        ConfigError: it is adapted, trained, quantised, or has a bias.
    """
    if not section.chunks_loss:
        return
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        raise ConfigError(
            f"{_KEY}: Liger's fused loss reads the plain weight of the head and would pass over all else; leave the "
            f"head out of the adapter, or {_WITHOUT}"
        )


@contextmanager
def restored() -> Iterator[None]:
    """At its end transformers' modules are as before: Liger replaces functions and classes there for the process."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith("transformers.models.")}
    before = [(module, dict(vars(module))) for name, module in modules.items() if ".modeling_" in name]
    classes = [
        (each, vars(each)["forward"])
        for module, names in before
        for each in names.values()
        if isinstance(each, type) and each.__module__ == module.__name__ and "forward" in vars(each)
    ]
    try:
        yield
    finally:
        for module, names in before:
            vars(module).update(names)
        for each, forward in classes:
            if vars(each)["forward"] is not forward:
                each.forward = forward  # type: ignore[attr-defined]


def _near(wanted: Tensor, found: Tensor) -> bool:
    return bool((wanted - found).norm() <= _FAR * wanted.norm())  # not of NaN


def _families() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    found: dict[str, Callable[..., None]] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return found
