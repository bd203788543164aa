"""Continuations of token ids, in batches or piece by piece, and never from logits that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer
from typing_extensions import override

from dude_peft.answer.cache import AnswerCache
from dude_peft.answer.decoding import Decoding
from dude_peft.answer.speaker import Speaker
from dude_peft.data.batches import grouped, pad_left
from dude_peft.data.prefixes import heads
from dude_peft.errors import NumericsError, ResourceError
from dude_peft.machine.out_of_memory import is_out_of_memory
from dude_peft.model.prefix import KeptPrefix
from dude_peft.parents import fits
from dude_peft.show import shown


@dataclass(frozen=True)
class Completion:
    """One continuation."""

    text: str
    finish: Literal["end", "length"]
    """Whether the model ended it, or max_new_tokens did."""


@fits()
class Pieces(TextStreamer):
    """Hands the answer's text to `write` as whole words are there; `text` is all of it so far."""

    def __init__(self, speaker: Speaker, write: Callable[[str], None]) -> None:
        super().__init__(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends = speaker.ends
        self._write = write
        self._answer: list[int] = []

    @property
    def text(self) -> str:
        """All tokens so far, as text."""
        return str(self.tokenizer.decode(self._answer, skip_special_tokens=True))

    @override
    def put(self, value: Tensor) -> None:
        """One more token; the first call brings the prompt."""
        if not self.next_tokens_are_prompt:
            if int(value[-1]) in self._ends:
                return
            self._answer.extend(value.tolist())
        super().put(value)  # type: ignore[no-untyped-call]

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with text that later tokens do not change."""
        if text:
            self._write(text)


class Finite(LogitsProcessor):
    """Stops at logits from which nothing can be chosen; -inf alone is how some models rule out tokens."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The largest is NaN where any is.
        if not bool(torch.isfinite(scores.amax(dim=-1)).all()):
            raise NumericsError(
                f"{shown(self._name, 300)}: the logits after token {input_ids.shape[1]} are NaN or Inf; check the "
                "model's files, or use bfloat16 or float32 if the dtype is float16"
            )
        return scores


@torch.inference_mode()
def decode(
    speaker: Speaker,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    max_new_tokens: int | None = None,
    base: bool = False,
    pieces: Pieces | None = None,
    kept: KeptPrefix | None = None,
    head: Sequence[int] = (),
) -> list[Completion]:
    """Continue one batch of prompts (token ids), up to the end of the model's turn.

    Args:
        speaker: the model.
        prompts: token ids, none of them empty; padded on the left.
        decoding: how tokens are chosen.
        max_new_tokens: fewer than `decoding` says.
        base: let the base model answer.
        pieces: of one prompt: gets the text as it comes.
        kept: computes what prompts share once, of the model that answers; None computes whole prompts.
        head: what these prompts share.

    Raises:
        NumericsError: NaN or Inf in the logits.
        ResourceError: memory is too small.
    """
    batch = pad_left(prompts, int(speaker.tokenizer.pad_token_id))
    batch = {name: tensor.to(speaker.model.device) for name, tensor in batch.items()}
    try:
        with speaker.as_base(base):
            out = speaker.model.generate(
                **(batch if kept is None else kept.generating(batch, head)),
                generation_config=decoding.settings(max_new_tokens or decoding.max_new_tokens),
                logits_processor=LogitsProcessorList([Finite(speaker.name)]),
                streamer=pieces,
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"{len(prompts)} prompts of up to {max(map(len, prompts))} tokens do not fit into memory; "
            "lower --batch-size or --max-new-tokens"
        ) from error
    return [_completion(speaker, row) for row in out[:, batch["input_ids"].shape[1] :]]


def decode_all(
    speaker: Speaker,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int,
    base: bool = False,
    cache: AnswerCache | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Completion]:
    """Continue any number of prompts, in the order given; those of like length share a batch, if the model allows it.

    What batches begin with is computed once, where that pays and leaves the answers as they are. Batches that `cache`
    has are not computed again. Raises as `decode`.
    """
    found: dict[int, Completion] = {}
    company = "any" if batch_size == 1 else speaker.company
    batches = grouped([len(prompt) for prompt in prompts], batch_size, company)
    # Of all batches, those that are kept as well: a command that goes on computes what an uninterrupted one does.
    shared = heads([[prompts[index] for index in indices] for indices in batches])
    kept = KeptPrefix(speaker.model) if any(shared) and speaker.shares_exactly else None
    for number, (indices, head) in enumerate(zip(batches, shared, strict=True)):
        keys = [f"{'base' if base else 'model'}:{index}" for index in indices]
        if cache is not None and all(key in cache for key in keys):
            completions = [_kept(cache, key) for key in keys]
        else:
            decoding.start(number)
            asked = [prompts[index] for index in indices]
            completions = decode(speaker, asked, decoding, base=base, kept=kept, head=head)
            if cache is not None:
                cache.add({key: [each.text, each.finish] for key, each in zip(keys, completions, strict=True)})
        found.update(zip(indices, completions, strict=True))
        advance(len(indices))
    return [found[index] for index in range(len(prompts))]


def _kept(cache: AnswerCache, key: str) -> Completion:
    text, finish = cache.parts(key, str, str)
    if finish not in ("end", "length"):
        raise cache.damaged()
    return Completion(text, finish)


def _completion(speaker: Speaker, tokens: Tensor) -> Completion:
    ids: list[int] = tokens.tolist()
    stop = next((place for place, token in enumerate(ids) if token in speaker.ends), None)
    text = str(speaker.tokenizer.decode(ids[:stop], skip_special_tokens=True))
    return Completion(text, "length" if stop is None else "end")
