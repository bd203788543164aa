"""`dude data check`: what a run would learn of a data set, before it costs anything; needs a tokenizer, no weights."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from pydantic import ValidationError
from rich.text import Text

from dude_peft.config.schema import CurriculumSection, KtoSection, ModelSection
from dude_peft.data.chat_template import chat_template as own_template
from dude_peft.data.clock import at
from dude_peft.data.columns import Columns
from dude_peft.data.encode import Counts
from dude_peft.data.formats import Reading
from dude_peft.data.held_out import held_out_questions, part_of
from dude_peft.data.objectives import KINDS, PAIRED
from dude_peft.data.prepare import prepare
from dude_peft.data.rows import stream_rows
from dude_peft.data.template import Template
from dude_peft.data.token_set import TokenSet, overlap, shared_images
from dude_peft.errors import ConfigError
from dude_peft.kinds import checked
from dude_peft.model.load import load_tokenizer, locate, with_only_gguf
from dude_peft.model.processor import sight_of
from dude_peft.show import quoted, shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.html import table
from dude_peft.terminal.next_steps import tell_next
from dude_peft.terminal.numbers import number
from dude_peft.terminal.quiet import quiet_imports
from dude_peft.training.data_section import data_section
from dude_peft.training.label_balance import told_of_held_out, told_of_labels
from dude_peft.training.run_data import seeing

if TYPE_CHECKING:
    from dude_peft.training.curriculum import Curriculum

_SHAPE_ROWS = 1000
_SAMPLES = 3
_SAMPLE_TOKENS = 300


@dataclass(frozen=True)
class DataReport:
    """What a run would learn of a data set."""

    formats: tuple[str, ...]
    """Of the first rows, the most frequent first."""
    template: str
    """chat or plain."""
    rows: int
    examples: int
    duplicates: int
    """Examples that another one repeats."""
    questions: int
    """Different ones that the examples ask."""
    tokens: int
    trained_tokens: int
    lengths: tuple[int, int, int, int]
    """Tokens of an example: least, median, 95 % at most, most."""
    ended: int
    """Examples whose end is learned."""
    used: dict[str, int]
    """Columns that are used, and in how many rows."""
    left_out: tuple[str, ...]
    """Lines on what is cut, dropped or not used."""
    held_out: int | None
    """Held-out examples; None where no test was given."""
    overlap: int
    """Held-out examples that ask what a training example asks."""
    samples: tuple[str, ...]
    """Some examples, trained tokens between « and »; of pairs, the chosen conversation and the rejected one in turn."""
    margins: tuple[int, int, int] | None = None
    """Of pairs, by how many judged tokens the chosen answer is longer: least, median, most."""
    identical: int = 0
    """Pairs left out because their two answers are the same."""
    wanted: int | None = None
    """Of labelled answers, how many have the label true."""
    stages: dict[str, Any] | None = None
    """Of `stages`, what a curriculum by length would make of the examples, as in report.json."""
    images: int = 0
    """Images of the examples."""
    image_tokens: int = 0
    """Tokens in whose places the model puts these."""

    def _repr_html_(self) -> str:
        least, middle, high, most = self.lengths
        facts = [
            ("format", ", ".join(self.formats)),
            ("template", self.template),
            ("rows; examples; duplicates", f"{self.rows:,}; {self.examples:,}; {self.duplicates:,}"),
            ("tokens, trained", f"{self.tokens:,}, {self.trained_tokens:,}"),
            ("tokens of an example", f"{least} to {most}, median {middle}, 95 % have at most {high}"),
            ("answers with a trained end", f"{self.ended:,} of {self.examples:,} examples"),
            *(("left out", line) for line in self.left_out),
        ]
        if self.margins is not None:
            low, usual, top = self.margins
            facts.append(("chosen answers are longer by", f"{low} to {top} tokens, median {usual}"))
        if self.wanted is not None:
            facts.append(("labels", f"{self.wanted:,} true, {self.examples - self.wanted:,} false"))
        if self.images:
            facts.append(("images; their tokens", f"{self.images:,}; {self.image_tokens:,}"))
        if self.held_out is not None:
            facts.append(("held-out", f"{self.held_out:,} examples, {self.overlap:,} with a question of training"))
        return table("data", facts) + table("examples", [(sample,) for sample in self.samples])


@checked
@at()
def check_data(
    source: str | os.PathLike[str],
    model: str,
    *,
    gguf_file: str | None = None,
    test: str | float | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    template: str = "auto",
    chat_template: str | None = None,
    max_length: int = 512,
    special_tokens: str = "text",
    train_on: str = "answers",
    upft: int | None = None,
    objective: str = "sft",
    stages: int | Sequence[float] | None = None,
    streaming: bool = False,
    quiet: bool = True,
) -> DataReport:
    """Show what a run would learn from a data set: examples with the trained tokens marked, and what is left out.

        report = dude_peft.check_data("mine.jsonl", "my-model", test=0.1)
        print(report.examples, report.left_out)

    Args:
        source: a file, `builtin:word-problems`, or a hub id.
        model: whose tokenizer reads it, as in a run's configuration.
        gguf_file: the GGUF file in it, where it is one.
        test: held-out rows to compare, or a share of the rows, as 0.1.
        columns: what the data calls its columns, as data.columns.
        seed: which rows a share takes.
        template: auto, chat or plain.
        chat_template: a template of your own, as data.chat_template: FILE.jinja, or its text.
        max_length: tokens that an example may have.
        special_tokens: text or allow, as data.special_tokens.
        train_on: answers, last_answer or all.
        upft: tokens of each answer that are trained, as data.upft.
        objective: which rows are wanted, as train.objective: pairs of answers for dpo, orpo, cpo and reward, answers
            with a label for kto.
        stages: stages by length, as train.curriculum.stages: a number, or the most tokens of each.
        streaming: keep no copy of hub data sets on this disk, as data.streaming.
        quiet: print nothing.

    Raises:
        DataError: rows that cannot be trained on.
        ConfigError: a wrong option, tokenizer or template.
        ResourceError: the cache cannot be written.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError("source: rows are read from a file; write them into a .jsonl file, one JSON object a line")
    source, test = str(source), None if test is None else str(test)
    if not model:
        raise ConfigError("--model is empty; give a folder, a hub id or package:NAME")
    if objective not in KINDS:
        raise ConfigError(f"--objective {quoted(objective)}: choose {', '.join(KINDS)}")
    kind = KINDS[objective]
    curriculum = None if stages is None else _curriculum(stages, objective, max_length)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed}: give a whole number from 0 to 2**32 - 1")
    display = Display(quiet=quiet)
    section = with_only_gguf(ModelSection(name_or_path=model, gguf_file=gguf_file or None))
    where = locate(section)
    names = Columns(columns)
    own = None if chat_template is None else _own_template(chat_template, template)
    share = None if test is None else _share(test)
    shapes = _shapes(source, Reading(names, kind=kind, streaming=streaming))
    with quiet_imports():
        tokenizer = load_tokenizer(section, where, own)
        sight = sight_of(section, where, tokenizer)
    written = Template(tokenizer, template, special_tokens)
    options: dict[str, Any] = {"max_length": max_length, "train_on": train_on, "columns": names.mapping}
    options |= {"kind": kind, "streaming": streaming, **seeing(objective, sight)}
    held_out = None
    with display.waiting("reading"):
        made = prepare(source, written, tokenizer, upft=upft, **options)
        if share is not None:
            questions = held_out_questions(made, share, seed)
            held_out = part_of(prepare(source, written, tokenizer, **options), questions, held_out=True)
            made = part_of(made, questions, held_out=False)
        elif test is not None:
            held_out = prepare(test, written, tokenizer, split="test", **options)
    display.say(f"format: {', '.join(shapes)}")
    display.say(f"template: {written.kind}; {_ends(written, tokenizer)}")
    lengths = _lengths(made)
    margins = _margins(made) if kind in PAIRED else None
    for line in _numbers(made, lengths, max_length, margins, scored=kind == "scores"):
        display.say(line)
    wanted = int(made.labels.sum()) if kind == "labels" else None
    if wanted is not None:
        display.say(f"labels: {wanted:,} true, {len(made) - wanted:,} false")
    if made.counts.used:
        display.say(f"used: {', '.join(f'{name} ({count})' for name, count in made.counts.used.items())}")
    left_out, asked = [*made.losses(max_length), *made.counts.spellings(special_tokens)], 0
    if kind == "labels":
        left_out += told_of_labels(made, KtoSection())
    if held_out is not None and share is None:
        lines = [*held_out.losses(max_length), *held_out.counts.spellings(special_tokens)]
        lines += told_of_held_out(held_out) if kind == "labels" else []
        left_out += [f"held-out: {line}" for line in lines]
    for line in left_out:
        display.warn(line)
    by_length = None if curriculum is None else _by_length(curriculum, made)
    for line in [] if by_length is None else by_length.told():
        display.say(line)
    for line in [] if by_length is None else by_length.doubts():
        display.warn(line)
    if held_out is not None:
        asked = overlap(made, held_out)
        line = f"{asked} of {len(held_out)} held-out examples repeat the question of a training example"
        (display.warn if asked else display.say)(line)
        if known := shared_images(made, held_out):
            display.warn(f"{known} of {len(held_out)} held-out examples show an image of a training example")
    shown_examples = sorted({0, len(made) // 2, len(made) - 1})[:_SAMPLES]
    for index in shown_examples:
        for name, side in _sides(made[index]):
            label = f", labelled {str(bool(made.labels[index])).lower()}" if kind == "labels" else ""
            display.say(f"\n{name} {index + 1}{label}, {made.source(index)}; {_legend(display)}:")
            display.console.print(_marked(side, tokenizer, colour=_coloured(display)), soft_wrap=True)
    settings = {"train": source, "test": test if share is None else share, "columns": names.mapping, "seed": seed}
    settings |= {"template": written.kind, "special_tokens": special_tokens, "train_on": train_on}
    settings["chat_template"] = chat_template
    display.say("\nfor CONFIG.yaml:")
    asks = _questions(made)
    display.say(data_section({**settings, "upft": upft, "max_length": max_length}, asks, objective, stages))
    words = ["--model", model, *([] if gguf_file is None else ["--gguf-file", gguf_file])]
    words += [] if objective == "sft" else ["--objective", objective]
    words += [word for ours, theirs in names.mapping.items() for word in ("--column", f"{ours}={theirs}")]
    tell_next(display, ["config", "new", str(source), *words, "-o", "run.yaml"], ["train", "run.yaml"])
    return DataReport(
        formats=tuple(shapes),
        template=written.kind,
        rows=made.counts.rows,
        examples=len(made),
        duplicates=made.duplicates,
        questions=asks,
        tokens=made.counts.tokens,
        trained_tokens=made.counts.trained_tokens,
        lengths=lengths,
        ended=made.counts.ended,
        used=dict(made.counts.used),
        left_out=tuple(left_out),
        held_out=None if held_out is None else len(held_out),
        overlap=asked,
        samples=tuple(
            _marked(side, tokenizer, colour=False).plain for index in shown_examples for _, side in _sides(made[index])
        ),
        margins=margins,
        identical=made.counts.identical,
        wanted=wanted,
        stages=None if by_length is None else by_length.record(),
        images=made.counts.images,
        image_tokens=made.counts.image_tokens,
    )


def _curriculum(stages: int | Sequence[float], objective: str, max_length: int) -> CurriculumSection:
    """The section that these stages would be of. ConfigError where there is none."""
    if objective not in ("sft", "grpo"):
        raise ConfigError(f"--stages: train.curriculum is for sft and grpo, not {objective}; leave it out")
    try:
        section = CurriculumSection(by="length", stages=stages if isinstance(stages, int) else list(stages))
    except ValidationError as error:
        first = error.errors()[0]["msg"].removeprefix("Value error, ").partition(": ")
        raise ConfigError(f"--stages: {first[2] or first[0]}") from error
    if not isinstance(section.stages, int) and section.stages[-1] < max_length:
        raise ConfigError(
            f"--stages: the last bound, {section.stages[-1]:g}, leaves longer rows without a stage; raise it to "
            f"--max-length {max_length}"
        )
    return section


def _by_length(section: CurriculumSection, made: TokenSet) -> Curriculum:
    import numpy as np

    from dude_peft.training.curriculum import staged

    return staged(section, made.lengths.astype(np.float64))


def _own_template(given: str, kind: str) -> str:
    if kind == "plain":
        raise ConfigError("--chat-template has no effect beside --template plain; leave one of them out")
    try:
        return own_template(given)
    except ConfigError as error:
        raise ConfigError(f"--chat-template: {error}") from error


def _share(test: str) -> float | None:
    """The share that is held out, where `test` is a number."""
    try:
        float(test)
    except ValueError:
        return None
    try:
        share = number(test)
    except typer.BadParameter as error:
        raise ConfigError(f"--test {error.message}; if it is a file, write ./ before its name") from error
    if not 0 < share < 1:
        raise ConfigError(f"--test {shown(test)}: a share is between 0 and 1; write for example 0.1, or give a file")
    return share


def _shapes(source: str, reading: Reading) -> list[str]:
    """The shapes of the first rows, the most frequent first."""
    rows = itertools.islice(stream_rows(source, reading=reading), _SHAPE_ROWS)
    return [name for name, _ in Counter(row.shape or "built-in" for row in rows).most_common()]


def _ends(template: Template, tokenizer: Any) -> str:
    ends = f"the end token is {quoted(tokenizer.eos_token)}"
    if template.turn_end != tokenizer.eos_token:
        ends += f", an answer ends with {quoted(template.turn_end)}"
    return ends


def _questions(made: TokenSet) -> int:
    import numpy as np

    return len(np.unique(made.prompts()))


def _lengths(made: TokenSet) -> tuple[int, int, int, int]:
    import numpy as np

    least, middle, high, most = (int(np.percentile(made.lengths, part, method="higher")) for part in (0, 50, 95, 100))
    return least, middle, high, most


def _margins(made: TokenSet) -> tuple[int, int, int]:
    import numpy as np

    least, middle, most = (int(np.percentile(made.margins, part, method="nearest")) for part in (0, 50, 100))
    return least, middle, most


def _sides(example: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What is shown of an example: itself, or the two conversations of a pair."""
    if "rejected_labels" not in example:
        return [("example", example)]
    worse = {name: example[f"rejected_{name}"] for name in ("input_ids", "labels")}
    return [("chosen", example), ("rejected", worse)]


def _numbers(
    made: TokenSet,
    lengths: tuple[int, int, int, int],
    max_length: int,
    margins: tuple[int, int, int] | None,
    *,
    scored: bool,
) -> list[str]:
    counts: Counts = made.counts
    least, middle, high, most = lengths
    lines = [
        f"rows: {counts.rows:,}; examples: {len(made):,}; duplicates: {made.duplicates:,}",
        f"tokens: {counts.tokens:,}, {counts.trained_tokens:,} of them trained; an example has {least} to "
        f"{most} (median {middle}, 95 % have at most {high}); max_length is {max_length}",
        f"answers with a trained end: {counts.ended:,} of {len(made):,} examples",
    ]
    if scored:
        lines[2] = "scores: read at the last token of each conversation, as the template writes it"
    if counts.images:
        seen = int((made.images > 0).sum())
        lines.append(
            f"images: {counts.images:,} in {seen:,} of {len(made):,} examples, {counts.image_tokens:,} of the tokens, "
            "none of them trained"
        )
    if margins is not None:
        low, usual, top = margins
        longer = int((made.margins > 0).sum())
        lines[1] = (
            f"tokens: {counts.tokens:,}, {counts.trained_tokens:,} of them judged; a pair has {least} to {most} in its "
            f"two conversations (median {middle}, 95 % have at most {high}); the longest conversation has "
            f"{made.longest}, max_length is {max_length}"
        )
        lines.append(
            f"pairs: {len(made):,}; {counts.identical:,} left out as identical; the chosen answer is longer in "
            f"{longer:,}, by {low} to {top} tokens (median {usual})"
        )
    return lines


def _coloured(display: Display) -> bool:
    return display.console.is_terminal and display.console.color_system is not None


def _legend(display: Display) -> str:
    return "trained tokens are green" if _coloured(display) else "trained tokens are between « and »"


def _decoded(ids: list[int], tokenizer: Any, marks: frozenset[int]) -> str:
    """The text of ids; of an image's tokens one, and their number."""
    texts = []
    for image, same in itertools.groupby(ids, key=lambda token: token if token in marks else None):
        run = list(same)
        text = tokenizer.decode(run[:1] if image is not None else run, clean_up_tokenization_spaces=False)
        texts.append(f"{text}×{len(run)}" if image is not None and len(run) > 1 else text)
    return "".join(texts)


def _marked(example: dict[str, Any], tokenizer: Any, *, colour: bool) -> Text:
    """The text of an example, trained stretches marked, control characters escaped; of a long one head and tail."""
    ids, labels = example["input_ids"], example["labels"]
    marks = example["shown"].sight.marks if "shown" in example else frozenset()
    half = _SAMPLE_TOKENS // 2
    parts = [range(len(ids))] if len(ids) <= 2 * half else [range(half), range(len(ids) - half, len(ids))]
    text = Text()
    for part in parts:
        if part.start:
            text.append("\n…\n")
        for trained, group in itertools.groupby(part, key=lambda place: labels[place] == ids[place]):
            decoded = _decoded([ids[place] for place in group], tokenizer, marks)
            safe = "\n".join(shown(line, None) for line in decoded.split("\n"))
            text.append(f"«{safe}»" if trained and not colour else safe, style="green" if trained else "dim")
    return text
