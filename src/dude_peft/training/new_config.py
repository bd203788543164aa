"""`dude config new`: the configuration of a run on somebody's rows, written after looking at them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from dude_peft.artifact.durable import disk_errors, replace_file
from dude_peft.errors import ConfigError
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.next_steps import tell_next
from dude_peft.training.data_check import DataReport, check_data
from dude_peft.training.data_section import held_out_share

_BUILTIN = "builtin:word-problems"  # has rows of its own to hold out
_EPOCHS, _BATCH, _ACCUMULATION = 3, 4, 2
_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
_TEXT = """\
# {title}{left_out}
# Every key: dude config explain. What the run needs: dude plan {file}

model:
  name_or_path: {model}{gguf}

adapter:
  method: dude               # dude, dora, pissa, lora, rslora
  r: 16                      # rank: a higher rank can learn more, but costs more
  target_modules: all-linear

data:
  train: {source}{columns}{test}
  max_length: {max_length}            # tokens; {lengths}

train:{objective}
  num_train_epochs: {epochs}
  per_device_train_batch_size: {batch}
  gradient_accumulation_steps: {accumulation}
  save_steps: {save_steps:<15}# steps between checkpoints; an interrupted run resumes

evaluation:
  {evaluation}

output_dir: {output_dir}
"""


def new_config(
    source: str,
    model: str,
    *,
    gguf_file: str | None = None,
    columns: Mapping[str, str] | None = None,
    objective: str = "sft",
    output: Path | None = None,
) -> str:
    """The YAML of a run, and a file of it. What of the rows it would leave out is told.

    Args:
        source: the rows, as for `check_data`.
        model: as in a run's configuration.
        gguf_file: the GGUF file in it, where it is one.
        columns: what the data calls its columns.
        objective: what the run learns from them, as train.objective; `mol` needs general rows, which are not looked at.
        output: file that is written, where there is none yet.

    Raises:
        ConfigError: the output is there already, or the model has no tokenizer.
        DataError: rows that cannot be trained on.
    """
    if output is not None:
        if not output.parent.is_dir():
            raise ConfigError(f"output {shown(output, 300)}: no such folder; create it, or choose another name")
        if output.exists() or output.is_symlink():
            raise _taken(output)
    if objective == "mol":
        raise ConfigError("--objective mol: write it for sft, then add train.objective: mol and data.general")
    looked = check_data(
        source, model, gguf_file=gguf_file, columns=columns, objective=objective, max_length=_LENGTHS[-1]
    )
    text = _written(source, model, gguf_file, columns, objective, output, looked)
    if output is not None:
        display = Display()
        for line in looked.left_out:
            display.warn(line)
        with disk_errors(output):
            try:
                replace_file(output, text.encode("utf-8"), new=True)
            except FileExistsError:
                raise _taken(output) from None
        display.say(f"written: {shown(output, 300)}")
        tell_next(display, ["plan", str(output)], ["train", str(output)])
    return text


def _taken(output: Path) -> ConfigError:
    return ConfigError(f"output {shown(output, 300)} already exists; choose another name")


def _written(
    source: str,
    model: str,
    gguf_file: str | None,
    columns: Mapping[str, str] | None,
    objective: str,
    output: Path | None,
    looked: DataReport,
) -> str:
    longest = looked.lengths[-1]
    names = "".join(f"\n    {ours}: {_yaml(theirs)}" for ours, theirs in (columns or {}).items())
    share = held_out_share(looked.questions)
    test, evaluation = "", "enabled: false             # too few questions to hold some out: add rows, or data.test"
    if source == _BUILTIN:
        test = f"\n  test: {_yaml(source)}"
    elif share is not None:
        test = f"\n  test: {share}                  # share of the questions that is held out"
    if test:
        evaluation = "rows: 32                   # held-out questions to answer before and after training"
    if test and objective == "reward":
        evaluation = "batch_size: 16             # held-out conversations at once; scored before and after training"
    return _TEXT.format(
        title=f"{looked.examples:,} examples ({', '.join(looked.formats)}), {looked.template} template",
        file="RUN.yaml" if output is None else shown(output, 300),
        model=_yaml(model),
        gguf="" if gguf_file is None else f"\n  gguf_file: {_yaml(gguf_file)}",
        source=_yaml(source),
        columns=f"\n  columns:{names}" if names else "",
        test=test,
        evaluation=evaluation,
        objective=_objective(objective, longest),
        left_out="".join(f"\n# {line}" for line in looked.left_out),
        epochs=_EPOCHS,
        batch=_BATCH,
        accumulation=_ACCUMULATION,
        save_steps=_save_steps(looked.examples * (1 - (share or 0))),
        max_length=next((length for length in _LENGTHS if length >= longest), _LENGTHS[-1]),
        lengths=f"the longest example has {longest}, 95 % have at most {looked.lengths[2]}",
        output_dir=_yaml(f"runs/{_name(source)}"),
    )


def _objective(name: str, longest: int) -> str:
    """Lines of the section `train`; nothing of the usual objective."""
    if name == "sft":
        return ""
    lines = f"\n  objective: {name}"
    if name == "grpo":
        most = next((length for length in _LENGTHS if length >= 2 * longest), _LENGTHS[-1])
        lines += (
            f"\n  grpo:\n    max_completion_length: {most}  # tokens of an answer; right final answers are rewarded"
        )
    return lines


def _save_steps(rows: float) -> int:
    """A quarter of a short run's steps, so that little of it is ever lost; 50 of a long one's."""
    return max(1, min(50, int(_EPOCHS * rows / (_BATCH * _ACCUMULATION)) // 4))


def _name(source: str) -> str:
    stem = PurePath(source.removeprefix("builtin:")).name.partition(".")[0]
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem) or "run"


def _yaml(value: Any) -> str:
    """One scalar, quoted where it has to be."""
    import yaml

    return str(yaml.safe_dump(value, allow_unicode=True, width=10**6).removesuffix("...\n").strip())
