"""The rows of a run: those to learn from, those to be judged on, and what is recorded and warned of about them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dude_peft.data.encode import prompt_ids
from dude_peft.data.formats import Row
from dude_peft.data.prepare import prepare
from dude_peft.data.rows import load_rows, local_file, stream_rows
from dude_peft.data.template import Template
from dude_peft.data.token_set import TokenSet, overlap
from dude_peft.errors import ConfigError
from dude_peft.show import shown
from dude_peft.train.config import DataSection, RunConfig
from dude_peft.train.training_set import GeneralTest, TrainingSet

_GENERAL_SPLIT, _GENERAL_TEST_SPLIT = "train", "test"
_USUAL_SPLITS = ("train", "test")  # what the keys hold where nobody set them
_ALL = "all"  # general rows are judged token by token, whatever is trained of the domain's


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows, ready for scoring."""

    examples: TokenSet
    asked: list[Row]
    """Those that are answered and marked right or wrong."""
    prompts: list[list[int]]
    """Token ids of their questions."""


@dataclass(frozen=True)
class RunData:
    """All rows of a run."""

    train: TrainingSet
    held_out: HeldOut | None
    record: dict[str, Any]
    """What report.json says about them."""
    warnings: list[str]

    @property
    def sha256(self) -> dict[str, str]:
        """Hash of each set."""
        return {name: part["sha256"] for name, part in self.record.items() if isinstance(part, dict)}

    @property
    def longest(self) -> int:
        """Tokens of the longest example of all."""
        return max(int(each.lengths.max()) for each in self._sets)

    @property
    def largest_id(self) -> int:
        """The largest token id of all."""
        return max(each.counts.largest_id for each in self._sets)

    def verify_unchanged(self) -> None:
        """Raises DataError where a file was changed since it was read."""
        for each in self._sets:
            each.verify_unchanged()

    @property
    def _sets(self) -> list[TokenSet]:
        test, general = self.held_out, self.train.general_test
        return [self.train, *([test.examples] if test else []), *([general.examples] if general else [])]


def glance(config: RunConfig) -> None:
    """Reads the first row of every local source, before anything heavy is imported.

    Raises:
        DataError: a missing file, another format, a first row that is none.
        ConfigError: a built-in set that does not exist, or a split of a file, which has none.
    """
    data = config.data
    wanted = [(data.train, data.train_split), (data.general, _GENERAL_SPLIT)]
    if config.evaluation.enabled:
        wanted += [(data.test, data.test_split), (data.general_test, _GENERAL_TEST_SPLIT)]
    for sources, split in wanted:
        if sources is None:
            continue
        entries = [(sources, split)] if isinstance(sources, str) else [(e.source, e.split) for e in sources]
        for name, own in entries:
            local = local_file(name) is not None
            if local and own is not None and own not in _USUAL_SPLITS:
                raise ConfigError(
                    f"data: split {shown(own)} of {shown(name, 300)}: a local file has no splits; leave it out, "
                    "and name the file that holds its rows"
                )
            if local or name.startswith("builtin:"):
                next(iter(stream_rows(name, split=own or split, limit=1, seed=data.seed)), None)


def read(config: RunConfig, tokenizer: Any, advance: Callable[[int], None] = lambda rows: None) -> RunData:
    """All rows, tokenised now or found in the cache.

    Raises:
        DataError: rows that cannot be trained on.
        ConfigError: a template or tokenizer that cannot be trained with.
        ResourceError: the cache cannot be written.
    """
    data, evaluation = config.data, config.evaluation
    template = Template(tokenizer, data.template, data.special_tokens)
    record: dict[str, Any] = {"template": template.kind, "train_on": data.train_on}
    warnings: list[str] = []

    def tokens(
        name: str, source: Any, split: str, limit: int | None, *, train_on: str = data.train_on, upft: int | None = None
    ) -> TokenSet:
        found = prepare(
            source,
            template,
            tokenizer,
            max_length=data.max_length,
            train_on=train_on,
            upft=upft,
            split=split,
            limit=limit,
            seed=data.seed,
            advance=advance,
        )
        told = {"sha256": found.sha256, "examples": len(found), "duplicates": found.duplicates}
        record[name] = told | asdict(found.counts)
        lines = [*found.counts.losses(data.max_length), *found.counts.spellings(data.special_tokens)]
        warnings.extend(f"data.{name}: {line}" for line in lines)
        return found

    domain = tokens("train", data.train, data.train_split, data.train_rows, upft=data.upft)
    if domain.duplicates:
        warnings.append(f"{domain.duplicates} of {len(domain)} training examples are repetitions")
    general = general_test = None
    if data.general is not None:
        general = tokens("general", data.general, _GENERAL_SPLIT, None, train_on=_ALL)
    if evaluation.enabled and data.general_test is not None:
        examples = tokens("general_test", data.general_test, _GENERAL_TEST_SPLIT, None, train_on=_ALL)
        general_test = GeneralTest(examples)
        record["general_test"]["measured"] = general_test.measured
        if general is not None and (leaked := overlap(general, examples)):
            warnings.append(f"{leaked} of {len(examples)} held-out general examples are general training examples too")
    train = TrainingSet(domain, general, share=data.general_share, seed=data.seed, general_test=general_test)
    if not evaluation.enabled or data.test is None:
        return RunData(train, None, record, warnings)
    test = tokens("test", data.test, data.test_split, data.test_rows)
    if leaked := overlap(domain, test):
        warnings.append(
            f"{leaked} of {len(test)} held-out examples ask what a training example asks: their score is memory"
        )
    asked = [row for row in _first_rows(data, evaluation.rows) if not row.is_text]
    prompts = [prompt_ids(row, template, tokenizer) for row in asked]
    return RunData(train, HeldOut(test, asked, prompts), record, warnings)


def _first_rows(data: DataSection, count: int) -> list[Row]:
    assert data.test is not None
    limit = count if data.test_rows is None else min(count, data.test_rows)
    if isinstance(data.test, str):
        return list(itertools.islice(stream_rows(data.test, split=data.test_split, limit=limit, seed=data.seed), limit))
    return load_rows(data.test, split=data.test_split, limit=data.test_rows, seed=data.seed)[:limit]
