"""The rows of a run: those to learn from, those to be judged on, and what is recorded and warned of about them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from dude_peft.config.schema import KtoSection, RunConfig, ShareSection
from dude_peft.data.columns import Columns
from dude_peft.data.encode import prompt_ids
from dude_peft.data.formats import Reading, Row
from dude_peft.data.held_out import first, held_out_questions, part_of
from dude_peft.data.objectives import KINDS, Kind
from dude_peft.data.prepare import prepare
from dude_peft.data.rows import local_file, reading_of, stream_any, stream_rows
from dude_peft.data.sight import Sight
from dude_peft.data.template import Template
from dude_peft.data.token_set import TokenSet, overlap, told_of_leaks
from dude_peft.data.token_store import question_hash
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL
from dude_peft.training.label_balance import check_enough, check_margin, told_of_held_out, told_of_labels
from dude_peft.training.training_set import GeneralTest, TrainingSet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_GENERAL_SPLIT, _GENERAL_TEST_SPLIT = "train", "test"
_USUAL_SPLITS = ("train", "test")  # what the keys hold where nobody set them
_GENERAL_IS_TEXT = {"blind": "general rows are text alone"}
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
    def tokens_sha256(self) -> dict[str, str]:
        """Hash of what each set became: token ids and masks, and the ids of the questions that are answered."""
        found = {name: part["tokens_sha256"] for name, part in self.record.items() if isinstance(part, dict)}
        if self.held_out is not None:
            found["questions"] = hashlib.sha256(json.dumps(self.held_out.prompts).encode("ascii")).hexdigest()
        return found

    @property
    def images(self) -> int:
        """Images of all examples."""
        return sum(each.counts.images for each in self._sets)

    @property
    def longest(self) -> int:
        """Tokens of the longest example of all."""
        return max(each.longest for each in self._sets)

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
    ours, theirs = Reading(), _reading(config)
    wanted = [(data.train, data.train_split, theirs), (data.general, _GENERAL_SPLIT, ours)]
    if config.evaluation.enabled:
        wanted += [(data.general_test, _GENERAL_TEST_SPLIT, ours)]
        if not isinstance(data.test, ShareSection):
            wanted += [(data.test, data.test_split, theirs)]
    for sources, split, reading in wanted:
        if sources is None:
            continue
        if isinstance(sources, str):
            entries = [(sources, split, reading)]
        else:
            entries = [(each.source, each.split or split, reading_of(each, reading)) for each in sources]
        for name, own, names in entries:
            local = local_file(name) is not None
            if local and own not in _USUAL_SPLITS:
                raise ConfigError(
                    f"data: split {shown(own)} of {shown(name, 300)}: a local file has no splits; leave the split "
                    "out, and give the file with its rows"
                )
            if local or name.startswith("builtin:"):
                next(iter(stream_rows(name, split=own, limit=1, seed=data.seed, reading=names)), None)


def read(
    config: RunConfig,
    tokenizer: Any,
    sight: Sight | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> RunData:
    """All rows, tokenised now or found in the cache; `sight` is how the model sees images, None where it sees none.

    Raises:
        DataError: rows that cannot be trained on.
        ConfigError: a template or tokenizer that cannot be trained with.
        ResourceError: the cache cannot be written.
    """
    data, evaluation = config.data, config.evaluation
    template = Template(tokenizer, data.template, data.special_tokens)
    kind, preference = KINDS[config.train.objective], config.train.preference
    labels = preference if isinstance(preference, KtoSection) else None
    asks, curriculum = config.train.rewarded is not None, config.train.curriculum
    judged = curriculum is not None and curriculum.by == "pass_rate"
    learned = "last_answer" if asks else data.train_on
    spoken = config.train.rewarded is not None and config.train.rewarded.reads_conversations
    record: dict[str, Any] = {"template": template.kind, "train_on": learned}
    warnings: list[str] = []
    eyes = seeing(config.train.objective, sight)

    def tokens(
        source: Any,
        split: str,
        limit: int | None,
        *,
        train_on: str = learned,
        upft: int | None = None,
        columns: Mapping[str, str] | None = None,
        kind: Kind = "answers",
        general: bool = False,
    ) -> TokenSet:
        return prepare(
            source,
            template,
            tokenizer,
            max_length=data.max_length,
            train_on=train_on,
            upft=upft,
            split=split,
            limit=limit,
            seed=data.seed,
            columns=columns,
            kind=kind,
            streaming=data.streaming,
            advance=advance,
            asked=spoken and not general,
            **(_GENERAL_IS_TEXT if general else eyes),
        )

    def told(name: str, found: TokenSet, *, warn: bool = True) -> TokenSet:
        hashes = {"sha256": found.sha256, "tokens_sha256": found.tokens_sha256}
        told = {"examples": len(found), "duplicates": found.duplicates}
        if int(found.asked.min()) <= 1 and ((asks and name in ("train", "test")) or (judged and name == "train")):
            place = found.source(int(found.asked.argmin()))
            what = "train.objective: grpo" if asks else "train.curriculum: by pass_rate"
            raise DataError(f"{place}: plain text asks nothing; {what} needs questions with answers")
        if name == "train" and curriculum is not None and len(found) < curriculum.count:
            raise DataError(
                f"train.curriculum: {len(found)} rows are too few for {curriculum.count} stages; lower "
                "train.curriculum.stages, or add rows"
            )
        if labels is not None and name in ("train", "test"):
            told["wanted"] = int(found.labels.sum())
            check_enough(found, f"data.{name}", labels)
        record[name] = hashes | told | asdict(found.counts)
        if warn:
            lines = [*found.losses(data.max_length), *found.counts.spellings(data.special_tokens)]
            warnings.extend(f"data.{name}: {line}" for line in lines)
        return found

    whole = (data.train, data.train_split, data.train_rows)
    domain = tokens(*whole, upft=data.upft, columns=data.columns, kind=kind)
    questions = apart = None
    if isinstance(data.test, ShareSection):
        questions = held_out_questions(domain, data.test.share, data.seed, behind=data.set_aside)
    if data.set_aside is not None:
        apart = held_out_questions(domain, data.set_aside, data.seed)
    for taken in (questions, apart):
        if taken is not None:
            domain = part_of(domain, taken, held_out=False)
    told("train", domain)
    if domain.duplicates:
        warnings.append(f"{domain.duplicates} of {len(domain)} training examples are duplicates")
    if labels is not None:
        warnings += told_of_labels(domain, labels)
    general = general_test = None
    if data.general is not None:
        general = told("general", tokens(data.general, _GENERAL_SPLIT, None, train_on=_ALL, general=True))
    if evaluation.enabled and data.general_test is not None:
        rows_of = tokens(data.general_test, _GENERAL_TEST_SPLIT, None, train_on=_ALL, general=True)
        examples = told("general_test", rows_of)
        general_test = GeneralTest(examples)
        record["general_test"]["measured"] = general_test.measured
        if general is not None and (leaked := overlap(general, examples)):
            warnings.append(f"{leaked} of {len(examples)} held-out general examples are also general training examples")
    train = TrainingSet(domain, general, share=data.general_share, seed=data.seed, general_test=general_test)
    if not evaluation.enabled or data.test is None:
        return RunData(train, None, record, warnings)
    if questions is None:
        test = told("test", tokens(data.test, data.test_split, data.test_rows, columns=data.columns, kind=kind))
    else:
        test = part_of(tokens(*whole, columns=data.columns, kind=kind), questions, held_out=True)
        if data.test_rows is not None:
            test = first(test, data.test_rows)
        told("test", test, warn=False)  # of the same rows it was told
    if labels is not None:
        check_margin(test, evaluation.metric_for_best_model)
        warnings += [f"data.test: {line}" for line in told_of_held_out(test)]
    warnings += told_of_leaks(domain, test)
    rows = []
    if config.train.task_type == CAUSAL:
        rows = _first_rows(config) if questions is None else _of(config, questions)
    asked = [row for row in map(_answered, rows) if _has_right_answer(row)]
    if asks and not asked:
        raise DataError("data.test: no row has an answer to reward; set evaluation.enabled: false, or add such rows")
    prompts = [prompt_ids(row, template, tokenizer, sight) for row in asked]
    return RunData(train, HeldOut(test, asked, prompts), record, warnings)


def seeing(objective: str, sight: Sight | None) -> dict[str, Any]:
    """Who sees the images of a run's rows, and why nobody does, as `prepare` and `encode` take it."""
    if objective != "sft":
        return {"blind": f"train.objective: {objective} learns from text alone (sft learns from images)"}
    return {} if sight is None else {"sight": sight}


