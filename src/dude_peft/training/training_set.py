"""What a run learns from: the rows of its domain, and behind them general rows for the mixture of losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from dude_peft.data.mixture import mix
from dude_peft.data.token_set import TokenSet
from dude_peft.errors import ConfigError


@dataclass
class GeneralTest:
    """Held-out general rows, and what was measured on them."""

    examples: TokenSet
    measured: list[dict[str, float]] = field(default_factory=list)
    """{step, loss, kl_base_tuned, kl_tuned_base} of each time, nats a token; report.json holds this list.

    The first is the base model.
    """

    def after(self, kept: int | None) -> dict[str, float]:
        """What was measured of the adapter that the run keeps: that of step `kept`, or the last one."""
        return next((line for line in self.measured if line["step"] == kept), self.measured[-1])

    def take_up(self, measured: list[dict[str, float]]) -> None:
        """Goes on from what a checkpoint keeps of `measured`."""
        self.measured[:] = [dict(line) for line in measured]


class TrainingSet(TokenSet):
    """The examples of a run, one set with one numbering."""

    domain: int
    """How many there are of the domain; the general ones follow."""
    general_test: GeneralTest | None
    """Rows on which general ability is measured."""

    def __init__(
        self,
        domain: TokenSet,
        general: TokenSet | None = None,
        *,
        share: float = 0.5,
        seed: int = 0,
        general_test: GeneralTest | None = None,
    ) -> None:
        """All of `domain`, and as many of `general` that they are `share` of the set: a seeded choice, or repeats.

        Raises:
            ConfigError: `share` of so few rows is no row.
        """
        self.domain = len(domain)
        self.general_test = general_test
        parts = domain.parts()
        if general is not None:
            total = round(len(domain) / (1 - share))
            _, taken = mix([len(domain), len(general)], [1 - share, share], total, seed)
            if not len(taken):
                raise ConfigError(
                    f"data.general_share: {share} gives less than one general row for {len(domain)} rows; raise it"
                )
            parts += general.parts(taken)
        super().__init__([source for source, _ in parts], [chosen for _, chosen in parts])
