"""What `dude generate` continues: prompts from arguments, standard input or a file, each with a place to name."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dude_peft.chat.typed import is_typed, piped_lines
from dude_peft.data import Row, Template, load_rows, parse_row, prompt_ids
from dude_peft.data.columns import Columns
from dude_peft.data.control_tokens import ControlTokens
from dude_peft.data.encode import Counts, check_ids
from dude_peft.data.formats import Reading
from dude_peft.data.sight import Sight
from dude_peft.doors import open_file
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import shown


def read_prompts(
    arguments: Sequence[str], file: str | None, limit: int | None, columns: Mapping[str, str] | None = None
) -> list[Row]:
    """Rows whose prompt is wanted; the answer in them is not looked at, and need not be there.

    Args:
        arguments: prompts themselves.
        file: a .txt file with one prompt a line, or anything that `load_rows` reads.
        limit: number of prompts of a file; None takes all.
        columns: what the file calls its columns, as data.columns.

    Raises:
        ConfigError: no prompts, or two sources of them.
        DataError: an empty prompt, or a file that cannot be used.
    """
    if arguments and file is not None:
        raise ConfigError("prompts came both as arguments and with --file; give one of them")
    if limit is not None and (file is None or limit < 1):
        raise ConfigError(f"--limit {limit}: give a whole number of prompts from 1, together with --file")
    if arguments:
        return [_row(text, f"prompt {number}") for number, text in enumerate(arguments, start=1)]
    if file is not None:
        if PurePath(file).suffix.lower() == ".txt":
            return _lines_of(file)[:limit]
        return load_rows(file, limit=limit, reading=Reading(Columns(columns), questions=True))
    rows = [] if is_typed() else [_row(text, f"standard input:{number}") for number, text in piped_lines()]
    if not rows:
        raise ConfigError("no prompts; give them as arguments, with --file, or as lines on standard input")
    return rows


def as_json(row: Row) -> Any:
    """The prompt as the output names it: its text, or its messages where there are several, or more than texts."""
    if [(message.role, message.more, message.pictures) for message in row.prompt] == [("user", "", ())]:
        return row.prompt[0].content
    return [message.as_dict() if message.trained else {**message.as_dict(), "weight": 0} for message in row.prompt]


def left_out(rows: Sequence[Row], template: Template | None) -> list[str]:
    """A line for what of the rows is not in the prompts as it is, and one for special tokens that they spell.

    None where all is, or where `template` is None. Raises what `Template.prompts` raises.
    """
    if template is None:
        return []
    counts = Counts(rows=len(rows))
    for row, pieces in zip(rows, template.changes(rows), strict=True):
        counts.spelling += bool(pieces.spelt)
        counts.spelling_ends += bool(pieces.spelt and template.ends_in(row, row.prompt))
        counts.add_left_out(row, pieces)
    return [*counts.losses(0), *counts.spellings(template.special_tokens)]


def raw_ids(row: Row, tokenizer: Any, control: ControlTokens) -> list[int]:
    """Token ids of the prompt's text as it is, without a template and with no control token but those allowed.

    Raises:
        DataError: the prompt is a conversation, or spells a special token that the tokenizer cannot write as text.
    """
    if len(row.prompt) != 1 or row.tools or row.pictures:
        more = f"{' and tools' if row.tools else ''}{' and images' if row.pictures else ''}"
        what = f"{len(row.prompt)} message{'s' * (len(row.prompt) != 1)}{more}"
        raise DataError(f"{row.source}: {what}, but --raw takes one text; leave --raw out")
    ids = control.ids(row.prompt[0].content, (), row.source, framed=True)
    # Some tokenizers close every text with the end token; a prompt goes on.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_prompts(
    rows: Sequence[Row],
    tokenizer: Any,
    template: Template | ControlTokens,
    *,
    vocabulary: int,
    positions: int | None,
    new: int,
    sight: Sight | None = None,
) -> list[list[int]]:
    """Token ids of every prompt; of one with images, with these.

    Args:
        rows: the prompts.
        tokenizer: the model's.
        template: control tokens alone take the text as it is.
        vocabulary: number of rows of the model's embedding.
        positions: tokens that the model reads at most; None for no limit.
        new: tokens that are generated behind each.
        sight: how the model sees images; None where it does not.

    Raises:
        DataError: a prompt that is empty, too long, or has a token that the model does not know.
        ConfigError: a prompt and its answer are too long together.
    """
    encoded = []
    for row in rows:
        if isinstance(template, ControlTokens):
            ids = raw_ids(row, tokenizer, template)
        else:
            ids = prompt_ids(row, template, tokenizer, sight)
        if not ids:
            raise DataError(f"{row.source}: the prompt has no tokens; give it some text")
        check_ids(row.source, ids, tokenizer, vocabulary)
        if positions is not None and len(ids) >= positions:
            raise DataError(
                f"{row.source}: the prompt has {len(ids)} tokens, but the model can read only {positions}; shorten or "
                "remove it"
            )
        if positions is not None and len(ids) + new > positions:
            raise ConfigError(
                f"{row.source}: the prompt has {len(ids)} tokens, and {new} new ones exceed the model's {positions}; "
                f"lower --max-new-tokens to {positions - len(ids)}"
            )
        encoded.append(ids)
    return encoded


def _row(text: str, source: str) -> Row:
    return parse_row({"prompt": text, "completion": "."}, source)


def _lines_of(file: str) -> list[Row]:
    name = shown(file, 300)
    try:
        with open_file(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
            lines = [(number, line.rstrip("\n")) for number, line in enumerate(stream, start=1)]
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte offset {error.start} is not UTF-8 (Latin-1?); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({shown(error.strerror)}); check the path") from error
    rows = [_row(line, f"{name}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{name}: no prompts (the file is empty or has only blank lines); write one on each line")
    return rows
