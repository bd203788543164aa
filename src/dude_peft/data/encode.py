"""From text to token ids and labels: prompts are masked, answers and their ends are trained.

The pieces of a row (`template.Pieces`) are tokenised apart and joined, so that generation, which starts from the ids of
the pieces before an answer, sees exactly the prefix of training: tokenised together, the two could melt into one token
at the seam. (A SentencePiece tokenizer puts its word-begin mark before an answer, in training and generation alike.)

A row that does not fit into max_length is left out and counted, also where a part of its answer would fit: a cut answer
has no end, and a model trained on it learns not to stop. A conversation of which every answer is trained keeps the
turns that fit, and is counted as well. Of answers of which only the beginning is trained (`upft`, arXiv 2503.02875: the
first N tokens, or all that an answer has before its end) the rest is no part of the example, but where later turns need
it. Plain text is cut into blocks of nearly equal length, of which each begins as the tokenizer begins a text; nothing
of it is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dude_peft.data.formats import Row
from dude_peft.data.labels import IGNORE
from dude_peft.data.pictures import Picture
from dude_peft.data.sight import Seen, SeenPrompt, Shown, Sight
from dude_peft.data.template import Pieces, Template
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted

TRAIN_ON = ("answers", "last_answer", "all")
"""What is learned of a conversation: all answers, only the last, or every token, the prompts' too."""

BLIND = "the model has no processor (preprocessor_config.json) and reads text alone"
"""Why no image is read, where nothing else is said."""

_MOST_NAMES = 12
_MOST_COUNTED = 200  # rows may have a new name each
_BATCH_ROWS = 512
_BATCH_CHARACTERS = 4 * 2**20


class Example(NamedTuple):
    """One training example."""

    ids: list[int]
    trained: list[bool]
    """Of each token: whether it has a label. Never the first one's, which nothing predicts."""
    pictures: tuple[Picture, ...] = ()
    """The images that stand in it."""
    image_tokens: int = 0
    """Tokens in whose places the model puts them."""

    @property
    def labels(self) -> list[int]:
        """The ids of the trained tokens, IGNORE elsewhere."""
        return [token if learned else IGNORE for token, learned in zip(self.ids, self.trained, strict=True)]


@dataclass
class Counts:
    """What was counted on the way from rows to examples."""

    rows: int = 0
    """Rows read."""
    dropped: int = 0
    """Rows left out because they are longer than max_length."""
    truncated: int = 0
    """Those of the dropped rows of whose answer a part, but not the end, would have fitted."""
    identical: int = 0
    """Pairs left out because their two answers are the same."""
    unlearned: int = 0
    """Rows left out because the data set excludes all their answers from the loss."""
    shortened: int = 0
    """Conversations of which only the first turns fit; the others are left out."""
    spelling: int = 0
    """Rows that spell special tokens, as text or, where that is allowed, as the tokens."""
    spelling_ends: int = 0
    """Those of them that spell an end token, which as a token only the template may write."""
    last_only: int = 0
    """Conversations whose earlier answers could not be trained, because of the chat template."""
    tokens: int = 0
    """All tokens of the examples."""
    trained_tokens: int = 0
    """Tokens with a label."""
    ended: int = 0
    """Examples that end with a learned end token."""
    images: int = 0
    """Images of the examples."""
    image_tokens: int = 0
    """Tokens in whose places the model puts these."""
    used: dict[str, int] = field(default_factory=dict)
    """Columns, and keys of messages, with the number of rows that were made of them."""
    left_out: dict[str, int] = field(default_factory=dict)
    """The same of those that nobody reads, or that the template does not write."""
    longest: int = 0
    """Tokens of the longest row, dropped ones included: the max_length that would keep all. Blocks of text for text."""
    largest_id: int = 0
    """The largest token id."""

    def add_left_out(self, row: Row, pieces: Pieces) -> None:
        """Counts what of a row is not read, or not written as it is."""
        unwritten = (f"{what}, which the template does not write" for what in pieces.unwritten)
        _add(self.left_out, (*row.left_out, *unwritten))

    def losses(self, max_length: int) -> list[str]:
        """One line for each way in which rows or answers are not trained; empty where all are."""
        lines = []
        if self.left_out:
            listed = [f"{name} ({count} of {self.rows} rows)" for name, count in self.left_out.items()]
            more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
            lines.append(f"left out: {', '.join(listed[:_MOST_NAMES])}{more}")
        if self.dropped:
            lines.append(
                f"{self.dropped} of {self.rows} rows are longer than max_length {max_length} and are left out "
                f"({self.truncated} would lose only the end of their answer); the longest has {self.longest} tokens"
            )
        if self.unlearned:
            lines.append(
                f"{self.unlearned} of {self.rows} rows have nothing to learn and are left out: their weight, train or "
                "loss excludes every answer"
            )
        if self.identical:
            lines.append(
                f"{self.identical} of {self.rows} pairs are left out: their chosen and rejected answers are the same "
                "tokens"
            )
        if self.shortened:
            lines.append(
                f"{self.shortened} of {self.rows} conversations are longer than max_length {max_length}: their last "
                "turns are left out"
            )
        if self.last_only:
            lines.append(
                f"of {self.last_only} of {self.rows} conversations, only the last answer is trained: the chat "
                "template rewrites earlier ones, or writes them without an end"
            )
        return lines

    def spellings(self, special_tokens: str) -> list[str]:
        """One line where rows spell special tokens; `special_tokens` is what these are (`Template`)."""
        if not self.spelling:
            return []
        one = self.spelling == 1
        rows = f"{self.spelling} of {self.rows} rows {'spells' if one else 'spell'} special tokens"
        if special_tokens == "allow":
            return [f"{rows}; they are read as those tokens (special_tokens: allow)"]
        if self.spelling_ends:
            return [f"{rows}, which are plain text there"]
        return [f"{rows}, which are plain text there; special_tokens: allow reads them as tokens"]


