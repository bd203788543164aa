"""What is asked of a model in `dude eval`, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dude_peft.data.control_tokens import SPECIAL_TOKENS
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted, shown


@dataclass(frozen=True)
class EvalOptions:
    """What is asked of a model."""

    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None
    """Local files; None takes data from where the harness does."""
    limit: int | None = None
    """Items of each name at most: a seeded sample, stratified by subject."""
    seed: int = 0
    """Of the sample and the bootstraps."""
    chat: bool = False
    """Prompts through the tokenizer's chat template, examples as turns."""
    num_fewshot: int | None = None
    batch_size: int | None = None
    """Sequences at a time; None finds it."""
    text: Path | None = None
    """General text: loss, perplexity, and how far an adapter moved from its base."""
    special_tokens: str | None = None
    """What a special token is that a text spells: `text`, or `allow`, the token; None as in the training run."""

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot work."""
        if not self.tasks and self.text is None:
            raise ConfigError("nothing to evaluate; give --tasks (such as gsm8k,mmlu) or --text FILE")
        twice = next((name for name in self.tasks if self.tasks.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"--tasks: {quoted(twice)} is listed twice; list it once")
        for option, value, least in (
            ("--limit", self.limit, 1),
            ("--batch-size", self.batch_size, 1),
            ("--num-fewshot", self.num_fewshot, 0),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{option} {value}: give a whole number from {least}")
        if self.special_tokens not in (None, *SPECIAL_TOKENS):
            raise ConfigError(f"--special-tokens {quoted(self.special_tokens)}: use {', '.join(SPECIAL_TOKENS)}")
        if self.data_dir is not None and not self.data_dir.is_dir():
            what = "this is a file" if self.data_dir.exists() else "no such folder"
            raise DataError(f"--data-dir {shown(self.data_dir, 300)}: {what}; docs/evaluation.md describes its files")
        if self.text is not None and self.text.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".parquet"):
            raise DataError(f"--text {shown(self.text, 300)}: this file has data rows; give a file of plain text")
        target = None if self.text is None else self.text.expanduser()
        if target is not None and (target.is_dir() or not target.exists()):
            what = "this is a folder" if target.is_dir() else "no such file"
            raise DataError(f"--text {shown(self.text, 300)}: {what}; give a text file")
