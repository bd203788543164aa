"""The model that answers: an adapter on its base, compared with what it was trained on, or a plain model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.artifact.manifest import CONFIG_FILE
from dude_peft.config.reading import read_values
from dude_peft.config.schema import SHARED_OUT, ModelSection
from dude_peft.data.control_tokens import SPECIAL_TOKENS, ControlTokens
from dude_peft.data.template import KINDS, Template
from dude_peft.doors import named_folder
from dude_peft.errors import ConfigError, ResourceError
from dude_peft.exporting.adapter import SavedAdapter, open_adapter, refuse_run_folder
from dude_peft.exporting.base import source_named, source_of
from dude_peft.exporting.foreign import ForeignAdapter, open_foreign
from dude_peft.folder.identity import recorded_config
from dude_peft.folder.record import ADAPTER, CHECKPOINTS
from dude_peft.folder.record import CONFIG as RUN_CONFIG
from dude_peft.model.load import folder_of, load_model, load_tokenizer, locate
from dude_peft.model.processor import PROCESSOR_FILES, sight_of
from dude_peft.show import shown
from dude_peft.task_types import SCORES

if TYPE_CHECKING:
    from dude_peft.data.batches import Company
    from dude_peft.data.sight import Sight
    from dude_peft.terminal.display import Display


@dataclass(frozen=True)
class Speaker:
    """A model, ready to generate, on the fastest device there is."""

    name: str
    """As it was asked for; of `.` the folder that it means."""
    model: Any
    tokenizer: Any
    ends: frozenset[int]
    """Tokens that end an answer."""
    adapted: bool
    """Whether there is a base model under it to compare with."""
    trained_template: str
    """The template that its run was configured with; `auto` where nothing tells."""
    special_tokens: str = "text"
    """What a special token is that a text spells, as its run was configured: `text`, or `allow`, the token itself."""
    sight: Sight | None = None
    """How it sees images; None where it has no processor."""
    checkpoint_generation: Any = None
    """The checkpoint's own generation config, which answers here do not follow; the field's harness does."""

    def template(self, kind: str | None, special_tokens: str | None = None) -> Template:
        """The template of this kind, or of the training: `Template` says what it raises."""
        return Template(self.tokenizer, kind or self.trained_template, special_tokens or self.special_tokens)

    def control(self, special_tokens: str | None = None) -> ControlTokens:
        """What texts outside of any template may not spell. ConfigError for an unknown word."""
        return ControlTokens(self.tokenizer, special_tokens or self.special_tokens)

    @property
    def vocabulary(self) -> int:
        """Rows of the model's embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def company(self) -> Company:
        """Which prompts share a batch; tried on the model when it is first asked for."""
        from dude_peft.model.probe import company_of

        return company_of(self.model, int(self.tokenizer.pad_token_id))

    @cached_property
    def shares_prefixes(self) -> bool:
        """Whether what prompts share may be computed once; tried on the model when it is first asked for."""
        from dude_peft.model.prefix import shares_prefixes

        return shares_prefixes(self.model, int(self.tokenizer.pad_token_id))

    @cached_property
    def shares_exactly(self) -> bool:
        """Whether that leaves the answers as they are; where it sees images, whole prompts are computed."""
        from dude_peft.model.prefix import shares_exactly

        return self.sight is None and shares_exactly(self.model, int(self.tokenizer.pad_token_id))

    @property
    def company_note(self) -> str:
        """What there is to say of it; empty where any prompts do."""
        from dude_peft.model.probe import company_note

        return company_note(type(_plain(self.model)).__name__, self.company)

    @property
    def positions(self) -> int | None:
        """Tokens that the model reads at most; None where nothing limits them."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @contextmanager
    def as_base(self, wanted: bool = True) -> Iterator[None]:
        """Within: the base model answers, the adapter is switched off."""
        with self.model.disable_adapter() if wanted else nullcontext():
            yield


def open_speaker(
    name: str,
    *,
    base: str | None,
    gguf_file: str | None,
    notes: Display,
    device_map: str | None = None,
    max_memory: Sequence[str] | None = None,
) -> Speaker:
    """Load an adapter with its base model, or a plain model.

    Args:
        name: folder or hub id of either, or `package:NAME` of a model.
        base: base model of the adapter; None takes its own.
        gguf_file: name of the GGUF file that is the (base) model.
        notes: where progress is shown.
        device_map: `auto` spreads the model over GPUs, CPU and disk, a device has all of it; None is the fastest one.
        max_memory: the most that `auto` puts on a device, each as DEVICE=SIZE; None is what is free.

    Raises:
        ConfigError: it cannot be found, is not causal, cannot be placed so, or --base beside a plain model.
        ArtifactError: a damaged adapter, or another base model.
        NumericsError: NaN or Inf in the adapter.
        ResourceError: it does not fit into memory.
    """
    import torch

    from dude_peft.model.probe import check_causal, nature_of, quiet_router_

    saved: SavedAdapter | ForeignAdapter | None = None
    if is_adapter(name):
        saved = open_foreign(name) or open_adapter(name)
        _refuse_scorer(saved)
        source = source_of(saved, base, gguf_file)
    elif base is not None:
        raise ConfigError(f"--base needs an adapter; {shown(name, 300)} has no {CONFIG_FILE}")
    else:
        source = source_named(name, gguf_file)
    source = _placed(source, saved, device_map, max_memory)
    with notes.waiting("loading the model"):
        where = locate(source)
        trained = data_of_the_run(saved)
        tokenizer = tokenizer_of(source, where, name, saved, trained)
        sight = sight_of(source, where, tokenizer, _own_processor(saved))
        model = _model(source, where, saved)
    if device_map is not None:
        _check_placed(model)
    elif saved is None or saved.quantization is None:  # what is quantised stays where it was quantised
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    check_causal(nature_of(model, int(tokenizer.pad_token_id)))
    quiet_router_(model)
    checkpoint_generation = _plain(model).generation_config
    ends = _only_ends_(model, tokenizer)
    template, special_tokens = writing_of(trained)
    adapted = saved is not None
    return Speaker(
        named_folder(name), model, tokenizer, ends, adapted, template, special_tokens, sight, checkpoint_generation
    )


def _placed(
    source: ModelSection,
    saved: SavedAdapter | ForeignAdapter | None,
    device_map: str | None,
    max_memory: Sequence[str] | None,
) -> ModelSection:
    """The source with what --device-map and --max-memory say."""
    if device_map is None and not max_memory:
        return source
    if max_memory and device_map not in SHARED_OUT:
        raise ConfigError(f"--max-memory counts with --device-map: {', '.join(SHARED_OUT)}; give one of them")
    if source.gguf_file is not None:
        raise ConfigError("--device-map: GGUF weights are dequantised in memory; leave it out")
    if saved is not None and saved.quantization is not None:
        raise ConfigError("--device-map: a quantised base is on one device; leave it out")
    if saved is not None and isinstance(saved, ForeignAdapter):
        raise ConfigError("--device-map: an adapter of PEFT's own was not tried with it; leave it out")
    if saved is not None and saved.config.target_parameters:
        raise ConfigError("--device-map: adapted experts are whole tensors in memory; leave it out")
    pairs = [pair.rpartition("=") for pair in max_memory or ()]
    if wrong := next((shown("".join(pair), 80) for pair in pairs if not (pair[0] and pair[2])), None):
        raise ConfigError(f"--max-memory {wrong}: write DEVICE=SIZE, such as 0=20GiB or cpu=60GiB")
    most = {device: int(size) if size.isdecimal() else size for device, _, size in pairs} or None
    return source.model_copy(update={"device_map": device_map, "max_memory": most})


def _check_placed(model: Any) -> None:
    from dude_peft.tuner.offloaded import is_offloaded

    if is_offloaded(model.get_input_embeddings()):
        raise ResourceError(
            "--device-map: the input embeddings are offloaded, but prompts begin there; give the device that computes "
            "more in --max-memory"
        )


def _refuse_scorer(saved: SavedAdapter | ForeignAdapter) -> None:
    if saved.config.task_type == SCORES:
        raise ConfigError(
            f"adapter {shown(saved.folder, 300)} is for {SCORES}: it gives scores, as a reward model does, and writes "
            "nothing; in Python, load it with load_adapter on AutoModelForSequenceClassification"
        )


def is_adapter(name: str) -> bool:
    """Whether a folder or hub id holds an adapter. Raises ConfigError for an empty name, and for a run's own folder."""
    if not name.strip():
        raise ConfigError("the model's name is empty; give the folder or hub id of a model or an adapter")
    folder = folder_of(name)
    if folder is not None and not (folder / "config.json").is_file():
        refuse_run_folder(folder)
    return _hub_has_adapter(name) if folder is None else (folder / CONFIG_FILE).is_file()


