"""The manifest: what our loader has to know beyond the tensors, inside the safetensors file's own metadata.

The directory is a stock PEFT adapter (adapter_config.json + adapter_model.safetensors). The manifest sits in the header
of the safetensors file, where stock readers do not look, so one file carries it all: the DuDe configuration, the
sha256 of every tensor, what the base model was (`BaseRecord`), and the sha256 of adapter_config.json and of the
tokenizer's files, so that a changed or foreign part of the folder is noticed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.fingerprint import TensorPrint, is_print
from dude_peft.artifact.form import OUT_PROJECTION
from dude_peft.artifact.header import DTYPES, StoredTensor, pieces, read_header, stored_sha256
from dude_peft.artifact.sealed import content_sha256, file_sha256
from dude_peft.core.threads import single_threaded_pool
from dude_peft.doors import open_file, parse_json, read_json
from dude_peft.errors import ArtifactError
from dude_peft.installing import PROJECT, install
from dude_peft.methods import METHODS
from dude_peft.peft_file import is_foreign
from dude_peft.show import shown
from dude_peft.version import __version__

# 1: base weights hashed with sha256; 2: the magnitude under a name that transformers does not read; 3: of the base only
# the adapted weights and embeddings, no tokenizer.
FORMAT_VERSION = 4
# Of methods whose change is made out of small tensors, which readers of format 4 do not know.
DELTA_FORMAT_VERSION = 5
# Of methods without a rank, which are no stock adapters.
WHOLE_FORMAT_VERSION = 6
# Of adapters that stock PEFT made; the rest of what they remember is all of the base model.
FOREIGN_FORMAT_VERSION = 7
# Of adapters with stacks of experts, which readers before do not know.
STACK_FORMAT_VERSION = 8
# Of adapters that say how their run wrote rows, which readers before do not know.
WRITING_FORMAT_VERSION = 9
# Of adapters of nn.MultiheadAttention, and of tied embeddings, which readers before do not know.
JOINT_FORMAT_VERSION = 10
_READ = (
    3, FORMAT_VERSION, DELTA_FORMAT_VERSION, WHOLE_FORMAT_VERSION, FOREIGN_FORMAT_VERSION, STACK_FORMAT_VERSION,
    WRITING_FORMAT_VERSION, JOINT_FORMAT_VERSION,
)  # fmt: skip
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT's: where the base model stands
_SHARES = 16
FLOATS = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
TOKENIZER_FILES = (
    "*token*.json", "chat_template*", "*.jinja", "additional_chat_templates/*", "vocab*", "merges*", "*.model",
    "*.tiktoken", "*.spm", "*processor_config.json",
)  # fmt: skip
"""What transformers may read a tokenizer from, or a processor of images, of which it is a part."""
_KEY, _SEAL = "dude", "dude_sha256"


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter remembers of the base model that it was trained on."""

    layers: dict[str, TensorPrint]
    """Name of every adapted module -> fingerprint of its weight."""
    beside: dict[str, TensorPrint] = field(default_factory=dict)
    """Name of every other tensor that the model computes with -> its fingerprint."""
    settings: dict[str, Any] | None = None
    """The model's configuration, as far as it decides what the model computes (`base_settings.py`)."""
    quantization: dict[str, Any] | None = None
    """How it was quantised: `config`, transformers' own settings, and `dtype` of the rest; None: not."""

    @property
    def dtype(self) -> str | None:
        """The one dtype of all adapted weights (of all, where these are not known); None of several, or packed ones."""
        seen = self.layers or {name: one for name, one in self.beside.items() if len(one["shape"]) > 1}
        dtypes = {one["dtype"] for one in seen.values()}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= FLOATS else None


