"""The rows of a comparison: read once before any run, so that no test row is learned and every run sees the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dude_peft.comparison.cells import Cell
from dude_peft.config.schema import ShareSection
from dude_peft.errors import ConfigError, DataError
from dude_peft.folder.record import RunReport
from dude_peft.model.load import load_tokenizer, locate
from dude_peft.model.processor import sight_of
from dude_peft.training.run_data import RunData, glance, read

if TYPE_CHECKING:
    from dude_peft.data.token_set import TokenSet

_MOST_SHOWN = 5


@dataclass(frozen=True)
class Rows:
    """What the runs of both stages read."""

    items: tuple[str, ...]
    """Where each test item comes from."""
    questions: tuple[str, ...]
    """The same of each question that is answered."""
    hashes: dict[str, dict[str, str]]
    """By stage: sha256 of the tokens of each set."""
    counts: dict[str, int]
    """Rows of each set, by name."""
    warnings: tuple[str, ...]

    def check(self, cell: Cell, report: RunReport) -> None:
        """Raises DataError where a run saw other rows than the comparison has now."""
        for name, wanted in self.hashes[cell.stage].items():
            found = report.data.get(name, {}).get("tokens_sha256")
            if found != wanted:
                raise DataError(
                    f"run {cell.name}: its {name} rows are not those of the other runs (sha256 {str(found)[:12]} and "
                    f"{wanted[:12]}); restore them, or start the comparison anew in another folder"
                )


def read_rows(tune: Cell, test: Cell) -> Rows:
    """Reads and compares the rows of both stages, from one cell of each.

    Raises:
        DataError: bad rows, none left, or test rows that are trained on or tuned on.
        ConfigError: a tokenizer or template that cannot be used, or answers that decide and are not there.
    """
    glance(test.config)
    model, own = tune.config.model, tune.config.data.chat_template
    where = locate(model)
    tokenizer = load_tokenizer(model, where, own)
    sight = sight_of(model, where, tokenizer)
    judged = read(test.config, tokenizer, sight)
    try:
        tuned = read(tune.config, tokenizer, sight)
    except DataError as error:
        if isinstance(tune.config.data.test, ShareSection):
            raise DataError(str(error).replace("data.test: a share", "validation: a share")) from error
        raise
    assert judged.held_out is not None
    assert tuned.held_out is not None
    test_rows, validation = judged.held_out.examples, tuned.held_out.examples
    if len(validation) == 0:
        raise DataError("validation: no row is left; give a larger share, or a file")
    _refuse_shared(test_rows, _domain(judged), "test", "the question of a training row")
    _refuse_shared(validation, _domain(tuned), "validation", "the question of a training row")
    _refuse_shared(test_rows, validation, "test", "the question of a validation row")
    return Rows(
        items=tuple(test_rows.source(index) for index in range(len(test_rows))),
        questions=tuple(row.source for row in judged.held_out.asked),
        hashes={"tune": _hashes(tuned), "test": _hashes(judged)},
        counts={"train": len(_domain(judged)), "validation": len(validation), "test": len(test_rows)},
        warnings=tuple(dict.fromkeys([*judged.warnings, *tuned.warnings])),
    )


def check_primary(primary: str, rows: Rows) -> None:
    """Raises ConfigError where answers are to decide and there are none."""
    if primary == "right" and not rows.questions:
        raise ConfigError("key 'primary': right needs test rows with a question and an answer; set it to loss")


def _domain(data: RunData) -> TokenSet:
    from dude_peft.data.held_out import first

    return first(data.train, data.train.domain)


def _hashes(data: RunData) -> dict[str, str]:
    return {name: digest for name, digest in data.tokens_sha256.items() if name != "questions"}


def _refuse_shared(judges: TokenSet, others: TokenSet, name: str, what: str) -> None:
    """Rows that judge must be new: the same question elsewhere measures memory."""
    shared = np.flatnonzero(np.isin(judges.prompts(), others.prompts()))
    if not len(shared):
        return
    asked, there = judges.prompts(), others.prompts()
    pairs = [
        f"{judges.source(int(index))} = {others.source(int(np.flatnonzero(there == asked[index])[0]))}"
        for index in shared[:_MOST_SHOWN]
    ]
    more = f" and {len(shared) - _MOST_SHOWN} more" if len(shared) > _MOST_SHOWN else ""
    raise DataError(
        f"{name}: {len(shared)} of {len(judges)} rows repeat {what} ({'; '.join(pairs)}{more}); remove them from one "
        "side"
    )