@dataclass(frozen=True)
class EncodedSet:
    """Token ids of the rows that fit, unpadded, and what was counted on the way."""

    examples: list[dict[str, Any]]
    """`input_ids`, `attention_mask`, `labels` of each row kept, in order, all of one length a row; `shown`, its images.
    """
    dropped: int
    """Rows left out because they are longer than max_length."""
    truncated: int
    """Those of the dropped rows of whose answer a part, but not the end, would have fitted."""
    tokens: int
    """All tokens of the examples."""
    trained_tokens: int
    """Tokens with a label: the answers with their ends."""
    longest: int
    """Tokens of the longest row, dropped ones included: the max_length that would keep all."""


def prompt_ids(row: Row, template: Template, tokenizer: Any, sight: Sight | None = None) -> list[int]:
    """The ids that generation starts from: the prefix, id for id, of the row's training example.

    Of a row with images it is a `SeenPrompt`, made by `sight`.

    Raises DataError for plain text, which asks nothing, and for images without `sight`; ConfigError where the template
    writes nothing before the answer; and what `Template.pieces` and `Sight.seen` raise.
    """
    if row.is_text:
        raise DataError(f"{row.source}: plain text has no question to answer; set evaluation.enabled: false")
    begin = _begin(tokenizer) if template.kind == "plain" else []
    prompts, seen = _seen([row], template.prompts([row]), sight, BLIND)
    (pieces,) = _tokenised([row], prompts, template, tokenizer)
    ids = [*begin, *itertools.chain.from_iterable(pieces)]
    if sight is not None:
        sight.check(row, ids, 0 if seen[0] is None else sum(seen[0].tokens))
    if sight is not None and seen[0] is not None:
        ids = SeenPrompt(ids, Shown(row.pictures, sight, row.source))
    if not ids:
        raise ConfigError(
            f"{row.source}: the template writes nothing before the answer, but a model needs at least one token; use "
            "template: plain"
        )
    return ids


def judged_ids(rows: Sequence[Row], template: Template, tokenizer: Any) -> list[list[int]]:
    """The ids of conversations whose last answers a model gave: id for id those of the same rows in training.

    Raises what `Template.judged` raises.
    """
    begin = _begin(tokenizer) if template.kind == "plain" else []
    tokenised = _tokenised(rows, template.judged(rows), template, tokenizer)
    return [[*begin, *itertools.chain.from_iterable(pieces)] for pieces in tokenised]