def _reading(config: RunConfig) -> Reading:
    data = config.data
    return Reading(Columns(data.columns), kind=KINDS[config.train.objective], streaming=data.streaming)


def _has_right_answer(row: Row) -> bool:
    """Whether an answer of the model can be compared with the row's."""
    return not row.is_text and bool(row.answer) and row.is_learned and row.label is not False


def _answered(row: Row) -> Row:
    """Of a pair its question and the better answer's first message: what a model that is asked may answer."""
    return replace(row, messages=row.messages[: len(row.prompt) + 1], rejected=()) if row.rejected else row


def _first_rows(config: RunConfig) -> list[Row]:
    data, count = config.data, config.evaluation.rows
    if data.test is None or isinstance(data.test, ShareSection):
        return []
    limit = count if data.test_rows is None else min(count, data.test_rows)
    options: dict[str, Any] = {"split": data.test_split, "seed": data.seed, "reading": _reading(config)}
    options["limit"] = limit if isinstance(data.test, str) else data.test_rows  # of a mixture it decides the choice
    return list(itertools.islice(stream_any(data.test, **options), limit))


def _of(config: RunConfig, questions: NDArray[np.uint64]) -> list[Row]:
    """The first training rows that ask one of `questions`, each question once."""
    data, count = config.data, config.evaluation.rows
    limit = count if data.test_rows is None else min(count, data.test_rows)
    wanted = set(questions.tolist())
    options: dict[str, Any] = {"split": data.train_split, "limit": data.train_rows, "seed": data.seed}
    found: list[Row] = []
    for row in stream_any(data.train, reading=_reading(config), **options):
        if not row.is_text and question_hash(row) in wanted:
            wanted.remove(question_hash(row))
            found.append(row)
        if len(found) == limit:
            break
    return found
