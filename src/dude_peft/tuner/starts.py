"""The starts of all target layers, several layers at a time.

A top-r SVD is a chain of small steps, in which threads mostly wait for each other; layers are independent. So every
SVD runs on one thread and as many layers at a time as torch has threads (on a GPU one at a time, and devices side by
side). The bits are those of one layer after the other, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import logging

from dude_peft.core.magnitude import row_norm
from dude_peft.core.svd import full_precision_products
from dude_peft.core.threads import one_thread, single_threaded_pool
from dude_peft.errors import ConfigError
from dude_peft.methods.start import Start, start_of
from dude_peft.tuner import frozen
from dude_peft.tuner.config import DudeConfig
from dude_peft.tuner.stacks import Stack

# Every thread holds a float32 copy of its weight: more of them would cost a model's worth of memory.
_MOST_THREADS = 16
_BAR_AFTER_SECONDS = 3.0

OtherWeight = Callable[[str, Tensor], Tensor]
"""(A layer's name, the weight (out, in) that it applies) -> the weight that its factors are taken from."""
_others: list[OtherWeight] = []


@contextmanager
def started_from(other: OtherWeight) -> Iterator[None]:
    """Within: factors of new adapters are those of other weights; their row norms stay those of the layers' own."""
    _others.append(other)
    try:
        yield
    finally:
        _others.pop()


def compute_starts(
    targets: Sequence[tuple[str, nn.Module | Stack]], config: DudeConfig
) -> dict[str, tuple[Start, ...]]:
    """Start of every target layer, by its name; a stack has one an expert.

    Methods that draw from torch's global generator are left out, and so are layers whose weight is only to be had
    through their forward: they are computed in order, when the layer is made.

    Args:
        targets: name and layer, adapted by other adapters already or not; or a stack.
        config: the new adapter's configuration.

    Raises:
        NumericsError: NaN or Inf in a weight.
    """
    if config.spec.draws:
        return {}
    by_device: dict[torch.device, list[tuple[str, Any]]] = {}
    for name, module in targets:
        weight = frozen.plain_weight(_target(module))
        if weight is not None and weight.device.type != "meta":
            by_device.setdefault(weight.device, []).append((name, module))
    with ExitStack() as stack:
        jobs: dict[Future[tuple[Start, ...]], str] = {}
        for device, layers in by_device.items():
            stack.enter_context(full_precision_products(device))
            most = _MOST_THREADS if device.type == "cpu" else 1
            pool = stack.enter_context(single_threaded_pool(len(layers), most))
            jobs |= {pool.submit(start_of_layer, module, name, config): name for name, module in layers}
        return {jobs[job]: job.result() for job in _with_bar(jobs)}


def start_of_layer(module: Any, name: str, config: DudeConfig) -> tuple[Start, ...]:
    """Start of one layer, adapted already or not; of a stack, that of every expert.

    Raises:
        NumericsError: NaN or Inf in the base weight.
    """
    r, alpha = config.rank_and_alpha(name)
    options = config.split_options
    adapted = isinstance(module, BaseTunerLayer)
    with module.unmerged() if adapted else nullcontext(), torch.no_grad():
        base = _target(module)
        weight = frozen.plain_weight(base)
        if weight is not None and weight.is_meta:
            raise ConfigError(
                f"the weight of '{name}' is not in memory (meta device), but the start is computed from "
                "it; load the model with its weights, or write the start with `dude init`"
            )
        scaling = config.spec.scaling(r, alpha)
        with one_thread():
            if isinstance(base, Stack) and len(base.shape) > 2:
                # A copy of one expert at a time, which the start may overwrite.
                wide = torch.promote_types(base.weight.dtype, torch.float32)
                own = replace(options, overwrite=True)
                copies = (expert.to(wide, copy=True).contiguous() for expert in base.plain_weight)
                return tuple(start_of(config.spec, W0, r, scaling, own, f"{name}[{e}]") for e, W0 in enumerate(copies))
            W0 = frozen.dense_weight(base)
            if weight is None or weight.dtype != W0.dtype:  # a copy already
                options = replace(options, overwrite=True)
            if not _others or frozen.is_map(base) or isinstance(base, Stack):  # those are never quantised
                return (start_of(config.spec, W0, r, scaling, options, name),)
            full = _others[-1](name, W0)
            begun = start_of(config.spec, full, r, scaling, replace(options, overwrite=True), name)
            return (begun._replace(m0=row_norm(W0)),)


def _target(module: Any) -> Any:
    """What an adapter changes, of a layer that is adapted already or not."""
    adapted = isinstance(module, BaseTunerLayer)
    return module.target() if adapted else module


def _with_bar(jobs: dict[Future[tuple[Start, ...]], str]) -> Iterator[Future[tuple[Start, ...]]]:
    """The jobs as they are done; the bar is transformers' own (and obeys its switch), and shows up at a terminal."""
    with logging.tqdm(
        total=len(jobs), desc="Initialising", unit="layer", delay=_BAR_AFTER_SECONDS, disable=None
    ) as bar:
        for job in as_completed(jobs):
            yield job
            bar.update(1)
