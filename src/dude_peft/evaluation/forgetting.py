"""What fine-tuning cost elsewhere: loss on general text, and how far the predictions moved from the base model's.

loss  = mean over tokens of -log p(token | before), in nats; perplexity = exp(loss)
kl_tuned_base = mean over positions of KL(tuned || base) = sum_v p_tuned(v) (log p_tuned(v) - log p_base(v)), in nats
kl_base_tuned = the other direction, KL(base || tuned): large where the tuned model no longer says what the base says
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from dude_peft.data.control_tokens import ControlTokens
from dude_peft.data.file_lines import BOM, decode, opened, refuse_magic
from dude_peft.errors import DataError, NumericsError
from dude_peft.machine.processes import count, gathered, rank
from dude_peft.measure.divergence import divergence
from dude_peft.measure.intervals import Comparison, bootstrap_mean, compare
from dude_peft.show import shown

if TYPE_CHECKING:
    from dude_peft.answer.speaker import Speaker

_BLOCKS, _LENGTH = 16, 512
_LARGEST_BYTES = 256 << 20
_CHARACTERS_A_TOKEN = 12  # more than any language needs, so that a stretch of text fills its block


@dataclass(frozen=True)
class TextScore:
    """A model, and its base where there is one, on a text."""

    file: str
    sha256: str
    blocks: int
    """Evenly spread over the file."""
    tokens: int
    loss: float
    """Nats a token."""
    interval: tuple[float, float] | None
    """95 %, bootstrap over blocks; None for a single one."""
    perplexity: float
    base_loss: float | None = None
    base_perplexity: float | None = None
    comparison: Comparison | None = None
    """Of the blocks' losses; lower is better."""
    kl_tuned_base: float | None = None
    """KL(tuned || base), nats a token."""
    kl_tuned_base_interval: tuple[float, float] | None = None
    kl_base_tuned: float | None = None
    """KL(base || tuned), nats a token."""
    kl_base_tuned_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Text:
    """Up to 16 blocks of 512 tokens, or what the model reads if that is less, evenly spread over a file."""

    file: str
    sha256: str
    blocks: list[list[int]]


def read_text(path: Path, control: ControlTokens, positions: int | None) -> Text:
    """Read a file and cut it into blocks.

    Args:
        path: UTF-8.
        control: of the model's tokenizer; none of them is in the text.
        positions: tokens that the model reads; None if nothing limits it.

    Raises:
        DataError: the file is missing, empty, too short or not UTF-8.
    """
    content, text = _read(path)
    length = min(_LENGTH, positions or _LENGTH)
    blocks = _blocks(text, control, length, shown(path, 300))
    if not blocks:
        raise DataError(f"{shown(path, 300)}: shorter than one block of {length} tokens; give more text")
    return Text(str(path), hashlib.sha256(content).hexdigest(), blocks)


def score_text(speaker: Speaker, text: Text) -> TextScore:
    """Loss and perplexity, and under an adapter the base's and the KL between them.

    Raises NumericsError for NaN or Inf.
    """
    blocks = text.blocks
    scores: dict[int, tuple[float, ...]] = {}
    for number in range(rank(), len(blocks), count()):
        scores[number] = _block_scores(speaker, blocks[number])
    every = {number: score for of_one in gathered(scores) for number, score in of_one.items()}
    losses, *others = map(list, zip(*(every[number] for number in range(len(blocks))), strict=True))
    if not all(math.isfinite(value) for values in (losses, *others) for value in values):
        raise NumericsError(
            f"{shown(speaker.name, 300)}: the loss on {shown(text.file, 300)}, or the KL there, is infinite: the "
            "model gives a token of the text probability 0; check the model's files"
        )
    loss = sum(losses) / len(losses)
    score: dict[str, Any] = {}
    if others:
        base_losses, tuned_base, base_tuned = others
        base_loss = sum(base_losses) / len(base_losses)
        score = {
            "base_loss": base_loss,
            "base_perplexity": _perplexity(base_loss),
            "comparison": compare(losses, base_losses, higher_is_better=False),
            "kl_tuned_base": sum(tuned_base) / len(tuned_base),
            "kl_tuned_base_interval": bootstrap_mean(tuned_base),
            "kl_base_tuned": sum(base_tuned) / len(base_tuned),
            "kl_base_tuned_interval": bootstrap_mean(base_tuned),
        }
    return TextScore(
        file=text.file,
        sha256=text.sha256,
        blocks=len(blocks),
        tokens=len(blocks) * (len(blocks[0]) - 1),
        loss=loss,
        interval=bootstrap_mean(losses),
        perplexity=_perplexity(loss),
        **score,
    )


def _block_scores(speaker: Speaker, ids: list[int]) -> tuple[float, ...]:
    """(loss,), and under an adapter (loss, the base's, KL(tuned || base), KL(base || tuned))."""
    row = torch.tensor([ids], device=speaker.model.device)
    tuned = _log_probabilities(speaker, row)
    if not speaker.adapted:
        return (_loss(tuned, row),)
    with speaker.as_base():
        base = _log_probabilities(speaker, row)
    distances = (float(divergence(p, q).mean()) for p, q in ((tuned, base), (base, tuned)))
    return _loss(tuned, row), _loss(base, row), *distances


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise NumericsError(
            f"the loss on general text is {loss:.0f} nats a token, and its perplexity is not a number; training "
            "diverged: use an earlier checkpoint"
        ) from error


def _read(path: Path) -> tuple[bytes, str]:
    """The bytes of a file, and their text."""
    with opened(path) as (stream, name):
        content = stream.read(_LARGEST_BYTES + 1)
    if len(content) > _LARGEST_BYTES:
        limit = _LARGEST_BYTES >> 20
        raise DataError(f"{name}: larger than {limit} MiB, of which {_BLOCKS} blocks are read; give a part of it")
    refuse_magic(content[:8], name)
    text = decode(content.removeprefix(BOM), 1, 0, name)
    if not text.strip():
        raise DataError(f"{name}: the file is empty or has only blank lines; give a text")
    return content, text


def _blocks(text: str, control: ControlTokens, length: int, where: str) -> list[list[int]]:
    """Up to 16 blocks of equal length, their starts evenly spread, none of them overlapping."""
    step = max(len(text) // _BLOCKS, 1)
    found = []
    for start in range(0, len(text), step):
        stretch = text[start : start + min(step, _CHARACTERS_A_TOKEN * length)]
        ids = control.ids(stretch, (), where)[:length]
        if len(ids) == length:
            found.append(ids)
    if found:
        return found[:_BLOCKS]
    ids = control.ids(text, (), where)  # a short text: blocks one after the other
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:_BLOCKS]


@torch.inference_mode()
def _log_probabilities(speaker: Speaker, ids: Tensor) -> Tensor:
    """(tokens - 1, vocabulary), float32, of each token after the first."""
    logits = speaker.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    found = functional.log_softmax(logits, dim=-1)
    if not bool(torch.isfinite(found.amax(dim=-1)).all()):
        raise NumericsError(
            f"{shown(speaker.name, 300)}: the logits are NaN or Inf; check the model's files, and its dtype"
        )
    return found


def _loss(log_probabilities: Tensor, ids: Tensor) -> float:
    return float(functional.nll_loss(log_probabilities, ids[0, 1:]))