@dataclass(frozen=True)
class Manifest:
    """What the metadata of an adapter file says."""

    config: dict[str, Any]
    """Fields of DudeConfig."""
    base: dict[str, TensorPrint]
    """Name of every adapted module of the base model -> fingerprint of its weight."""
    tensors: dict[str, str]
    """Name of every tensor in the file -> sha256 of its values."""
    config_sha256: str
    """sha256 of adapter_config.json's content."""
    quantization: dict[str, Any] | None = None
    beside: dict[str, TensorPrint] | None = None
    settings: dict[str, Any] | None = None
    files: dict[str, str] | None = None
    """Name of every file of the tokenizer beside it -> sha256; None: nothing is known of them."""
    writing: dict[str, str] | None = None
    """How its run wrote rows, `template` and `special_tokens`; None: as its tokenizer alone tells, and text as text."""
    format_version: int = FORMAT_VERSION
    dude_version: str = __version__

    @property
    def record(self) -> BaseRecord:
        """What it says of the base model."""
        return BaseRecord(self.base, self.beside or {}, self.settings, self.quantization)


def stamp(
    directory: Path,
    config: dict[str, Any],
    base: BaseRecord,
    left_out: tuple[str, ...] = (),
) -> None:
    """Write the manifest into an adapter directory that PEFT has just saved.

    Weights of the base model that PEFT put into the file beside an adapted output layer are left out: the base is
    untouched, and the fingerprint stands for it.

    Args:
        directory: holds adapter_model.safetensors and adapter_config.json.
        config: fields of DudeConfig.
        base: what is remembered of the base model; what is said of saved tensors is left out.
        left_out: beginnings of the names of tensors that PEFT put into the file and no loader needs.

    Raises:
        OSError: the directory cannot be written; the file that was there stays.
    """
    path = directory / WEIGHTS_FILE
    kept = [stored for name, stored in read_header(path).tensors.items() if not name.startswith(left_out)]
    hashes = _sha256(kept)
    saved = {name.removeprefix(_PREFIX).replace(".base_layer.", ".") for name in hashes}
    # Of tied matrices PEFT saves one, and both go with it.
    tied = [base.beside[name] for name in saved & base.beside.keys() if len(base.beside[name]["shape"]) > 1]
    beside = {name: seen for name, seen in base.beside.items() if name not in saved and seen not in tied}
    metadata = sealed_metadata(config, replace(base, beside=beside), hashes, directory / CONFIG_FILE)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for stored in kept:  # as safetensors orders them
        start, end = end, end + stored.size
        header[stored.name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, end]}
    replace_file(path, chain([sorted_header(header)], (view for _, view in pieces(kept))))


def sealed_metadata(
    config: dict[str, Any],
    base: BaseRecord,
    tensors: dict[str, str],
    config_file: Path,
) -> dict[str, str]:
    """Metadata of an adapter file: the manifest and its hash.

    Args:
        config: fields of DudeConfig.
        base: what is remembered of the base model.
        tensors: name of every tensor in the file -> sha256 of its values.
        config_file: the adapter_config.json that goes with it.
    """
    digest = _json_sha256(config_file)
    manifest = Manifest(config, base.layers, tensors, digest, base.quantization, base.beside or None, base.settings)
    if is_foreign(config.get("method")):
        manifest = replace(manifest, format_version=FOREIGN_FORMAT_VERSION)
    method = METHODS.get(config.get("method", ""))
    if method is not None and method.delta is not None:
        version = DELTA_FORMAT_VERSION if method.ranked else WHOLE_FORMAT_VERSION
        manifest = replace(manifest, format_version=version)
    if config.get("target_parameters"):
        manifest = replace(manifest, format_version=STACK_FORMAT_VERSION)
    if config.get("ensure_weight_tying") or any(name.endswith(OUT_PROJECTION) for name in base.layers):
        manifest = replace(manifest, format_version=JOINT_FORMAT_VERSION)
    return _sealed(manifest)


def _sealed(manifest: Manifest) -> dict[str, str]:
    fields = {name: value for name, value in vars(manifest).items() if value is not None}
    text = json.dumps(fields, sort_keys=True)
    return {"format": "pt", _KEY: text, _SEAL: _text_sha256(text)}


