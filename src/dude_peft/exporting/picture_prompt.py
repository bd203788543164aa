"""A prompt with an image, for models that read images: only there shows what an adapter changes in a vision tower.

The image is drawn here, the same every time. It goes through the model's processor once, and both processes of a
comparison read the tensors that were made of it.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from dude_peft.config.schema import ModelSection
from dude_peft.data.pictures import INSTALL
from dude_peft.errors import ConfigError
from dude_peft.model.processor import sight_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_QUESTION = "\nThe picture shows a surface whose colours change from left to right, and"
_SIZE = (96, 64)


def picture_prompt(
    source: ModelSection, where: str, model: Any, tokenizer: Any, files_at: Path | None
) -> dict[str, Tensor]:
    """The prompt as the model's processor makes it, each tensor by its name; nothing for a model that reads text alone.

    Args:
        source: of the base model.
        where: from `locate`.
        model: loaded.
        tokenizer: of the model; None where it has none.
        files_at: folder of the processor; None takes the base model's.

    Raises:
        ConfigError: the model reads images, but it cannot be shown one here.
        DataError: its processor does not take the image.
    """
    settings = model.config
    if type(settings) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return {}
    sight = None if tokenizer is None else sight_of(source, where, tokenizer, files_at)
    if sight is None:
        raise ConfigError("the model has no processor of images beside it")
    inputs = sight.prompt(_drawn(), _QUESTION)
    if unread := set(inputs) - set(inspect.signature(model.forward).parameters):
        raise ConfigError(f"the model as it is loaded reads no {', '.join(sorted(unread))}")
    most, tokens = getattr(settings.get_text_config(), "max_position_embeddings", None), inputs["input_ids"].shape[1]
    if most is not None and tokens > most:
        raise ConfigError(f"an image with a question takes {tokens} tokens, but the model reads only {most}")
    return inputs


def _drawn() -> Image:
    """Red grows to the right, green downwards, and blue in stripes across."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(INSTALL) from error
    width, height = _SIZE
    pixels = [
        (255 * x // width, 255 * y // height, 64 * ((x + y) // 8 % 4)) for y in range(height) for x in range(width)
    ]
    image = Image.new("RGB", _SIZE)
    image.putdata(pixels)
    return image
