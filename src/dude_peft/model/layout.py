"""Where a checkpoint keeps the parameters of a model, by transformers' own conversion of names.

A file's names are not always the model's: Gemma 3 with its vision tower is stored as `language_model.model...` and
lives as `model.language_model...`, Mixtral's experts are stored one by one and live in one tensor. transformers has a
table of these, and we read and write by it. What it only renames is found under the file's name; what it stacks, splits
or permutes has no tensor of its own in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dude_peft.artifact.header import StoredTensor, chunks
from dude_peft.errors import ArtifactError
from dude_peft.model.weights import WeightFiles
from dude_peft.show import shown


@dataclass(frozen=True)
class Layout:
    """The parameters of one model in one checkpoint."""

    places: dict[str, StoredTensor]
    """Parameter -> the tensor that holds it as it is."""
    made: dict[str, str]
    """Parameter that transformers computes from stored tensors -> the name of one of them."""
    names: _Names

    def find(self, key: str, names: list[str]) -> StoredTensor:
        """The stored tensor of a parameter, under its own name or a tied one's.

        Args:
            key: the parameter's name, for messages.
            names: all its names in the model.

        Raises:
            ArtifactError: it is not there, two different tensors are, or it is a part of others.
        """
        found = {self.places[name].name: self.places[name] for name in names if name in self.places}
        if found:
            first, *others = found.values()
            if all(_is_same(first, other) for other in others):
                return first
            raise ArtifactError(
                f"the checkpoint has {' and '.join(map(shown, found))}, which differ, but the model has one weight for "
                "them; load the model, call save_pretrained(FOLDER), and use that folder"
            )
        if source := next((self.made[name] for name in names if name in self.made), None):
            raise ArtifactError(
                f"the checkpoint has no tensor of its own for '{shown(key)}': transformers builds it from "
                f"'{shown(source)}'; load the model, call save_pretrained(FOLDER, save_original_format=False), and "
                "use that folder"
            )
        raise ArtifactError(
            f"the checkpoint has no tensor '{shown(key)}' ({len(self.places)} others); use a checkpoint in "
            "transformers' own layout"
        )

    def whole(self, names: list[str]) -> StoredTensor | None:
        """The stored tensor that a parameter or buffer of these names is; None where it is made of several."""
        return next((self.places[name] for name in names if name in self.places), None)

    def key(self, name: str) -> str:
        """The name of a parameter in the file: that of its tensor, or the one that transformers would save it under."""
        return self.places[name].name if name in self.places else self.names.saved(name)


def layout_of(model: Any, checkpoint: WeightFiles) -> Layout:
    """Where every parameter of a model lies.

    Args:
        model: of transformers; the meta device does.
        checkpoint: its weights.
    """
    names = _Names(model)
    places: dict[str, StoredTensor] = {}
    made: dict[str, str] = {}
    for key, stored in checkpoint.tensors.items():
        parameters, converted = names.loaded(key)
        if converted:
            made |= dict.fromkeys(parameters, key)
        elif key in parameters or parameters[0] not in places:
            places[parameters[0]] = stored
    return Layout(places, made, names)


def _is_same(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(chunks(one), chunks(other), strict=True))


class _Names:
    """transformers' table for one model: from the file's names to the model's, as its loader does, and back."""

    def __init__(self, model: Any) -> None:
        self.prefix, self.known = model.base_model_prefix, model.state_dict()
        conversions = get_model_conversion_mapping(model)
        self.renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self.converters = [each for each in conversions if isinstance(each, WeightConverter)]
        own = get_model_conversion_mapping(model, add_legacy=False)
        self.back: list[Any] = [each.reverse_transform() for each in reversed(own) if isinstance(each, WeightRenaming)]

    def loaded(self, key: str) -> tuple[list[str], bool]:
        """The parameters that a stored tensor becomes, and whether it is more than renamed on the way."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.known)
        if name not in self.known and key in self.known:  # a file with the model's own names
            name, pattern = rename_source_key(key, [], [], self.prefix, self.known)
        if pattern is None:
            return [name], False
        targets = next(each.target_patterns for each in self.converters if pattern in each.source_patterns)
        return [name.replace(targets[0], target, 1) for target in targets], True

    def saved(self, name: str) -> str:
        """The name under which a parameter is saved; its own where the table does not lead back to it."""
        key, _ = rename_source_key(name, self.back, [])
        return key if self.loaded(key) == ([name], False) else name
