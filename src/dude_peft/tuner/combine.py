"""How the changes W' - W0 of several adapters become one, for `dude merge` and `add_weighted_adapter`."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils import merge_utils
from torch import Tensor

from dude_peft.artifact.effective import weighted_sum
from dude_peft.errors import ConfigError
from dude_peft.show import quoted
from dude_peft.tuner.config import closest

KINDS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """A way to combine changes: a weighted sum, or one of PEFT's that drop some entries first.

    Args:
        kind: linear, ties, dare_linear, dare_ties or magnitude_prune (peft.utils.merge_utils).
        density: share of the entries that is kept, above 0 up to 1; not for linear.
        seed: of the entries that dare_* drops; every layer loses others.
        majority_sign_method: how ties and dare_ties elect a sign, "total" or "frequency".
    """

    kind: str = "linear"
    density: float | None = None
    seed: int = 0
    majority_sign_method: str = "total"
    _unnamed: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"combination {quoted(self.kind)} is unknown; {closest(self.kind, KINDS)}")
        if self.by_rows and self.density is not None:
            raise ConfigError(
                "linear takes no density; leave it out, or choose ties, dare_linear, dare_ties or magnitude_prune"
            )
        if not self.by_rows and not 0 < (self.density or 0) <= 1:
            raise ConfigError(f"combination {self.kind} needs a density above 0 and at most 1, usually 0.5")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed {self.seed}: give a whole number from 0 to 2**32 - 1")
        if self.majority_sign_method not in _SIGN_METHODS:
            raise ConfigError(f"majority_sign_method={self.majority_sign_method!r}; it is 'total' or 'frequency'")

    @property
    def by_rows(self) -> bool:
        """Whether rows of a weight may be combined one by one."""
        return self.kind == "linear"

    def of(self, deltas: list[Tensor], weights: list[float], layer: str | None = None) -> Tensor:
        """The combined change, (out, in) as each of them.

        Args:
            deltas: (out, in) W'_i - W0 on the CPU; may be written into.
            weights: w_i.
            layer: its name, which decides with the seed what dare_* drops; None: the number of the call does.

        Raises:
            ConfigError: of so small a density nothing would be kept.
        """
        if self.by_rows:
            return weighted_sum(deltas, weights)
        assert self.density is not None, "one is asked for above"
        if int(self.density * deltas[0].numel()) < 1:
            raise ConfigError(
                f"density {self.density:g} keeps none of the {deltas[0].numel():,} entries of a change"
                f"{'' if layer is None else f' ({layer})'}; give a larger one, usually 0.5"
            )
        options: Any = (self.density,) if not self.kind.endswith("ties") else (self.density, self.majority_sign_method)
        layer = str(next(self._unnamed)) if layer is None else layer
        digest = hashlib.sha256(f"{self.seed}:{layer}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator alone: torch.manual_seed would change those of all devices.
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
            combined: Tensor = getattr(merge_utils, self.kind)(deltas, torch.tensor(weights), *options)
        return combined
