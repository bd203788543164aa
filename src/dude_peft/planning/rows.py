"""The rows of a run, counted: their tokens, and the optimizer steps that they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from dude_peft.config.schema import DataSection, ShareSection, Sources, TrainSection
from dude_peft.data.batches import Example
from dude_peft.data.columns import Columns
from dude_peft.data.encode import check_ids, encode
from dude_peft.data.encode_pairs import PairEncoder
from dude_peft.data.formats import Reading, Row
from dude_peft.data.labels import IGNORE
from dude_peft.data.objectives import PAIRED, Kind
from dude_peft.data.packing import pack
from dude_peft.data.rows import local_file, stream_any
from dude_peft.data.template import Template
from dude_peft.errors import ConfigError
from dude_peft.training.model_checks import check_answers_fit

_MOST_ROWS = 4000  # tokenised in a second or two
_MOST_WITH_IMAGES = 200  # which are decoded and scaled


@dataclass(frozen=True)
class Rows:
    """The training rows, as far as they were counted."""

    rows: int
    """That are trained on; those too long are not. Pairs count once."""
    longest: int
    """Tokens of the longest of them; data.max_length where not all were counted."""
    tokens_per_row: float
    """Of pairs, both conversations."""
    counted: int
    """Rows whose tokens were counted; the other figures follow in proportion."""
    images: bool = False
    """Whether rows have images, whose tokens are counted like others."""
    begins: int = 0
    """Tokens in front of the first judged one, of the row that has the fewest; 0 where all count."""
    image_tokens: int = 0
    """Of the row that has the most of those that were counted."""
    image_tokens_per_row: float = 0.0
    left_out: int = 0
    """Rows that are longer than data.max_length, and so are not trained on."""
    widest: Example | None = None
    """The row that has the most image tokens, with its images."""

    def as_dict(self) -> dict[str, Any]:
        """The numbers."""
        return {name: value for name, value in vars(self).items() if name != "widest"}


def count_rows(
    data: DataSection,
    tokenizer: Any,
    model: Any,
    *,
    held_out: bool = False,
    kind: Kind = "answers",
    answers: int | None = None,
    eyes: Mapping[str, Any] = MappingProxyType({}),
) -> Rows:
    """Reads the training rows and counts tokens, of evenly spaced ones where there are many.

    Args:
        data: of the run.
        tokenizer: of the model.
        model: with or without weights; rows have to fit its vocabulary and positions.
        held_out: read the held-out rows instead.
        kind: what rows hold to learn.
        answers: tokens of the longest answer of the model's own, where these are learned in place of the rows'.
        eyes: who sees images, by `run_data.seeing`.

    Raises:
        DataError: rows that the run would refuse.
        ConfigError: rows longer than the model reads.
    """
    source, split, limit = data.train, data.train_split, data.train_rows
    taken = (data.test.share if isinstance(data.test, ShareSection) else 0.0) + (data.set_aside or 0.0)
    if held_out and data.test is not None and not isinstance(data.test, ShareSection):
        source, split, limit, taken = data.test, data.test_split, data.test_rows, 0.0
    options: dict[str, Any] = {"split": split, "limit": limit, "seed": data.seed}
    options["reading"] = Reading(Columns(data.columns), kind=kind, streaming=data.streaming)
    sample, total, images = _sampled(partial(stream_any, source, **options))
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    template = Template(tokenizer, data.template, data.special_tokens).of_kind(kind)
    begins = 0
    seen: dict[str, Any] = {}
    if kind in PAIRED:
        both, begins = _pairs(sample, template, tokenizer, data.max_length, vocabulary)
        lengths, conversations = [sum(pair) for pair in both], [max(pair) for pair in both]
    else:
        encoded = encode(
            sample,
            template,
            tokenizer,
            data.max_length,
            train_on=data.train_on if answers is None else "last_answer",
            upft=None if held_out else data.upft,
            vocab_size=vocabulary,
            shortens=kind != "labels",
            **eyes,
        )
        lengths = conversations = [len(example["input_ids"]) for example in encoded.examples]
        seen = _seen(encoded.examples)
        if kind != "answers" or answers is not None:
            prompts = [each["labels"].count(IGNORE) for each in encoded.examples]
            begins = min(prompts)
            if answers is not None:
                lengths = conversations = [prompt + answers for prompt in prompts]
    if answers is not None:
        check_answers_fit(model, max(conversations) - answers, answers, "train.grpo.max_completion_length")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max(conversations) > positions:
        raise ConfigError(
            f"data.max_length: the longest row has {max(conversations)} tokens, but the model can read only "
            f"{positions}; set data.max_length: {positions}"
        )
    trained = total * (1 - taken)
    kept = max(1, round(trained * len(lengths) / len(sample)))
    left_out = max(0, round(trained) - kept)
    if data.packing:
        packs = len(pack(lengths, data.max_length, data.seed))
        made = math.ceil(kept * packs / len(lengths))
        return Rows(made, data.max_length, sum(lengths) / packs, len(sample), left_out=left_out)
    longest = max(conversations) if len(sample) == total else data.max_length + (answers or 0)
    return Rows(kept, longest, sum(lengths) / len(lengths), len(sample), images, begins, left_out=left_out, **seen)


def _seen(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Image tokens of the rows, and the row that has the most; pixels are as many as tokens of them."""
    counts = [_image_tokens(example) for example in examples]
    most = max(counts)
    widest = examples[counts.index(most)] if most else None
    return {"image_tokens": most, "image_tokens_per_row": sum(counts) / len(counts), "widest": widest}