def encode(
    rows: Sequence[Row],
    template: Template,
    tokenizer: Any,
    max_length: int,
    *,
    train_on: str = "answers",
    upft: int | None = None,
    vocab_size: int | None = None,
    shortens: bool = True,
    sight: Sight | None = None,
    blind: str = BLIND,
) -> EncodedSet:
    """Token ids and labels, in memory, of the rows that fit into `max_length` tokens.

    `vocab_size` is the number of rows of the model's embedding: an id beyond it is refused; None checks nothing.
    `shortens` keeps the turns that fit of a conversation that is too long. `sight` and `blind` are the encoder's.

    Raises:
        DataError: no rows, none that fits, a token the model does not have, and what `Template.pieces` raises.
        ConfigError: a wrong max_length or train_on, or a tokenizer or chat template that cannot be trained with.
    """
    how: dict[str, Any] = {"train_on": train_on, "upft": upft, "shortens": shortens, "sight": sight, "blind": blind}
    encoder = Encoder(template, tokenizer, max_length=max_length, **how)
    if not rows:
        raise DataError("no rows to encode; check the data set and its limit")
    examples: list[dict[str, Any]] = []
    for row, made in encoder.examples(rows):
        for example in made:
            check_ids(row.source, example.ids, tokenizer, vocab_size)
            mask = [1] * len(example.ids)
            examples.append({"input_ids": example.ids, "attention_mask": mask, "labels": example.labels})
            if example.pictures and sight is not None:
                examples[-1]["shown"] = Shown(example.pictures, sight, row.source)
    counts = encoder.counts
    encoder.check_any(len(examples))
    return EncodedSet(examples, counts.dropped, counts.truncated, counts.tokens, counts.trained_tokens, counts.longest)


