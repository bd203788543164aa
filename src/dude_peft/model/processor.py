"""The processor of a vision-language model: its files found, it itself loaded when the first image is met.

It is transformers' own, with Pillow's image processor on every machine: torchvision's gives other pixels, and a run
could not go on elsewhere. Videos are not read, so what reads them, and needs torchvision, is left out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dude_peft.artifact.sealed import file_sha256
from dude_peft.config.schema import ModelSection
from dude_peft.data.sight import TOO_OLD, Sight
from dude_peft.errors import ConfigError
from dude_peft.model.load import load_settings, loading, source_options
from dude_peft.show import shown

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What transformers reads a processor from, beside its tokenizer."""

_DECIDE = PROCESSOR_FILES[:2]
_MARKS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def sight_of(section: ModelSection, where: str, tokenizer: Any, files_at: Path | None = None) -> Sight | None:
    """How the model at `where` sees images; None where it has no processor.

    Args:
        section: what the configuration says.
        where: from `locate`.
        tokenizer: of the model, which takes the processor's chat template where it has none.
        files_at: folder of an adapter that brought the processor along, in place of the model's.

    Raises:
        ConfigError: the model's configuration cannot be read.
    """
    if section.gguf_file is not None:
        return None
    files = _files(section, where if files_at is None else str(files_at.absolute()))
    if not any(path.name in _DECIDE for path in files):
        return None
    settings = load_settings(section, where)
    marks = {token for name in _MARKS if isinstance(token := getattr(settings, name, None), int)}
    if not marks:
        return None  # a processor of sound, or of another kind
    place = str(files[0].parent)

    def load() -> Any:
        return _loaded(section, place, settings, tokenizer)

    if not tokenizer.chat_template and (old := _old_template(section, where)):
        tokenizer.chat_template = old
    parts = {f"processor: {path.name}": file_sha256(path) for path in files if path.name in _DECIDE}
    return Sight(load, tokenizer, marks=marks, parts=parts, files=files)


def own_processor(folder: Path) -> str | None:
    """The folder of an adapter, where it brought its processor along."""
    return str(folder.absolute()) if any((folder / name).is_file() for name in PROCESSOR_FILES) else None


def _files(section: ModelSection, where: str) -> list[Path]:
    """The processor's files, in the model's folder or in the hub's cache."""
    if os.path.isabs(where):
        return [path for name in PROCESSOR_FILES if (path := Path(where) / name).is_file()]
    found = [_from_hub(section, where, name) for name in PROCESSOR_FILES]
    return [path for path in found if path is not None]


def _from_hub(section: ModelSection, where: str, name: str) -> Path | None:
    from transformers.utils.hub import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with loading("processor", section, where):
        found = cached_file(where, name, **source_options(section, where), **quiet)
    return None if found is None else Path(found)


def _old_template(section: ModelSection, where: str) -> str | None:
    """The template of chat_template.json, which older processors have, and tokenizers do not read."""
    from dude_peft.doors import read_json

    name = "chat_template.json"
    path = Path(where) / name if os.path.isabs(where) else _from_hub(section, where, name)
    try:
        template = read_json(path)["chat_template"] if path is not None and path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return template if isinstance(template, str) else None


def _loaded(section: ModelSection, place: str, settings: Any, tokenizer: Any) -> Any:
    from transformers import AutoImageProcessor, ProcessorMixin

    if not hasattr(ProcessorMixin, "get_text_with_replacements"):
        raise ConfigError(TOO_OLD)
    with loading("processor of model", section, place):
        known = _class_of(Path(place), settings, tokenizer)
        kind = None if known is None else _still(known)
    if kind is None:
        raise ConfigError(
            f"model {shown(section.name_or_path, 300)}: transformers has no processor for {type(settings).__name__}; "
            "choose another model, or remove the images"
        )
    with loading("processor of model", section, place):
        processor = kind.from_pretrained(place, trust_remote_code=False, video_processor=None)
        seeing: Any = AutoImageProcessor
        processor.image_processor = seeing.from_pretrained(place, backend="pil", trust_remote_code=False)
    processor.tokenizer = tokenizer
    return processor


def _class_of(folder: Path, settings: Any, tokenizer: Any) -> Any:
    """As AutoProcessor finds it: named beside the model, or the one of its architecture; None where there is none."""
    from transformers import ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    from dude_peft.doors import read_json

    read = [read_json(folder / name) for name in _DECIDE if (folder / name).is_file()]
    named = [values.get("processor_class") for values in read if isinstance(values, dict)]
    named.append(tokenizer.init_kwargs.get("processor_class"))
    name = next((each for each in named if isinstance(each, str)), None)
    found: Any = None if name is None else processor_class_from_name(name)
    # One that lacks a package says so when it is asked for anything.
    if isinstance(found, type) and (issubclass(found, ProcessorMixin) or getattr(found, "is_dummy", False)):
        return found
    return PROCESSOR_MAPPING.get(type(settings), None)


def _still(kind: Any) -> Any:
    """The class without what reads videos."""
    if "video_processor" not in kind.get_attributes():
        return kind

    class Still(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

    return Still
