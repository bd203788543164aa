"""A reward model as a reward: a second model, frozen, that gives a conversation one number.

It reads what a row asks, as the row has it, and the text of an answer: by its own chat template and its own tokenizer,
as in its own training. What the model that learns has made of the row, ids and their text, it never sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dude_peft.answer.fingerprint import model_fingerprint
from dude_peft.answer.speaker import data_of_the_run, is_adapter, tokenizer_of, writing_of
from dude_peft.artifact.base_settings import base_settings
from dude_peft.config.schema import ModelSection, RewardSection
from dude_peft.data.batches import Company, grouped, pad_right
from dude_peft.data.encode import check_ids, judged_ids
from dude_peft.data.formats import Message, Row
from dude_peft.data.template import Template
from dude_peft.data.tokenizer_parts import tokenizer_parts
from dude_peft.errors import ArtifactError, ConfigError, DataError, DudeError, ResourceError
from dude_peft.exporting.adapter import SavedAdapter, open_adapter
from dude_peft.exporting.base import source_named, source_of
from dude_peft.exporting.foreign import open_foreign
from dude_peft.model.architecture import model_of
from dude_peft.model.load import dtype_of, load_model, load_settings, locate
from dude_peft.model.outputs import scores_of
from dude_peft.model.probe import nature_of
from dude_peft.model.quantised import stored_config
from dude_peft.show import a_, shown
from dude_peft.task_types import SCORES
from dude_peft.tuner.load import load_adapter
from dude_peft.tuner.same_base import with_remedy

_ENDING = "ForSequenceClassification"
_KNOWN = (ConfigError, DataError, ArtifactError, ResourceError)


class UnscoredError(Exception):
    """A conversation that gets no score."""

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(what)
        self.what, self.todo = what, todo


@dataclass(frozen=True)
class RewardModel:
    """It gives scores; nothing of it is trained."""

    model: Any
    tokenizer: Any
    template: Template
    """Its conversations end as the chat template ends them."""
    company: Company
    """Which conversations share a batch; none do where it has no padding token."""

    def scores(self, asked: Row, answers: Sequence[str]) -> list[float]:
        """Of each answer to what a row asks; the same bits whenever it is asked for these answers together.

        Raises:
            UnscoredError: a conversation is longer than the model reads.
            DataError: the template or the tokenizer cannot write it.
        """
        rows = [replace(asked, messages=(*asked.prompt, Message("assistant", answer))) for answer in answers]
        conversations = judged_ids(rows, self.template, self.tokenizer)
        self._check(asked, conversations)
        pad = self.model.config.get_text_config().pad_token_id or 0
        found = torch.zeros(len(rows), dtype=torch.float64)
        examples = [{"input_ids": ids, "labels": ids} for ids in conversations]
        for indices in grouped([len(ids) for ids in conversations], len(rows), self.company):
            batch = pad_right([examples[index] for index in indices], pad)
            found[indices] = self._scores({name: batch[name] for name in ("input_ids", "attention_mask")})
        return found.tolist()

    def unwritten(self, asked: Row) -> tuple[str, ...]:
        """What a row asks and the template does not write."""
        return self.template.unwritten([asked], with_answer=False)[0]

    def record(self) -> dict[str, Any]:
        """What decides its scores, as JSON: to know it again."""
        return {
            "weights": model_fingerprint(self.model),
            "settings": base_settings(self.model.config, scores=True),
            "tokenizer": tokenizer_parts(self.tokenizer),
            "reads": [self.template.kind, self.template.special_tokens],
        }

    @torch.no_grad()
    def _scores(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        device = self.model.device
        with torch.autocast(device.type, enabled=False):  # of the model that learns
            return scores_of(self.model, {name: part.to(device) for name, part in batch.items()}).double().cpu()

    def _check(self, asked: Row, conversations: Sequence[Sequence[int]]) -> None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        for ids in conversations:
            if not ids:
                raise UnscoredError("has nothing to read: its chat template writes nothing", "choose another model")
            if positions is not None and len(ids) > positions:
                raise UnscoredError(
                    f"reads {positions} tokens at most, and the conversation has {len(ids)}",
                    "lower train.grpo.max_completion_length, shorten the row, or choose a reward model that reads more",
                )
            check_ids(asked.source, ids, self.tokenizer, vocabulary)


@dataclass(frozen=True)
class _Found:
    """Where a reward model is, before its weights are read."""

    saved: SavedAdapter | None
    source: ModelSection
    """Of the checkpoint, or of the adapter's base."""
    where: str
    settings: Any
    """The checkpoint's configuration."""