def seal_of(directory: Path) -> str:
    """The hash of a saved adapter's manifest, which covers its tensors, settings and tokenizer; nothing is checked.

    Raises:
        ArtifactError: its file cannot be read.
    """
    return read_header(directory / WEIGHTS_FILE).metadata.get(_SEAL, "")


def is_foreign_adapter(directory: Path) -> bool:
    """Whether a folder is said to hold an adapter that stock PEFT made, trained by `dude train`; nothing is checked."""
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        return False
    try:
        config = parse_json(read_header(path).metadata.get(_KEY, "{}"))["config"]
        return is_foreign(config.get("method"))
    except (ArtifactError, AttributeError, KeyError, TypeError, ValueError):
        return False  # who reads it says so


def cover_tokenizer(directory: Path, writing: dict[str, str] | None = None) -> None:
    """Enter the tokenizer's files that lie beside a saved adapter into its manifest.

    Args:
        directory: of the adapter.
        writing: how the run wrote rows, where the tokenizer alone would not tell (`Manifest.writing`).

    Raises:
        OSError: the directory cannot be written; the file that was there stays.
    """
    path = directory / WEIGHTS_FILE
    manifest = _parse(read_header(path).metadata[_KEY], path)
    files = {name: file_sha256(directory / name) for name in tokenizer_files(directory)}
    version = max(manifest.format_version, WRITING_FORMAT_VERSION if writing is not None else 0)
    covered = replace(manifest, files=files, writing=writing, format_version=version)
    with open_file(path) as file:
        data = file.read()
    replace_file(path, _with_sorted_header(data, _sealed(covered)))


def tokenizer_files(directory: Path) -> list[str]:
    """Names of the files in a folder that transformers would read a tokenizer from, templates included."""
    paths = [path for pattern in TOKENIZER_FILES for path in directory.glob(pattern)]
    return sorted({path.relative_to(directory).as_posix() for path in paths if not path.is_dir()})


def check_complete(directory: Path, manifest: Manifest) -> None:
    """Raises ArtifactError where a file of the tokenizer is not there; `read_manifest` lets a hub's cache lack some."""
    found = tokenizer_files(directory)
    if absent := [name for name in manifest.files or () if name not in found]:
        raise ArtifactError(f"{shown(directory / absent[0], 300)} is missing; copy the tokenizer again")


def _check_tokenizer(directory: Path, manifest: Manifest) -> None:
    """The tokenizer's files that are there against the manifest, where that knows of them."""
    if manifest.files is None:
        return
    found = tokenizer_files(directory)
    if added := [name for name in found if name not in manifest.files]:
        raise ArtifactError(f"{shown(directory / added[0], 300)} was not saved with this adapter; remove it")
    for name in found:
        digest = manifest.files[name]
        if not (directory / name).is_file() or file_sha256(directory / name) != digest:
            raise ArtifactError(
                f"{shown(directory / name, 300)}: the tokenizer's file was changed after saving; copy it again"
            )


def read_manifest(directory: Path) -> Manifest:
    """Manifest of an adapter directory, with every tensor and the configuration checked against it.

    Raises:
        ArtifactError: a file is missing, damaged, edited, from another format version, or not ours; of the tokenizer's
            files, those that are there count.
    """
    path = directory / WEIGHTS_FILE
    for wanted in (path, directory / CONFIG_FILE):
        if not wanted.is_file():
            raise ArtifactError(_missing(directory, wanted))
    header = read_header(path)
    if _KEY not in header.metadata:
        raise ArtifactError(f"'{path}' has no DuDe manifest, so DuDe did not save it; load it with peft.PeftModel")
    sealed = {"format": "pt", _KEY: header.metadata[_KEY], _SEAL: _text_sha256(header.metadata[_KEY])}
    if header.metadata != sealed:
        raise ArtifactError(f"'{path}': the DuDe manifest is damaged (its hash differs); copy the file again")
    manifest = _parse(header.metadata[_KEY], path)
    _check_names(set(header.tensors), set(manifest.tensors), path)
    for name, digest in _sha256(list(header.tensors.values())).items():
        if digest != manifest.tensors[name]:
            raise ArtifactError(
                f"'{path}': tensor '{name}' differs from what was saved; copy the file again, or save it again"
            )
    if _json_sha256(directory / CONFIG_FILE) != manifest.config_sha256:
        raise ArtifactError(
            f"'{directory / CONFIG_FILE}' was changed after saving, or belongs to another adapter; restore it"
        )
    _check_tokenizer(directory, manifest)
    return manifest