def _hub_has_adapter(name: str) -> bool:
    """Whether a hub id is an adapter's: the cache knows, or one request tells."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, CONFIG_FILE)
        return HfApi().file_exists(name, CONFIG_FILE) if cached is None else isinstance(cached, str)
    except Exception:  # no hub in reach, or no valid id, each with its own class: who loads it reports it
        return False


def tokenizer_of(
    source: ModelSection,
    where: str,
    name: str,
    saved: SavedAdapter | ForeignAdapter | None,
    trained: Mapping[str, Any],
) -> Any:
    """The adapter's own, which it was trained with, or the model's, with the chat template of `trained`."""
    if saved is not None and (saved.folder / "tokenizer_config.json").is_file():
        return load_tokenizer(ModelSection(name_or_path=name), str(saved.folder.absolute()))
    template = trained.get("chat_template")
    return load_tokenizer(source, where, template if isinstance(template, str) else None)


def _own_processor(saved: SavedAdapter | ForeignAdapter | None) -> Path | None:
    """The adapter's folder, where it brought its processor along."""
    has_one = saved is not None and any((saved.folder / name).is_file() for name in PROCESSOR_FILES)
    return saved.folder if saved is not None and has_one else None


def _model(source: ModelSection, where: str, saved: SavedAdapter | ForeignAdapter | None) -> Any:
    from dude_peft.tuner.foreign import load_foreign
    from dude_peft.tuner.load import load_adapter
    from dude_peft.tuner.same_base import with_remedy

    model: Any = load_model(source, where, saved.quantization if saved else None)
    if saved is not None:
        with with_remedy("give the base model it was trained on with --base"):
            load = load_foreign if isinstance(saved, ForeignAdapter) else load_adapter
            model = load(model, saved.folder)
    return model.eval()