def load_reward_model(section: RewardSection, dtype: str, device: Any) -> RewardModel:
    """The reward model of a section, frozen, on `device`.

    Args:
        section: of kind `model`.
        dtype: model.dtype of the run. An adapter's base has the dtype that it was trained in: another one is another
            function.
        device: of the run; what is quantised stays where it was quantised.

    Raises:
        ConfigError: it cannot be found, is none, or has no chat template.
        ArtifactError: its files are damaged, or its base is another one.
        ResourceError: it does not fit into memory.
    """
    with _told_of(section):
        found = _found(section, dtype)
        saved, where, name = found.saved, found.where, str(section.model)
        tokenizer = tokenizer_of(found.source, where, name, saved, data_of_the_run(saved))
        template = _template(section, saved, tokenizer)
        quantization = None if saved is None else saved.quantization
        seed = None if saved is None else 0  # an adapter brings its head along
        model: Any = load_model(found.source, where, quantization, task_type=SCORES, head_seed=seed)
        if saved is not None:
            model.config.get_text_config().pad_token_id = saved.padding
            with with_remedy("restore the base model it was trained on, or name a merged reward model"):
                model = load_adapter(model, saved.folder)
        model.requires_grad_(False).eval()
        if quantization is None and stored_config(found.settings) is None:
            model.to(device)
        pad = model.config.get_text_config().pad_token_id
        return RewardModel(model, tokenizer, template, "none" if pad is None else nature_of(model, pad).company)


def reward_model_bytes(section: RewardSection, dtype: str) -> int | None:
    """Memory that a reward model keeps, found without its weights; None of a quantised one. Raises as
    `load_reward_model` does.
    """
    with _told_of(section):
        found = _found(section, dtype)
        saved, name = found.saved, found.source.name_or_path
        tokenizer = tokenizer_of(found.source, found.where, str(section.model), saved, data_of_the_run(saved))
        _template(section, saved, tokenizer)
        if stored_config(found.settings) is not None or (saved is not None and saved.quantization is not None):
            return None
        own = dtype_of(found.source, found.settings, found.where)
        model = model_of(found.settings, name, own, task_type=SCORES)
        adapter = [] if saved is None else [stored.size for stored in saved.tensors.values()]
        total: int = sum(part.nbytes for part in (*model.parameters(), *model.buffers())) + sum(adapter)
        return total


@contextmanager
def _told_of(section: RewardSection) -> Iterator[None]:
    """Within: an error says which reward it is of."""
    try:
        yield
    except DudeError as error:
        kind = next((known for known in _KNOWN if isinstance(error, known)), None)
        if kind is None:
            raise
        text = str(error).removeprefix("model.name_or_path: ")
        raise kind(f"train.grpo.rewards: {section.title}: {text}") from error


def _found(section: RewardSection, dtype: str) -> _Found:
    name = str(section.model)
    saved = None
    if is_adapter(name):
        if open_foreign(name) is not None:
            raise ConfigError(
                f"{shown(name, 300)} is an adapter that stock PEFT made; merge it into its base with PEFT "
                "(merge_and_unload, save_pretrained), and name that folder"
            )
        saved = open_adapter(name)
        source = source_of(saved, None, None)
    else:
        source = source_named(name).model_copy(update={"dtype": dtype})
    where = locate(source)
    settings = load_settings(source, where)
    if saved is None:
        _check_checkpoint(name, settings)
    else:
        _check_adapter(name, saved)
    return _Found(saved, source, where, settings)


def _check_adapter(name: str, saved: SavedAdapter) -> None:
    if saved.config.task_type != SCORES:
        raise ConfigError(
            f"adapter {shown(name, 300)} is of a language model and has no head of scores; name one that "
            "train.objective: reward wrote"
        )
    labels = saved.labels("score", "classifier")
    if labels != 1:
        has = "has no head of scores" if labels is None else f"gives {labels} numbers"
        raise ConfigError(f"adapter {shown(name, 300)} {has}; a reward is one number: name a reward model")


def _check_checkpoint(name: str, settings: Any) -> None:
    named = next(iter(getattr(settings, "architectures", None) or ()), "")
    if named and not named.endswith(_ENDING):
        raise ConfigError(
            f"model {shown(name, 300)} is {a_(shown(named))}, which has no head of scores; name a reward model: a "
            "sequence classification with one label, or an adapter that train.objective: reward wrote"
        )
    if settings.num_labels != 1:
        raise ConfigError(
            f"model {shown(name, 300)} has {settings.num_labels} labels; a reward is one number: name a sequence "
            "classification with one label"
        )


def _template(section: RewardSection, saved: SavedAdapter | None, tokenizer: Any) -> Template:
    """As the model's own run had it, or the chat template that its tokenizer brings."""
    kind, special_tokens = ("chat", "text") if saved is None else writing_of(data_of_the_run(saved))
    if section.template is None and kind == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {shown(section.model, 300)} has no chat template; save one with it, or set template: "
            "plain if the model was trained with DuDe's plain template"
        )
    return Template(tokenizer, section.template or kind, special_tokens).unclosed()
