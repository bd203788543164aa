"""`dude generate`: many prompts continued in batches, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.answer.decoding import Decoding
from dude_peft.artifact.durable import disk_errors, replace_file
from dude_peft.artifact.json_text import json_text
from dude_peft.chat.correct import check_answered, correct
from dude_peft.chat.kept import command_key, kept
from dude_peft.chat.prompts import as_json, encode_prompts, left_out, read_prompts
from dude_peft.data import parse_row
from dude_peft.data.clock import at
from dude_peft.errors import ConfigError, DataError, ResourceError
from dude_peft.kinds import checked
from dude_peft.model.load import require_known
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.html import table
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports

if TYPE_CHECKING:
    from dude_peft.answer.decode import Completion
    from dude_peft.data import Row

_MOST_SAMPLES = 10_000
# json leaves these as they are; some of them are commands to a terminal.
_CONTROL = re.compile("[\x7f-\x9f\u2028\u2029]")


class Completions(list[dict[str, Any]]):
    """Records {prompt, completion, finish}, in the order of the prompts; of left-out ones there is none."""

    def lines(self) -> bytes:
        """As JSON lines, in UTF-8; no terminal obeys anything in them."""
        return "".join(_line(record) for record in self).encode("utf-8")

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(name for record in self for name in record))
        return table("completions", [[record.get(name, "") for name in names] for record in self], names)


@checked
@at()
def generate(
    name: str | Path,
    prompts: Sequence[str] = (),
    *,
    file: str | Path | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    base: str | None = None,
    gguf_file: str | None = None,
    device_map: str | None = None,
    max_memory: Sequence[str] | None = None,
    base_too: bool = False,
    raw: bool = False,
    as_rows: bool = False,
    keep: str | None = None,
    samples: int = 1,
    template: str | None = None,
    special_tokens: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    quiet: bool = True,
) -> Completions:
    """Continue prompts in batches; returns a list of {prompt, completion, finish}, in order.

        for record in dude_peft.generate("runs/mine/adapter", ["What is 2 + 3?"], max_new_tokens=16):
            print(record["completion"])

    Args:
        name: folder or hub id of an adapter or a model, or `package:NAME` of a model.
        prompts: the prompts; without any, and without a file, they are lines of standard input.
        file: prompts: .txt, one a line, or rows as `train` reads them.
        limit: the first prompts of the file only.
        columns: what the file calls its columns, as data.columns.
        output: JSON lines are written there too; the same call again resumes.
        overwrite: replace an output that is there.
        base: base model of the adapter; None takes its own.
        gguf_file: the GGUF file that is the (base) model.
        device_map: `auto` spreads the model over GPUs, CPU and disk; a device has all of it; None is the fastest one.
        max_memory: the most that `auto` puts on a device, each as DEVICE=SIZE; None is what is free.
        base_too: add the base model's completion.
        raw: no template: continue the text as it is.
        as_rows: rows that `train` reads: prompt and completion alone.
        keep: of these rows only the `correct` ones: finished, with the final answer of the file's row, and no repeats.
        samples: completions of each prompt; needs a temperature.
        template: auto, chat or plain; None is as in the training run.
        special_tokens: what texts that spell them are: text, or allow; None is as in the training run.
        batch_size: prompts at a time.
        max_new_tokens: tokens of one completion at most.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draw from the likeliest tokens of this probability.
        seed: of the drawing.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, ArtifactError, NumericsError, ResourceError: see errors.py.
    """
    require_known(str(name))
    name = str(name)
    output = None if output is None else Path(output)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    decoding = Decoding(max_new_tokens, temperature, top_p, seed)
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: give a whole number of prompts from 1")
    if not 1 <= samples <= _MOST_SAMPLES or (samples > 1 and temperature == 0):
        raise ConfigError(
            f"--samples {shown(samples, 20)}: give a whole number from 1 to {_MOST_SAMPLES:,}; several samples need "
            "--temperature above 0"
        )
    if as_rows and (raw or base_too):
        raise ConfigError("--as-rows writes rows for dude train; leave --raw and --base-too out")
    if keep not in (None, "correct"):
        raise ConfigError(f"--keep {shown(keep, 40)}: there is one choice, correct")
    if keep is not None and (not as_rows or file is None or str(file).lower().endswith(".txt")):
        raise ConfigError("--keep correct needs --as-rows, and --file with rows that have answers to compare with")
    if raw and template is not None:
        raise ConfigError("--raw and --template exclude each other; give one of them")
    _check_output(output, overwrite)
    asked = read_prompts(prompts, None if file is None else str(file), limit, columns)
    if keep is not None:
        check_answered(asked)
    if as_rows and (seen := next((row for row in asked if row.pictures), None)) is not None:
        raise DataError(f"{seen.source}: --as-rows writes rows of text, and this row has an image; leave --as-rows out")
    rows = [row for row in asked for _ in range(samples)]
    with quiet_imports():
        from dude_peft.answer.decode import decode_all
        from dude_peft.answer.speaker import open_speaker

    notes = Display(stderr=True, quiet=quiet)
    with gathered_warnings(notes.warn):
        speaker = open_speaker(
            name, base=base, gguf_file=gguf_file, notes=notes, device_map=device_map, max_memory=max_memory
        )
        if base_too and not speaker.adapted:
            raise ConfigError(f"--base-too: {shown(name, 300)} is a model, not an adapter; leave --base-too out")
        written = None if raw else speaker.template(template, special_tokens)
        for line in left_out(rows, written):
            notes.warn(line)
        ids = encode_prompts(
            rows,
            speaker.tokenizer,
            written or speaker.control(special_tokens),
            vocabulary=speaker.vocabulary,
            positions=speaker.positions,
            new=max_new_tokens,
            sight=speaker.sight,
        )
        if batch_size > 1 and len(ids) > 1 and speaker.company_note:
            notes.say(f"note: {speaker.company_note}")
        found: list[list[Completion]] = []
        with contextlib.ExitStack() as stack:
            cache = None
            if output is not None:
                key = command_key(speaker, ids, decoding, batch_size)
                cache = stack.enter_context(kept(output, key, overwrite=overwrite))
                if len(cache):
                    notes.say(f"{len(cache)} completions are already done, from a command that was interrupted")
            advance = stack.enter_context(notes.stage("generating", len(rows) * (1 + base_too)))
            for as_base in (False, True) if base_too else (False,):
                how: dict[str, Any] = {"batch_size": batch_size, "base": as_base, "cache": cache, "advance": advance}
                found.append(decode_all(speaker, ids, decoding, **how))
            pairs = zip(rows, zip(*found, strict=True), strict=True)
            records = [_as_row(row, own) if as_rows else _record(row, (own, *base), raw) for row, (own, *base) in pairs]
            made = [record for record in records if record is not None]
            if keep is not None:
                kept_rows = correct(rows, found[0], records)
                made = kept_rows.records
            completions = Completions(made)
            if output is not None:
                with disk_errors(output), _unclaimed(output):
                    replace_file(output, completions.lines(), new=not overwrite)
    cut = sum(completion.finish == "length" for completion in found[0])
    counted = "1 completion" if len(rows) == 1 else f"{len(rows)} completions"
    notes.say(f"{counted}, {cut} of them cut at {max_new_tokens} tokens")
    if keep is not None:
        notes.say(kept_rows.told())
    if refused := records.count(None):
        notes.warn(f"left out: {refused} of {counted}, because they are empty or cannot be trained on")
    return completions


def _as_row(row: Row, completion: Completion) -> dict[str, Any] | None:
    """A training row; None where `data.train` would refuse it: an empty answer, a NUL character."""
    text, prompt = completion.text.strip(), as_json(row)
    record: dict[str, Any] = {"prompt": prompt, "completion": text}
    if not isinstance(prompt, str) or row.tools:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        record = {"messages": [*asked, {"role": "assistant", "content": text}]}
    if row.tools:
        record["tools"] = json.loads(row.tools)
    try:
        parse_row(record, row.source)
    except DataError:
        return None
    return record


def _record(row: Row, completions: Sequence[Completion], raw: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": as_json(row)}
    if row.tools:
        record["tools"] = json.loads(row.tools)
    for prefix, completion in zip(("", "base_"), completions, strict=False):
        record[f"{prefix}completion"] = completion.text if raw else completion.text.strip()
        record[f"{prefix}finish"] = completion.finish
    return record


def _line(record: dict[str, Any]) -> str:
    text = json_text(record, ensure_ascii=False)
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text) + "\n"


@contextlib.contextmanager
def _unclaimed(output: Path) -> Iterator[None]:
    """Within: a file that another command has made in the meantime is left alone."""
    try:
        yield
    except FileExistsError:
        raise ConfigError(f"output {shown(output, 300)} was made by another command; choose another name") from None


def _check_output(output: Path | None, overwrite: bool) -> None:
    """Before anything is loaded: that the file may be written, and is nobody's."""
    if output is None:
        return
    named = shown(output, 300)
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"output {named} is a folder, or its folder does not exist; give the name of a file")
    if (output.is_symlink() or output.exists()) and not overwrite:
        raise ConfigError(f"output {named} already exists; choose another name, or add --overwrite")
    if not os.access(output.parent, os.W_OK):
        raise ResourceError(
            f"output {named}: its folder is not writable; choose another folder, or change its permissions"
        )
