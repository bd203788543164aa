"""The base model of several processes on CPUs: the first one of each machine loads it, the others map its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dude_peft.errors import DudeError
from dude_peft.machine import processes
from dude_peft.machine.shared_pages import NotSharedError, Offer, Shared, own_copies_, take_up_
from dude_peft.model.load import load_empty, load_model
from dude_peft.show import shown
from dude_peft.training.context import RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_LOADING = ("dtype", "quantization_config", "architectures", "transformers_version")
"""What a configuration says of its checkpoint; GGUF weights are dequantised, and tensors tell their dtypes."""


@dataclass(frozen=True)
class _Loaded:
    """What a process that has loaded the model tells the others of its machine."""

    offer: Offer
    kind: tuple[str, dict[str, Any], str | None]
    """By `_kind`."""
    generation: Any
    """Its generation settings, which are not in its configuration."""


def load_once(context: RunContext, where: str) -> PreTrainedModel:
    """The base model of a run in several processes with memory in common; all of them have to call it.

    Where one of them cannot map it, all know, and each one loads it. The tensors begin as in shared memory then, so the
    bits of the run are the same.

    Args:
        context: of the run.
        where: the model is, from `locate`.

    Raises:
        ConfigError: it cannot be found, or is no causal language model.
        ArtifactError: weights are missing from the checkpoint.
        ResourceError: it does not fit into memory.
    """
    loader = _Loader(context, where)
    told = processes.done_by_all(loader.begin)
    reason = next((each for each in told if isinstance(each, str) and each), "")
    if not reason:
        reason = next(filter(None, processes.gathered(loader.map_of(told))), "")
    loader.close()
    if reason:
        context.warn(
            f"each process has a base model of its own ({shown(reason, 300)}); on Linux, in one container and as one "
            "user, they have one together"
        )
        loader.load_alone()
    model: PreTrainedModel = loader.model
    return model


class _Loader:
    """One process."""

    def __init__(self, context: RunContext, where: str) -> None:
        self._section, self._where = context.config.model, where
        self._is_first = processes.local_rank() == 0
        self._shared: Shared | None = None
        self.model: Any = None

    def begin(self) -> _Loaded | str | None:
        """Makes the model, with values where this process loads it; a text is why it cannot be shared."""
        try:
            if not self._is_first:
                self.model = load_empty(self._section, self._where)
                return None
        except DudeError as error:
            return str(error)
        self.model = load_model(self._section, self._where)
        try:
            self._shared = Shared(self.model)
        except NotSharedError as error:
            return str(error)
        return _Loaded(self._shared.offer, _kind(self.model), self.model.generation_config)

    def map_of(self, told: list[_Loaded | str | None]) -> str:
        """Why this process cannot map the model; empty where it has it."""
        if self._is_first:
            return ""
        first = told[processes.rank() - processes.local_rank()]
        if not isinstance(first, _Loaded):
            return "the numbers of the processes do not tell which of them are on one machine"
        if first.kind != _kind(self.model):
            return f"made without its checkpoint {type(self.model).__name__} has another configuration"
        try:
            take_up_(self.model, first.offer)
        except NotSharedError as error:
            return str(error)
        self.model.generation_config = first.generation
        return ""

    def close(self) -> None:
        """All processes have mapped what they could."""
        if self._shared is not None:
            self._shared.close()

    def load_alone(self) -> None:
        """The model in memory of this process."""
        if not self._is_first:
            self.model = None
            self.model = load_model(self._section, self._where)
        if self._shared is None:
            own_copies_(self.model)


def _kind(model: Any) -> tuple[str, dict[str, Any], str | None]:
    """What two models with the same values have to have in common, to compute the same."""
    attention = getattr(model.config, "_attn_implementation", None)
    return type(model).__name__, _of_function(model.config.to_dict()), attention


def _of_function(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a configuration, and of those in it, that a model computes by."""
    return {
        key: _of_function(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in _OF_LOADING
    }