def _image_tokens(example: Example) -> int:
    return sum(token in example["shown"].sight.marks for token in example["input_ids"]) if "shown" in example else 0


def _sampled(rows: Callable[[], Iterator[Row]]) -> tuple[list[Row], int, bool]:
    """Evenly spaced rows, the number of all, and whether any has images; of many rows never more are in memory."""
    begun: list[Row] = []
    total, images = 0, False
    for row in rows():
        if total < _MOST_ROWS:
            begun.append(row)
        total += 1
        images = images or bool(row.pictures)
    step = max(1, math.ceil(total / (_MOST_WITH_IMAGES if images else _MOST_ROWS)))
    few = total == len(begun)
    return (begun[::step] if few else list(itertools.islice(rows(), 0, None, step))), total, images


def _pairs(
    rows: list[Row], template: Template, tokenizer: Any, max_length: int, vocabulary: int
) -> tuple[list[list[int]], int]:
    """Tokens of both conversations of each pair that fits, and those in front of the first judged one of any."""
    encoder, found, begins = PairEncoder(template, tokenizer, max_length=max_length), [], max_length
    for row, sides in encoder.examples(rows):
        for example in sides:
            check_ids(row.source, example.ids, tokenizer, vocabulary)
            begins = min(begins, example.labels.count(IGNORE))
        found += [[len(example.ids) for example in sides]] if sides else []
    encoder.check_any(len(found))
    return found, begins


def optimizer_steps(train: TrainSection, rows: int, processes: int = 1) -> int:
    """Optimizer steps that Trainer takes over so many rows, in one process or several."""
    if train.max_steps is not None:
        return train.max_steps
    if (rewarded := train.rewarded) is not None:
        answers = train.per_device_train_batch_size * train.gradient_accumulation_steps * processes
        prompts = answers // rewarded.num_generations
        return math.ceil((train.num_train_epochs or 1.0) * math.ceil(rows / prompts) * rewarded.num_iterations)
    batches = math.ceil(math.ceil(rows / train.per_device_train_batch_size) / processes)
    return math.ceil((train.num_train_epochs or 1.0) * max(math.ceil(batches / train.gradient_accumulation_steps), 1))


def is_local(source: Sources) -> bool:
    """Whether the rows need no hub, as the run will see it: built-in sets, and names of files."""
    if not isinstance(source, str):
        return all(is_local(each.source) for each in source)
    return source.startswith("builtin:") or local_file(source) is not None
