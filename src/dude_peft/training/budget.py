"""`adapter.budget`: parameters become ranks, layer by layer, before training begins.

What comes out is an adapter section without a budget: target_modules, r, rank_pattern and the alphas that keep the
scaling s as the section had it. Whoever trains with that section repeats the run without looking at a row.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dude_peft.config.schema import AdapterSection, BudgetSection
from dude_peft.errors import ConfigError
from dude_peft.methods import METHODS
from dude_peft.methods.sizes import count
from dude_peft.task_types import CAUSAL, TaskType
from dude_peft.terminal.html import table
from dude_peft.training.allocation import Lot, greedy_ranks, spent, uniform_rank
from dude_peft.training.calibration import calibration_rows, gradient_worths, leading, spectrum_worths
from dude_peft.training.training_set import TrainingSet
from dude_peft.tuner import DudeConfig, DudeLinear, DudeModel, frozen
from dude_peft.tuner.patterns import exactly

Worths = Callable[[Mapping[str, int]], Mapping[str, Sequence[float]]]
"""Name of a layer -> the largest rank it may get, to: name -> what the ranks 0 .. largest are worth."""

_UNIFORM_TIMES = 4
"""The largest rank of a layer, in ranks of uniform, where a budget leaves it open."""


@dataclass(frozen=True)
class Spent:
    """A budget, spent."""

    adapter: AdapterSection
    """What the run trains with."""
    ranks: dict[str, int]
    """Every layer that could have been adapted; 0 is left out."""
    parameters: int
    """Trained parameters of these ranks."""
    allowed: int
    """Parameters that the budget had."""
    by: str

    def line(self) -> str:
        """For people, in one line."""
        left_out = sum(r == 0 for r in self.ranks.values())
        found = [r for r in self.ranks.values() if r]
        span = f"rank {found[0]}" if len(set(found)) == 1 else f"ranks {min(found)} to {max(found)}"
        rest = f", {left_out} left out" if left_out else ""
        return (
            f"budget by {self.by}: {self.parameters:,} of {self.allowed:,} parameters, {span} in {len(found)} layers"
            f"{rest}"
        )

    def check(self, model: Any) -> None:
        """Raises ConfigError where the adapted model trains something else than these ranks, a head aside."""
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        found = sum(count for name, count in trained.items() if ".modules_to_save." not in name)
        if found != self.parameters:
            raise ConfigError(
                f"adapter.budget: the adapter trains {found:,} parameters and not the {self.parameters:,} of its "
                "ranks, because names of layers end in names of others; write adapter.rank_pattern by hand"
            )

    def grid(self) -> tuple[list[str], list[str], list[list[int | None]]]:
        """Blocks, modules inside a block, and the ranks as a table of these; None where a block has no such layer."""
        places = {name: _place(name) for name in self.ranks}
        blocks, parts = (list(dict.fromkeys(pair[side] for pair in places.values())) for side in (0, 1))
        found = {places[name]: r for name, r in self.ranks.items()}
        return blocks, parts, [[found.get((block, part)) for part in parts] for block in blocks]

    def _repr_html_(self) -> str:
        blocks, parts, ranks = self.grid()
        rows = [(block, *("" if r is None else r for r in row)) for block, row in zip(blocks, ranks, strict=True)]
        return table(self.line(), rows, ("", *parts))


def spend(section: AdapterSection, total: int, shapes: Mapping[str, tuple[int, int]], worths: Worths) -> Spent:
    """Ranks of all layers that the section's budget pays for.

    Args:
        section: with a budget.
        total: parameters of the base model.
        shapes: (out, in) of every layer that the section's targets name.
        worths: what ranks are worth; it is not asked for `uniform`.

    Raises:
        ConfigError: the budget pays for no rank, or its bounds leave more than a rank's price of it.
    """
    budget = section.budget
    assert budget is not None
    allowed, lots = allowance(budget, total), _lots(section, shapes)
    even = uniform_rank(lots, allowed)
    if budget.by == "uniform":
        if even == 0:
            least = spent(lots, [1] * len(lots))
            raise ConfigError(
                f"adapter.budget: rank 1 in all {len(lots)} layers takes {least:,} parameters, but the budget has "
                f"{allowed:,}; raise adapter.budget.parameters, or name fewer target_modules"
            )
        ranks = [min(even, lot.most) for lot in lots]
    else:
        largest = budget.max_r or max(_UNIFORM_TIMES * even, _UNIFORM_TIMES, budget.min_r)
        lots = [Lot(lot.name, lot.price, min(lot.most, largest)) for lot in lots]
        found = worths({lot.name: lot.most for lot in lots})
        ranks = greedy_ranks(lots, [found[lot.name] for lot in lots], allowed, budget.min_r)
    _check_spent(lots, ranks, allowed, budget)
    named = {lot.name: r for lot, r in zip(lots, ranks, strict=True)}
    return Spent(_settled(section, named), named, spent(lots, ranks), allowed, budget.by)


def allowance(budget: BudgetSection, total: int) -> int:
    """The most parameters that may be trained."""
    asked = budget.parameters
    return int(total * float(asked.removesuffix("%")) / 100) if isinstance(asked, str) else asked


def targets(model: Any, section: AdapterSection, task_type: TaskType = CAUSAL) -> dict[str, nn.Module]:
    """Every layer that an adapter of rank 1 with the section's targets would have, in a model that stays as it is.

    `task_type` says which head the model has; the head of one that scores is no such layer.

    Raises:
        ConfigError: what the tuner would refuse.
    """
    settings = DudeConfig(**{**section.settings(), "r": 1, "rank_pattern": {}}, task_type=task_type)
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tuner = DudeModel(model, settings, "default", low_cpu_mem_usage=True)  # no start is computed
    found = {
        layer.layer_name: layer.get_base_layer() for layer in tuner.model.modules() if isinstance(layer, DudeLinear)
    }
    other = next((name for name, layer in found.items() if frozen.is_map(layer)), None)
    tuner.unload()
    vars(model).pop("peft_config", None)  # early releases of PEFT leave it
    for parameter, trained in wanted:
        parameter.requires_grad_(trained)
    if other is not None:
        raise ConfigError(f"adapter.budget: '{other}' is no linear layer, and has no price; leave it out")
    return found


def worths_of(
    model: Any, layers: Mapping[str, nn.Module], section: AdapterSection, examples: TrainingSet, pad_id: int, seed: int
) -> Worths:
    """What ranks are worth by the section's budget, of a model in memory.

    Args:
        model: the base model.
        layers: from `targets`.
        section: with a budget.
        examples: of the run; its calibration rows come from them.
        pad_id: of the tokenizer.
        seed: which chooses the rows.
    """
    budget, options = section.budget, DudeConfig(**section.settings()).split_options
    assert budget is not None
    weights: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(frozen.dense_weight, layer) for name, layer in layers.items()
    }

    def worths(ranks: Mapping[str, int]) -> dict[str, list[float]]:
        found = leading(weights, ranks, options, model.device)
        if budget.by == "spectrum":
            return spectrum_worths(found)
        rows = calibration_rows(examples, budget.calibration_rows, seed)
        return gradient_worths(model, layers, found, rows, pad_id, each_row=budget.by == "fisher")

    return worths


def shapes_of(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """(out, in) of each."""
    return {name: frozen.layer_shape(layer) for name, layer in layers.items()}


def _lots(section: AdapterSection, shapes: Mapping[str, tuple[int, int]]) -> list[Lot]:
    trained = METHODS[section.method].trained

    def price(shape: tuple[int, int]) -> Callable[[int], int]:
        return lambda r: count(trained, *shape, r) if r else 0

    return [Lot(name, price(shape), min(shape)) for name, shape in shapes.items()]


def _check_spent(lots: Sequence[Lot], ranks: Sequence[int], allowed: int, budget: BudgetSection) -> None:
    if not any(ranks):
        least = min(lot.price(1) for lot in lots)
        raise ConfigError(
            f"adapter.budget: rank 1 in the smallest layer takes {least:,} parameters, but the budget has "
            f"{allowed:,}; raise adapter.budget.parameters"
        )
    if all(r == lot.most for lot, r in zip(lots, ranks, strict=True)):
        key = "its layers have no larger ranks" if budget.max_r is None else f"max_r is {budget.max_r}"
        if (found := spent(lots, ranks)) < allowed:
            raise ConfigError(
                f"adapter.budget: only {found:,} of {allowed:,} parameters can be spent, because {key}; lower "
                "adapter.budget.parameters" + ("" if budget.max_r is None else ", or raise max_r")
            )


def _settled(section: AdapterSection, ranks: Mapping[str, int]) -> AdapterSection:
    """The section with these ranks, and alphas under which every layer has the scaling that it had."""
    method, asked = METHODS[section.method], DudeConfig(**section.settings())

    def pair(name: str, r: int) -> tuple[int, float]:
        alpha = asked.rank_and_alpha(name)[1] * r / section.r
        return r, alpha if not method.rank_stabilized else alpha * math.sqrt(section.r / r)

    pairs = {name: pair(name, r) for name, r in ranks.items() if r}
    # Most layers have one pair: the file names the others.
    (r, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    own = {exactly(name): found for name, found in pairs.items() if found != (r, alpha)}
    return section.model_copy(
        update={
            "budget": None,
            "r": r,
            "lora_alpha": alpha,
            "target_modules": list(pairs),
            "exclude_modules": None,
            "layers_to_transform": None,
            "rank_pattern": {name: rank for name, (rank, _) in own.items()},
            "alpha_pattern": {name: own_alpha for name, (_, own_alpha) in own.items()},
        }
    )


def _place(name: str) -> tuple[str, str]:
    """The block that a layer is in, up to the last number of its name, and the rest; no block where there is none."""
    parts = name.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1]), ".".join(parts[last + 1 :])
