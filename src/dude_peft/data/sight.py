"""How a vision-language model's processor sees the images of rows: as tokens in their text, and as tensors in a batch.

A chat template writes one image token for each image. The processor says what stands in its place: as many tokens as
the model makes of that image, with marks around them. The text is then tokenised as any other, so that masks, hidden
spellings and the prefix of generation follow the same rules. Pixels are read again for each batch, and never stored:
the processor makes the tensors of a batch from its images alone, whatever they are called in its family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dude_peft.data.formats import Row
from dude_peft.data.pictures import Picture, opened
from dude_peft.data.template import Pieces
from dude_peft.errors import ConfigError, DataError, DudeError, ResourceError
from dude_peft.installing import install
from dude_peft.show import quoted, reason_of

TOO_OLD = f"rows with images need transformers 5.12 or newer: {install('transformers', option='-U')}"
"""What is said where its processors do not tell what they write in place of an image."""
_OF_TEXT = ("input_ids", "attention_mask")
_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What families call the kinds of tokens, text and image, that their models read."""


@dataclass(frozen=True)
class Seen:
    """A row's pieces as text in which images stand as their tokens."""

    pieces: Pieces
    images: tuple[int, ...]
    """Images of each piece."""
    tokens: tuple[int, ...]
    """Image tokens of each piece."""
    never_learned: frozenset[int]
    """Ids of the tokens that stand for images or mark their ends."""


