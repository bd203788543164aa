"""Which parameters `target_parameters` means, and what is checked of them before anything is adapted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from dude_peft.core.magnitude import row_norm
from dude_peft.errors import ConfigError
from dude_peft.methods.start import check_finite
from dude_peft.show import quoted
from dude_peft.tuner.config import DudeConfig, closest
from dude_peft.tuner.experts import innermost
from dude_peft.tuner.layer import DudeLinear, check_rank
from dude_peft.tuner.stacks import Stack, stack_in, why_no_stack


def stacks_of(model: nn.Module, wanted: Iterable[str]) -> dict[str, Stack]:
    """The stacks that these names mean, whole names or endings, by their whole names, in the model's order.

    Raises:
        ConfigError: one means no parameter, or one that is no stack of experts.
    """
    wanted, found, names = list(wanted), {}, []
    if not wanted:
        return {}
    met: set[str] = set()
    for place, module in _modules(model):
        inner = innermost(module)
        for last, _ in inner.named_parameters(recurse=False):
            name = f"{place}.{last}" if place else last
            names.append(name)
            hits = {target for target in wanted if name == target or name.endswith(f".{target}")}
            met |= hits
            if not hits:
                continue
            if not place:
                raise ConfigError(f"target_parameters: {quoted(name)} is the model's own, which cannot be adapted")
            if reason := why_no_stack(inner, last):
                raise ConfigError(f"target_parameters: {quoted(name, 200)} {reason}")
            found[name] = stack_in(inner, last)
    if absent := next((target for target in wanted if target not in met), None):
        known = sorted({".".join(name.split(".")[-2:]) for name in names})
        raise ConfigError(
            f"target_parameters: {quoted(absent)} is not a parameter of {type(model).__name__}; "
            f"{closest(absent, known)}"
        )
    return found


def check_stacks(stacks: Mapping[str, Stack], config: DudeConfig, whole: Collection[str]) -> None:
    """Refuse ranks that a stack cannot have, weights that are not finite, and modules that are trained whole.

    Args:
        stacks: from `stacks_of`.
        config: of the adapter.
        whole: names of the modules that are trained whole.

    Raises:
        ConfigError: a rank, or both.
        NumericsError: NaN or Inf.
    """
    for name, stack in stacks.items():
        if name.rpartition(".")[0] in whole:
            raise ConfigError(
                f"{quoted(name, 200)} is in target_parameters, and its module, by its ending, in "
                f"modules_to_save={config.modules_to_save}; leave it out of one, or write longer names"
            )
        check_rank(config.spec, name, stack.shape, config.rank_and_alpha(name)[0])
        if stack.weight.device.type != "meta" and not bool(row_norm(stack.plain_weight).isfinite().all()):
            for expert, matrix in enumerate(stack.plain_weight):
                check_finite(f"{name}[{expert}]", matrix)


@contextmanager
def patterns_of_stacks(config: DudeConfig, stacks: Collection[str]) -> Iterator[None]:
    """Within: PEFT does not say of a pattern for stacks that it matches nothing, since it looks at modules alone."""
    patterns = [key for name in ("rank_pattern", "alpha_pattern") for key in getattr(config, name)]
    used = [key for key in patterns if any(re.match(rf"(.*\.)?({key})$", name) for name in stacks)]
    if not used:
        yield
        return
    with warnings.catch_warnings():
        listed = "|".join(re.escape(f"'{key}'") for key in used)
        told = rf"The following \w+_pattern keys did not match.*\[({listed})(, ({listed}))*\]"
        warnings.filterwarnings("ignore", told)
        yield


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules, adapted ones as a whole."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, DudeLinear):
            inside += (f"{name}.",)
        yield name, module