@dataclass
class Encoder:
    """Turns rows into examples and counts.

    Raises ConfigError for a wrong max_length or train_on.
    """

    template: Template
    tokenizer: Any
    max_length: int
    train_on: str
    upft: int | None = None
    shortens: bool = True
    """Of a conversation that is too long, the turns that fit are kept."""
    sight: Sight | None = None
    """How the model sees images; None refuses rows that have some."""
    blind: str = BLIND
    """Why there is none, for the message."""
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 2:
            raise ConfigError(f"max_length is {quoted(self.max_length)}; give a whole number of tokens from 2")
        if self.train_on not in TRAIN_ON:
            raise ConfigError(f"train_on is {quoted(self.train_on)}; use {', '.join(TRAIN_ON)}")
        if self.upft is not None and (self.upft < 1 or self.train_on == "all"):
            raise ConfigError(
                f"upft is {self.upft}; give a whole number of tokens from 1, together with train_on: answers"
            )
        self._begin = _begin(self.tokenizer)
        self.ends = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids(self.template.turn_end)}
        if len(self._begin) > self.max_length - 2:
            raise ConfigError(
                f"max_length is {self.max_length}, but the tokenizer itself adds {len(self._begin)} tokens; raise it"
            )

    def examples(self, rows: Iterable[Row]) -> Iterator[tuple[Row, list[Example]]]:
        """Each row and its examples: one, none where it does not fit, several of plain text. Memory stays bounded.

        Raises what `Template.pieces` raises; ConfigError where the tokenizer does not know an end token as one token.
        """
        for batch in _batches(rows):
            pieces, seen = _seen(batch, self.template.pieces(batch), self.sight, self.blind)
            tokenised = _tokenised(batch, pieces, self.template, self.tokenizer)
            for row, each, sights, ids in zip(batch, pieces, seen, tokenised, strict=True):
                self.counts.spelling += bool(each.spelt)
                self.counts.spelling_ends += bool(each.spelt and self.template.ends_in(row, row.messages))
                if self.sight is not None:
                    wanted = 0 if sights is None else sum(sights.tokens)
                    self.sight.check(row, [*itertools.chain.from_iterable(ids)], wanted)
                made = self._text(row, ids[0]) if row.is_text else self._conversation(row, each, ids, sights)
                self._count(made)
                _add(self.counts.used, row.used)
                self.counts.add_left_out(row, each)
                yield row, made

    def check_any(self, made: int, name: str = "") -> None:
        """Raises DataError, beginning with `name`, where no example was made of the rows read."""
        if not made and self.counts.identical == self.counts.rows:
            raise DataError(
                f"{name}in all {self.counts.rows} pairs the chosen and the rejected answer are the same; give two "
                "different answers"
            )
        if not made and self.counts.unlearned == self.counts.rows:
            raise DataError(
                f"{name}none of the {self.counts.rows} rows has an answer to learn: weight, train or loss excludes "
                "every one; remove it from the answers to learn"
            )
        if not made:
            raise DataError(
                f"{name}none of the {self.counts.rows} rows fits into max_length {self.max_length}; the longest needs "
                f"{self.counts.longest} tokens; raise max_length"
            )

    def _conversation(self, row: Row, pieces: Pieces, ids: list[list[int]], seen: Seen | None) -> list[Example]:
        self._check_ends(row, ids[1::2])
        if not row.is_learned:
            self.counts.unlearned += 1
            return []
        if self.template.kind == "plain":  # a chat template writes its own special tokens
            ids = [[*self._begin, *ids[0]], *ids[1:]]
        counts = self.counts
        learned = self._learned(row, pieces, len(ids))
        lengths = [len(part) for part in ids]
        kept = [self._beginning(part) for part in ids]

        def needed(pieces: int) -> int:
            return sum(lengths[: pieces - 1]) + kept[pieces - 1]

        used = len(ids)
        counts.longest = max(counts.longest, needed(used))
        counts.last_only += self.train_on == "answers" and not pieces.whole
        if needed(used) > self.max_length and self.train_on == "answers" and self.shortens:
            # An even number of pieces ends with an answer.
            fitting = [n for n in range(2, used, 2) if learned[n - 1] and needed(n) <= self.max_length]
            if fitting:
                counts.shortened += 1
                used = fitting[-1]
        if needed(used) > self.max_length:
            counts.dropped += 1
            counts.truncated += sum(lengths[: used - 1]) < self.max_length
            return []
        # Labels come from the pieces' lengths, never from comparing ids with the pad token: where pad is the end token
        # (the common choice, and SmolLM2's own), that would mask the end and it would never be learned.
        trained: list[bool] = []
        for place, part in enumerate(ids[:used]):
            trained += [learned[place]] * kept[place] + [False] * (len(part) - kept[place])
        trained[0] = False
        if not any(trained):
            raise DataError(f"{row.source}: the answer is empty, so upft has no token to train; remove the row")
        whole = [*itertools.chain.from_iterable(ids[:used])][: needed(used)]
        trained = trained[: needed(used)]
        if seen is None:
            return [Example(whole, trained)]
        # No image is cut: the pieces that are left out are whole, and only answers, which have none, are shortened.
        trained = [learn and token not in seen.never_learned for token, learn in zip(whole, trained, strict=True)]
        return [Example(whole, trained, row.pictures[: sum(seen.images[:used])], sum(seen.tokens[:used]))]

    def _learned(self, row: Row, pieces: Pieces, count: int) -> list[bool]:
        """Of each piece whether it is learned, by train_on and by what the row excludes."""
        if self.train_on == "last_answer":
            return [place == count - 1 for place in range(count)]
        excluded = sum(not message.trained for message in row.messages)
        if self.train_on == "all" and excluded != pieces.learned.count(False):
            raise DataError(
                f"{row.source}: train_on: all cannot leave out a single message, as this row asks; use train_on: "
                "answers"
            )
        answers = iter(pieces.learned)
        return [next(answers) if place % 2 else self.train_on == "all" for place in range(count)]

    def _beginning(self, part: list[int]) -> int:
        """How many tokens of an answer are learned: all, or `upft`, but none of its end."""
        if self.upft is None:
            return len(part)
        return next((n for n, token in enumerate(part[: self.upft]) if token in self.ends), min(self.upft, len(part)))

    def _text(self, row: Row, ids: list[int]) -> list[Example]:
        if self.upft is not None:
            raise DataError(
                f"{row.source}: plain text has no answer, and upft trains the beginning of an answer; remove the row"
            )
        return list(self._blocks(ids))

    def _blocks(self, ids: list[int]) -> Iterator[Example]:
        """Blocks of at most max_length tokens, with the tokenizer's beginning, none much shorter than the others."""
        begin = self._begin
        room = self.max_length - len(begin)
        count = -(-len(ids) // room)
        cuts = [len(ids) * n // count for n in range(count + 1)] if count else []
        for start, stop in itertools.pairwise(cuts):
            block = [*begin, *ids[start:stop]]
            self.counts.longest = max(self.counts.longest, len(block))
            if len(block) > 1:
                trained = [False] * len(begin) + [True] * (stop - start)
                trained[0] = False
                yield Example(block, trained)

    def _count(self, made: list[Example]) -> None:
        counts = self.counts
        counts.rows += 1
        for example in made:
            counts.tokens += len(example.ids)
            counts.trained_tokens += sum(example.trained)
            counts.ended += example.ids[-1] in self.ends
            counts.images += len(example.pictures)
            counts.image_tokens += example.image_tokens
            counts.largest_id = max(counts.largest_id, *example.ids)

    def _check_ends(self, row: Row, answers: Sequence[list[int]]) -> None:
        ends = [*[self.template.turn_end] * (len(answers) - 1), self.tokenizer.eos_token]
        told = ends if self.template.closes else ends[:-1]
        for answer, end in zip(answers, told, strict=self.template.closes):
            token = self.tokenizer.convert_tokens_to_ids(end)
            if not answer or answer[-1] != token:
                raise ConfigError(
                    f"{row.source}: the tokenizer does not encode its own end token {quoted(end)} as one token (id "
                    f"{token}); add it to the tokenizer as a special token"
                )


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(message.content) + len(message.more) for message in row.messages) + len(row.tools)
        if len(batch) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _add(counted: dict[str, int], names: Iterable[str]) -> None:
    for name in names:
        if name in counted or len(counted) < _MOST_COUNTED:
            counted[name] = counted.get(name, 0) + 1


def _seen(
    rows: Sequence[Row], pieces: Sequence[Pieces], sight: Sight | None, blind: str
) -> tuple[list[Pieces], list[Seen | None]]:
    """The pieces of rows, images as tokens, and what was seen of each row that has some."""
    seen: list[Seen | None] = []
    for row, each in zip(rows, pieces, strict=True):
        if row.pictures and sight is None:
            raise DataError(f"{row.source}: the row has an image, but {blind}; remove the image")
        seen.append(sight.seen(row, each) if row.pictures and sight is not None else None)
    return [each if found is None else found.pieces for each, found in zip(pieces, seen, strict=True)], seen


def _tokenised(
    rows: Sequence[Row], pieces: Sequence[Pieces], template: Template, tokenizer: Any
) -> list[list[list[int]]]:
    """Ids of each row's pieces, each piece tokenised apart; in one call, but for those that hide something."""
    control = template.control
    texts = [text for each in pieces if each.hidden is None for text in each.texts]
    ids = iter(_ids_of(texts, tokenizer) if texts else [])
    tokenised = []
    for row, each in zip(rows, pieces, strict=True):
        own = []
        for text, revealed in zip(each.texts, each.revealed, strict=True):
            ordinary = list(next(ids)) if each.hidden is None else None
            if ordinary is None or not control.heard(text, ordinary):
                ordinary = control.ids(revealed, control.spans(text), row.source)
            own.append(ordinary)
        tokenised.append(own)
    return tokenised


def _ids_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,  # no warning about its model_max_length: ours is checked
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _begin(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text, such as <s>; what it puts behind one is no part of a prompt."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    ids = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    starts = (n for n in range(len(ids) - len(bare) + 1) if ids[n : n + len(bare)] == bare)
    return ids[: next(starts, 0)]


def check_ids(where: str, ids: Sequence[int], tokenizer: Any, vocab_size: int | None) -> None:
    """Raises DataError, beginning with `where`, for a token that a model of so many entries does not have."""
    if vocab_size is None or not ids or max(ids) < vocab_size:
        return
    bad = max(ids)
    token = quoted(tokenizer.convert_ids_to_tokens(bad))
    raise DataError(
        f"{where}: token {token} has id {bad}, but the model's vocabulary has {vocab_size} entries; "
        "use the tokenizer that belongs to the model"
    )
