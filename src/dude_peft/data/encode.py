"""From text to token ids and labels: the prompt is masked, the answer and its end are trained.

Prompt and completion are tokenised apart and joined, so that generation, which starts from the prompt's ids, sees
exactly the prefix of training: tokenised together, the two could melt into one token at the seam. (A SentencePiece
tokenizer puts its word-begin mark before the completion, in training and generation alike.)

A row that does not fit into max_length is left out and counted, also where a part of its answer would fit: a cut answer
has no end, and a model trained on it learns not to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dude_peft.data.formats import Row
from dude_peft.data.template import Template
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted

IGNORE = -100
"""The label that the loss skips."""

_BATCH_ROWS = 512


@dataclass(frozen=True)
class EncodedSet:
    """Token ids of the rows that fit, unpadded, and what was counted on the way."""

    examples: list[dict[str, list[int]]]
    """`input_ids`, `attention_mask`, `labels` of each row kept, in order, all of one length a row."""
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


def prompt_ids(row: Row, template: Template, tokenizer: Any) -> list[int]:
    """The ids that generation starts from: the prefix, id for id, of the row's training example."""
    return _tokenise_prompts([template.prompt_text(row)], template, tokenizer)[0]


def encode(
    rows: Sequence[Row],
    template: Template,
    tokenizer: Any,
    max_length: int,
    *,
    vocab_size: int | None = None,
) -> EncodedSet:
    """Token ids and labels of the rows that fit into `max_length` tokens.

    `vocab_size` is the number of rows of the model's embedding: an id beyond it is refused; None checks nothing.

    Raises:
        DataError: no rows, none that fits, a token the model does not have, a message that spells the end token.
        ConfigError: a wrong max_length, or a tokenizer or chat template that cannot be trained with.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ConfigError(f"max_length is {quoted(max_length)}; give a whole number of tokens from 2")
    if not rows:
        raise DataError("no rows to encode; check the data set and its limit")
    examples: list[dict[str, list[int]]] = []
    truncated = trained = longest = 0
    for begin in range(0, len(rows), _BATCH_ROWS):
        batch = rows[begin : begin + _BATCH_ROWS]
        for row, prompt, completion in zip(batch, *_tokenise(batch, template, tokenizer), strict=True):
            _check_ids(row, prompt + completion, tokenizer, vocab_size)
            needed = len(prompt) + len(completion)
            longest = max(longest, needed)
            if needed > max_length:
                truncated += len(prompt) < max_length
                continue
            trained += len(completion)
            # Labels come from the two lengths, never from comparing ids with the pad token: where pad is the end token
            # (the common choice, and SmolLM2's own), that would mask the end and it would never be learned.
            examples.append(
                {
                    "input_ids": prompt + completion,
                    "attention_mask": [1] * needed,
                    "labels": [IGNORE] * len(prompt) + completion,
                }
            )
    if not examples:
        raise DataError(
            f"none of the {len(rows)} rows fits into max_length {max_length}; the longest needs {longest} tokens: "
            "raise max_length"
        )
    tokens = sum(len(example["input_ids"]) for example in examples)
    return EncodedSet(examples, len(rows) - len(examples), truncated, tokens, trained, longest)


def _tokenise(rows: Sequence[Row], template: Template, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    texts = [template.render(row) for row in rows]
    prompts = _tokenise_prompts([prompt for prompt, _ in texts], template, tokenizer)
    completions = _ids([completion for _, completion in texts], tokenizer, add_special_tokens=False)
    for row, completion in zip(rows, completions, strict=True):
        if not completion or completion[-1] != tokenizer.eos_token_id:
            raise ConfigError(
                f"{row.source}: the tokenizer does not read its own end token {quoted(tokenizer.eos_token)} as one "
                f"token (id {tokenizer.eos_token_id}); add it to the tokenizer as a special token"
            )
    return prompts, completions


def _tokenise_prompts(texts: list[str], template: Template, tokenizer: Any) -> list[list[int]]:
    if template.kind == "chat":  # a chat template writes its own special tokens
        return _ids(texts, tokenizer, add_special_tokens=False)
    prompts = _ids(texts, tokenizer, add_special_tokens=True)
    # Some tokenizers close every text with the end token; a prompt goes on.
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in prompts]


def _ids(texts: list[str], tokenizer: Any, *, add_special_tokens: bool) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,  # no warning about its model_max_length: ours is checked
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _check_ids(row: Row, ids: list[int], tokenizer: Any, vocab_size: int | None) -> None:
    if vocab_size is None or not ids or max(ids) < vocab_size:
        return
    bad = max(ids)
    token = quoted(tokenizer.convert_ids_to_tokens(bad))
    raise DataError(
        f"{row.source}: token {token} has id {bad}, but the model's vocabulary has {vocab_size} entries; "
        "use the tokenizer that belongs to the model"
    )
