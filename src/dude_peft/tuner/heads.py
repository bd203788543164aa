"""The head of a task: what stands behind the pretrained model, trained whole and saved with the adapter.

PEFT knows a head by its usual name. What else stands behind the pretrained model (DeBERTa's `pooler`, T5's
`classification_head`), and what transformers found in no checkpoint, would stay as it was drawn, and be drawn anew in
every other process: the adapter would be lost. So it belongs to the head too.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel

from dude_peft.errors import ConfigError
from dude_peft.tuner.config import DudeConfig

# What PEFT adds to modules_to_save, whether the model has it or not.
_USUAL = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def usual_heads(config: DudeConfig) -> tuple[str, ...]:
    """Names that PEFT itself enters into modules_to_save for the task; a model has one of them, or none."""
    return _USUAL.get(_task(config), ())


def _task(config: DudeConfig) -> str:
    return str(getattr(config.task_type, "value", config.task_type))


def enter_head(model: nn.Module, config: DudeConfig) -> None:
    """Add the head of the configuration's task to its modules_to_save.

    Raises:
        ConfigError: the model has no head that could be told, and none is named.
    """
    usual = usual_heads(config)
    if not usual:
        return
    found = [*behind_backbone(model), *newly_initialised(model)]
    names = [name for name, _ in model.named_modules()]
    own = [name for name in config.modules_to_save or () if name not in usual]
    if not found and not own and not any(_belongs(name, usual) for name in names):
        raise ConfigError(
            f"task_type {_task(config)}: {type(model).__name__} has no {' or '.join(map(repr, usual))}, which PEFT "
            "would train and save; give the name of its head, such as modules_to_save=['head']"
        )
    wanted = list(dict.fromkeys([*own, *usual]))
    for name in found:
        if not _belongs(name, wanted):
            wanted.append(name)
    config.modules_to_save = wanted


def newly_initialised(model: nn.Module) -> list[str]:
    """Modules whose parameters `from_pretrained` found in no checkpoint; none where it did not make the model."""
    drawn: list[str] = []
    loaded = new = 0
    embeddings = embedding_modules(model)  # made anew where they were resized
    for name, module in plain_modules(model):
        if module in embeddings:
            continue
        for parameter in module.parameters(recurse=False):
            if is_lazy(parameter):
                continue  # torch's lazy layers have no shape yet
            # transformers' own mark: its initialisation leaves alone what carries it.
            if getattr(parameter, "_is_hf_initialized", False):
                loaded += parameter.numel()
            else:
                new += parameter.numel()
                drawn.append(name)
    return list(dict.fromkeys(drawn)) if new < loaded else []


def warn_of_drawn(model: nn.Module, config: DudeConfig) -> None:
    """Say which modules were drawn by chance, and stay so: neither trained whole nor saved."""
    whole = trained_whole(model, config)
    if lost := [name for name in newly_initialised(model) if name not in whole]:
        warnings.warn(
            f"newly initialised, but neither trained in full nor saved: {', '.join(map(repr, lost))}; their values "
            "differ each time, so list them in modules_to_save if outputs depend on them, or set task_type",
            stacklevel=2,
        )


def trained_whole(model: nn.Module, config: DudeConfig) -> set[str]:
    """Names of the modules that PEFT trains whole, and of all inside them: it compares the endings of names."""
    wanted = tuple(config.modules_to_save or ())
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    whole = tuple(f"{name}." for name in names if wanted and name.endswith(wanted))
    return {name for name in names if f"{name}.".startswith(whole)}


def embedding_modules(model: nn.Module) -> list[nn.Module]:
    """Input and output embeddings of a transformers model; none of another one."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):  # a model without, or transformers' answer for one
            continue
    return [module for module in found if isinstance(module, nn.Module)]


def behind_backbone(model: nn.Module) -> list[str]:
    """Children that follow the pretrained model itself (transformers' `base_model`) and have parameters."""
    backbone: Any = model.base_model if isinstance(model, PreTrainedModel) else model
    children = list(model.named_children())
    places = [place for place, (_, child) in enumerate(children) if child is backbone]
    behind = children[places[0] + 1 :] if places else []
    return [name for name, child in behind if next(child.parameters(), None) is not None]


def plain_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that no adapter has wrapped."""
    if isinstance(model, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return
    yield prefix, model
    for name, child in model.named_children():
        yield from plain_modules(child, f"{prefix}.{name}" if prefix else name)


def _belongs(name: str, wanted: Iterable[str]) -> bool:
    """Whether a module is one of the wanted, or inside one, as PEFT tells when it looks for targets."""
    return any(re.match(rf"(^|.*\.){re.escape(each)}($|\..*)", name) for each in wanted)