class Sight:
    """A model's processor, loaded when the first image is met."""

    def __init__(
        self,
        load: Callable[[], Any],
        tokenizer: Any,
        *,
        marks: Collection[int],
        parts: Mapping[str, str],
        files: Any = (),
    ) -> None:
        """Takes what is known without the processor.

        Args:
            load: makes it.
            tokenizer: of the model, which reads the texts.
            marks: ids of the tokens in whose places the model puts images, by its config.json.
            parts: sha256 of what decides how it sees, by name.
            files: paths of the processor's files.
        """
        self._load, self._tokenizer = load, tokenizer
        self.marks = frozenset(marks)
        self.parts = dict(parts)
        self.files: tuple[Path, ...] = tuple(files)

    @cached_property
    def processor(self) -> Any:
        """The one of transformers. Raises what `load` raises."""
        return self._load()

    @cached_property
    def _token(self) -> str:
        token = getattr(self.processor, "image_token", None)
        if not isinstance(token, str) or not token:
            raise ConfigError(f"{type(self.processor).__name__} names no image token; choose another model")
        return token

    @cached_property
    def _names(self) -> set[str]:
        """Spellings that no text of a row with images may have."""
        return {self._token, *self._marked}

    @cached_property
    def _marked(self) -> list[str]:
        """The tokens of `marks`."""
        return [name for name in self._tokenizer.convert_ids_to_tokens(sorted(self.marks)) if name]

    @cached_property
    def _added(self) -> dict[str, int]:
        return dict(self._tokenizer.get_added_vocab())

    def seen(self, row: Row, pieces: Pieces) -> Seen:
        """The pieces of a row with images, an image's tokens in place of each token that the template wrote for one.

        Raises:
            DataError: an image is damaged, a text spells an image token, or the template leaves an image out.
            ConfigError: the processor and the model name different tokens, or transformers is too old.
        """
        self._refuse_spellings(row)
        counts = [text.count(self._token) for text in pieces.texts]
        if sum(counts) != len(row.pictures):
            raise DataError(
                f"{row.source}: the template writes {sum(counts)} image tokens {quoted(self._token)} for "
                f"{len(row.pictures)} images; use the model's own chat template, with data.template: chat"
            )
        written = self._replacements([opened(each, row.source) for each in row.pictures], row.source)
        sizes = [sum(text.count(name) for name in self._marked) for text in written]
        if not all(sizes):
            raise ConfigError(
                f"the processor writes an image as {quoted(written[sizes.index(0)])}, which has none of the model's "
                f"image tokens {quoted(', '.join(self._marked))}; use the processor that belongs to the model"
            )
        texts, tokens, rest, left = [], [], iter(written), iter(sizes)
        for text, count in zip(pieces.texts, counts, strict=True):
            texts.append(re.sub(re.escape(self._token), lambda _: next(rest), text))
            tokens.append(sum(next(left) for _ in range(count)))
        special = {token for name, token in self._added.items() if any(name in text for text in set(written))}
        return Seen(replace(pieces, texts=tuple(texts)), tuple(counts), tuple(tokens), frozenset(special))

    def check(self, row: Row, ids: Sequence[int], wanted: int) -> None:
        """Raises DataError where a row has another number of image tokens than `wanted`: a text spells one."""
        if wanted == sum(token in self.marks for token in ids):
            return
        token = next((each for each in ids if each in self.marks), None)
        name = self._token if token is None else str(self._tokenizer.convert_ids_to_tokens(token))
        raise self._spelt(row, name)

    def tensors(self, ids: Any, rows: Sequence[Shown]) -> dict[str, Any]:
        """What the model needs beside the tokens of a batch: pixels, and what else its processor returns.

        Args:
            ids: (rows, tokens) of the batch, padded.
            rows: those of its rows that have images, in order.

        Raises:
            DataError: an image was changed since the rows were read.
        """
        import torch

        images = [[opened(each, row.where) for each in row.pictures] for row in rows]
        texts = [self._token * len(each) for each in images]
        found = self._asked(images, texts, rows[0].where, padding=True, return_tensors="pt")
        made = {name: value for name, value in found.items() if name not in (*_OF_TEXT, *_TYPES)}
        for name in _TYPES:
            if name in found:
                types = self.processor.create_mm_token_type_ids(found["input_ids"].tolist())
                if types != found[name].tolist():
                    raise ConfigError(f"{type(self.processor).__name__} tells images apart in a way that is not known")
                made[name] = torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()))
        return made

    def prompt(self, image: Any, text: str) -> dict[str, Any]:
        """Everything that the model reads of an image with a text behind it, outside of any template.

        Raises:
            ConfigError: the processor cannot be had.
            DataError: it does not take the image.
        """
        found = self._asked([[image]], [self._token + text], "the prompt with an image", return_tensors="pt")
        return dict(found)

    def _refuse_spellings(self, row: Row) -> None:
        for message in row.messages:
            for name in self._names:
                if name in message.content or name in message.more:
                    raise self._spelt(row, name)

    def _spelt(self, row: Row, name: str) -> DataError:
        return DataError(
            f"{row.source}: a text spells the image token {quoted(name)}, which stands for an image; remove it, and "
            'write the image as {"type": "image", "image": path}'
        )

    def _replacements(self, images: list[Any], where: str) -> list[str]:
        """What the processor writes in place of the token of each image."""
        found = self._asked([images], [self._token * len(images)], where, return_text_replacement_offsets=True)
        offsets = found.get("text_replacement_offsets")
        if not offsets:
            raise ConfigError(TOO_OLD)
        return [str(each["replacement"]) for each in offsets[0]]

    def _asked(self, images: list[list[Any]], texts: list[str], where: str, **options: Any) -> Any:
        try:
            return self.processor(images=images, text=texts, **options)
        except DudeError:
            raise
        except MemoryError as error:
            raise ResourceError(
                f"{where}: the images do not fit into memory as the processor scales them; use smaller ones, or lower "
                "the size in preprocessor_config.json"
            ) from error
        except Exception as error:  # each family's processor raises its own
            reason = reason_of(error, 200)
            raise DataError(f"{where}: the model's processor does not take an image ({reason}); replace it") from error


@dataclass(frozen=True)
class Shown:
    """The images of one row of a batch, and who sees them."""

    pictures: tuple[Picture, ...]
    sight: Sight
    where: str
    """The row, for messages."""


class SeenPrompt(list[int]):
    """Token ids that generation starts from, and the images that stand in them."""

    def __init__(self, ids: Sequence[int], shown: Shown) -> None:
        super().__init__(ids)
        self.shown = shown


def prints_of(prompt: Sequence[int]) -> list[Any]:
    """Hashes of the images of a prompt and of what sees them; nothing of one that is text."""
    if not isinstance(prompt, SeenPrompt):
        return []
    return [*(each.sha256 for each in prompt.shown.pictures), prompt.shown.sight.parts]
