"""What a comparison is: an ordinary run, the methods that compete, and the protocol's numbers.

`reading.load_grid` reads it, with the same strictness as a run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dude_peft.config.schema import (
    Count,
    Number,
    Positive,
    Section,
    Seed,
    ShareSection,
    Source,
    Sources,
    Text,
    as_share,
)


def _different(values: list[Any]) -> list[Any]:
    if len(set(map(repr, values))) < len(values):
        raise ValueError("a value is written twice; keep one of them")
    return values


Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_different)]
Rates = Annotated[list[Positive], Field(min_length=1), AfterValidator(_different)]
Overrides = dict[Text, Any]
Rows = Annotated[Sources | ShareSection, BeforeValidator(as_share)]


class GridConfig(Section):
    """One comparison of `dude compare`."""

    run: Source | dict[Text, Any]
    """The run that all have in common: the file of an ordinary run, or its sections written here."""

    methods: Annotated[list[Text | dict[Text, Overrides]], Field(min_length=1)]
    """Who competes: names of methods, or `NAME: {KEY: VALUE}` with other values of `adapter` and `train` keys. A name
    of your own needs the key adapter.method."""

    learning_rates: Rates | dict[Text, Rates] | None = None
    """Rates that are tried: a list for all, or a list for each method, all of one length. The default is five for
    each: half-decades over two decades, around the method's own."""

    ranks: Annotated[list[Count], Field(min_length=1), AfterValidator(_different)] | None = None
    """Ranks. Every method that has a rank competes at each of them, under the name `METHOD r=RANK`."""

    axes: dict[Text, Annotated[list[Any], Field(min_length=1), AfterValidator(_different)]] = Field(default={})
    """Other keys of `adapter` and `train` that are tuned, each with its values: `train.warmup_steps: [0, 0.05]`."""

    validation: Rows = ShareSection(share=0.1)
    """Rows that choose rates and settings: a share of the training rows, or rows of their own, written like
    `data.train`."""

    test: Annotated[Sources | ShareSection | None, BeforeValidator(as_share)] = None
    """Rows that judge, read once for each run of the second stage; null takes the run's data.test."""

    primary: Literal["loss", "right"] = "loss"
    """What decides: the loss of the test answers, or the share of test questions that are answered right."""

    tuning_seeds: Seeds = Field(default=[0, 1, 2])
    """Seeds of the first stage. A setting is judged by its mean over them. With a single one, a lucky choice of a rate
    looks like a difference of methods in one of ten comparisons."""

    final_seeds: Seeds = Field(default=[3, 4, 5, 6, 7])
    """Seeds of the second stage; none of them is a tuning seed."""

    extend: Annotated[int, Field(ge=0, le=10)] = 3
    """How many rates may be added where the best one is the lowest or the highest tried. Every method then gets the
    same number of further trials."""

    prune: list[Annotated[Number, Field(gt=0, lt=1)]] = Field(default=[])
    """Successive halving, off by default: at each of these shares of the training length, in growing order, the worse
    half of each method's settings stops. A setting is judged there by a shorter run of its own."""

    max_runs: Count = 200
    """Runs that the comparison may take in all. A larger grid is refused."""

    output_dir: Source
    """Folder of the comparison. It is new or empty, or it holds the same comparison, which then goes on."""

    @model_validator(mode="after")
    def _fresh_seeds(self) -> GridConfig:
        if used := sorted(set(self.tuning_seeds) & set(self.final_seeds)):
            raise ValueError(f"key 'final_seeds': {used[0]} is a tuning seed too; the second stage needs fresh ones")
        if sorted(set(self.prune)) != self.prune:
            raise ValueError("key 'prune': the shares do not grow; write them in growing order")
        return self