def _sha256(tensors: list[StoredTensor]) -> dict[str, str]:
    shares = [tensors[first::_SHARES] for first in range(min(_SHARES, len(tensors)))]  # a task a tensor costs more
    with single_threaded_pool(len(shares)) as pool:  # reading and hashing let other threads run
        return {name: digest for found in pool.map(stored_sha256, shares) for name, digest in found.items()}


def _missing(directory: Path, wanted: Path) -> str:
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles and wanted.name == WEIGHTS_FILE:
        return (
            f"'{directory}' holds {pickles[0]}, a pickle, and no {WEIGHTS_FILE}; DuDe never reads pickles: load it "
            "with the PEFT that wrote it, and save it as safetensors"
        )
    return f"'{wanted}' is missing; an adapter folder has {CONFIG_FILE} and {WEIGHTS_FILE}"


def _parse(text: str, path: Path) -> Manifest:
    try:
        fields = parse_json(text)
        version = fields["format_version"]
        if version not in _READ:
            raise ArtifactError(
                f"'{path}' has adapter format {version}, but dude-peft {__version__} reads formats up to "
                f"{_READ[-1]}; "
                + (
                    "peft.PeftModel loads it for inference, but training has to start over"
                    if version in (1, 2)
                    else f"upgrade with: {install(PROJECT, option='-U')}"
                )
            )
        manifest = Manifest(**fields)
        if not all(isinstance(part, dict) for part in (manifest.config, manifest.base, manifest.tensors)):
            raise TypeError("config, base and tensors must be objects")
        parts = (manifest.settings, manifest.files, manifest.writing)
        if not all(isinstance(part, dict) for part in parts if part is not None):
            raise TypeError("settings, files and writing must be objects")
        if any(name.startswith("/") or ".." in name or "\\" in name for name in manifest.files or ()):
            raise TypeError("files must be in the adapter's folder")
        if not _is_quantization(manifest.quantization):
            raise TypeError("quantization must have a config and a float dtype")
        prints = [*manifest.base.values(), *(manifest.beside or {}).values()]
        if not all(is_print(entry) for entry in prints):
            raise TypeError("a fingerprint must have dtype, shape and xxh3_128")
    except ArtifactError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"'{path}': the DuDe manifest is damaged ({error}); copy the file again") from error
    return manifest


def _is_quantization(found: Any) -> bool:
    if found is None:
        return True
    return isinstance(found, dict) and isinstance(found.get("config"), dict) and found.get("dtype") in FLOATS


def _check_names(found: set[str], recorded: set[str], path: Path) -> None:
    missing, extra = sorted(recorded - found), sorted(found - recorded)
    if missing or extra:
        parts = [
            f"{len(names)} {what}, first: {', '.join(names[:5])}"
            for what, names in (("missing", missing), ("not recorded", extra))
            if names
        ]
        raise ArtifactError(
            f"'{path}': its tensors are not the ones that were saved ({'; '.join(parts)}); copy it again"
        )


def _json_sha256(path: Path) -> str:
    """Hash of the content, not of its layout: whitespace and the order of keys do not count."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read as JSON ({error}); copy it again") from error
    return content_sha256(content)


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _with_sorted_header(data: bytes, metadata: dict[str, str] | None = None) -> bytes:
    """The same file, with other metadata if some are given, and a sorted header.

    safetensors orders the metadata by chance, and equal content shall be equal bytes.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if metadata is not None:
        header["__metadata__"] = metadata
    return sorted_header(header) + data[8 + size :]


def sorted_header(content: dict[str, Any]) -> bytes:
    """Head of a safetensors file: its length, and the header as sorted JSON."""
    header = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