def _only_ends_(model: Any, tokenizer: Any) -> frozenset[int]:
    """Keep of the checkpoint's generation config nothing but the tokens that end an answer, and return these."""
    from dude_peft.measure.score import bare_generation_config, end_of_turn_ids

    ends = frozenset(end_of_turn_ids(model, tokenizer))
    _plain(model).generation_config = bare_generation_config(model, tokenizer)
    return ends


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def data_of_the_run(saved: SavedAdapter | ForeignAdapter | None) -> Mapping[str, Any]:
    """Section `data` of the run that made an adapter, as far as it is known: an adapter that was moved has a part.

    It is the adapter's own word, else that of run.json or config.yaml, which lie beside it, or above its checkpoint.
    """
    if saved is None:
        return {}
    if saved.writing is not None:
        return saved.writing
    adapter = saved.folder.absolute()
    if adapter.name != ADAPTER:
        return {}
    checkpoints = adapter.parent.parent
    folder = checkpoints.parent if checkpoints.name == CHECKPOINTS else adapter.parent
    try:
        data = (recorded_config(folder) or read_values(folder / RUN_CONFIG))["data"]
    except (ConfigError, KeyError, TypeError):
        return {}
    return data if isinstance(data, dict) else {}


def writing_of(trained: Mapping[str, Any]) -> tuple[str, str]:
    """The template and the word for special tokens in section `data` of a run; the usual ones where it has none."""
    kind, special_tokens = trained.get("template"), trained.get("special_tokens")
    return (
        kind if isinstance(kind, str) and kind in KINDS else "auto",
        special_tokens if isinstance(special_tokens, str) and special_tokens in SPECIAL_TOKENS else "text",
    )
