"""DudeConfig: PEFT's field names, checked when the object is made."""

from __future__ import annotations

import difflib
import functools
import math
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig
from peft.utils import WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from pydantic import TypeAdapter
from typing_extensions import override

from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.artifact.form import OUT_PROJECTION
from dude_peft.artifact.manifest import (
    CONFIG_FILE,
    FORMAT_VERSION,
    WEIGHTS_FILE,
    BaseRecord,
    Manifest,
    read_manifest,
    stamp,
)
from dude_peft.doors import check_folder, read_json
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.installing import PROJECT, install
from dude_peft.methods import METHODS, Method, SplitOptions
from dude_peft.names import instead_of, our_key
from dude_peft.parents import fits
from dude_peft.peft_file import is_foreign
from dude_peft.show import quoted, shown
from dude_peft.tuner.patterns import check_patterns, check_quantization, exactly, in_any_order, overlapping


class _PeftType(str):
    """PEFT's tables are keyed by an enum that cannot be extended; a string with the enum's attributes serves."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    @property
    def name(self) -> str:
        return self.value

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # as the enum's; `get_model_status` takes what is behind the dot


DUDE_TYPE = _PeftType("DUDE")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LARGEST_ALPHA = 1e38  # what float32 holds
# Keys of PEFT's LoraConfig that people bring along -> what does the same here.
_INSTEAD = {
    "trainable_token_indices": "train added tokens with the whole embedding: modules_to_save=['embed_tokens']",
}


def _ours(name: str, known: list[str]) -> str | None:
    """A hint at the key that other tools call `name`."""
    meant = our_key(name)
    if meant is None:
        return None
    key = meant.removeprefix("adapter.")
    return f"closest: {quoted(key)}" if key in known else "this is not a setting of an adapter; give it to the trainer"


def _names_unknown_keys(cls: type[DudeConfig]) -> type[DudeConfig]:
    """Answer a misspelt keyword with the closest key, and keep the generated signature."""
    generated = cls.__init__

    @functools.wraps(generated)
    def checked(self: DudeConfig, *args: Any, **settings: Any) -> None:
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                instead = _INSTEAD.get(name) or instead_of(name, "") or _ours(name, known) or closest(name, known)
                raise ConfigError(f"DudeConfig has no key {quoted(name)}; {instead}")
        generated(self, *args, **settings)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


@fits()
@_names_unknown_keys
@dataclass
class DudeConfig(PeftConfig):
    """Configuration of an adapter, for `peft.get_peft_model`.

        model = peft.get_peft_model(model, dude_peft.DudeConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        model.save_pretrained("my-adapter")

    Raises:
        ConfigError: a value that cannot work, or a key that does not exist.
    """

    method: str = "dude"
    """An entry of `dude_peft.METHODS`: dude, dora, pissa, lora, ...; `dude methods` compares them."""
    r: int = 16
    """Rank of the factors A (r, in) and B (out, r)."""
    lora_alpha: float = 16
    """The change is scaled by lora_alpha / r (rslora: lora_alpha / sqrt(r))."""
    lora_dropout: float = 0.0
    """Dropout on the input of the change; the base model's part never sees it."""
    target_modules: list[str] | str | None = None
    """Names of the layers (a list of name endings, a regular expression, "all-linear"); None: PEFT's choice."""
    exclude_modules: list[str] | str | None = None
    """Names that are left out though they match target_modules."""
    target_parameters: list[str] | None = None
    """Stacks of experts to adapt: names of parameters (experts, out, in), or their endings (mlp.experts.down_proj)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Regular expression of layer names -> r of these layers."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Regular expression of layer names -> lora_alpha of these layers."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the decoder layers to adapt; None: all."""
    layers_pattern: list[str] | str | None = None
    """Name of the list that layers_to_transform indexes, where it cannot be guessed."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train: none, all, or lora_only (those of adapted layers)."""
    norm_gradient: Literal["detached", "exact"] | None = None
    """Gradient through the row norm: detached (DoRA section 4.3) or exact; None: the method's own."""
    svd_tol: float = 1e-3
    """Relative gain of captured energy at which the top-r SVD stops; 0: a full SVD."""
    svd_seed: int = 0
    """Seed of the SVD's start block, and of random directions."""
    ensure_weight_tying: bool = False
    """Adapt a tied output layer and the embedding as one; set by itself where the embedding is a target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DUDE_TYPE
        self._loading: Manifest | None = None
        self._base: BaseRecord | None = None
        self._beside: dict[str, tuple[tuple[int, int], TensorPrint]] = {}
        self._left_out: tuple[str, ...] = ()
        self._is_sent = False  # by another process, so its tensors wait on the meta device
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        for name in ("target_parameters", "modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (tuple, range, set, frozenset)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        for name in _PATTERNS:
            setattr(self, name, getattr(self, name) or {})
        _check_kinds(self)
        _check(self)

    @property
    def split_options(self) -> SplitOptions:
        """Settings of the split."""
        return SplitOptions(svd_tol=self.svd_tol, svd_seed=self.svd_seed)

    @property
    def spec(self) -> Method:
        """The method's entry in the table."""
        return METHODS[self.method]

    @property
    def is_stock(self) -> bool:
        """Whether its files are a stock LoRA or DoRA; else they are under a type that stock PEFT refuses.

        Of a new adapter it is known once its layers are.
        """
        return self.spec.ranked and not (self.target_parameters or self.ensure_weight_tying or self._fused)

    @property
    def _fused(self) -> bool:
        """Whether it adapts an nn.MultiheadAttention."""
        return any(name.endswith(OUT_PROJECTION) for name in self._layers())

    def rank_and_alpha(self, layer_name: str) -> tuple[int, float]:
        """Rank r and lora_alpha of one layer, its patterns considered; both of an attention go by its name."""
        layer_name = layer_name.removesuffix(OUT_PROJECTION)
        r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer_name), self.r)
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer_name), self.lora_alpha)
        return r, alpha

    def stock(self) -> LoraConfig:
        """The configuration under which stock PEFT computes the same function from the saved tensors.

        Rank and alpha are doubled where the change has rank 2r, so the scaling stays. rsLoRA's scaling is folded
        into alpha, because some servers ignore its flag.

        Raises:
            ConfigError: the method has no rank, or a magnitude of experts, so there is none.
        """
        if self.target_parameters and self.spec.normalised:
            raise ConfigError(
                f"method {self.method!r} gives experts a magnitude, which stock PEFT's target_parameters have not; use "
                "--to merged or gguf"
            )
        if self.ensure_weight_tying:
            raise ConfigError(
                "stock PEFT keeps the factors of tied layers twice, and unties them when it merges; use --to merged"
            )
        if self._fused:  # its PR 3774
            raise ConfigError(
                "stock PEFT 0.21 refuses a magnitude on nn.MultiheadAttention, and adds the change of its output "
                "projection twice; use --to merged"
            )
        if not self.spec.ranked:
            raise ConfigError(
                f"method {self.method!r} trains whole matrices, which a stock adapter cannot hold; use --to merged or "
                "gguf, or --to lora:K for the nearest LoRA"
            )
        multiple = self.spec.multiple
        rank_pattern: dict[str, int] = {name: multiple * r for name, r in self._in_any_order("rank_pattern").items()}
        alphas = self._in_any_order("alpha_pattern")
        alpha_pattern: dict[str, float] = {name: multiple * alpha for name, alpha in alphas.items()}
        lora_alpha = multiple * self.lora_alpha
        if self.spec.rank_stabilized:
            lora_alpha *= math.sqrt(self.r)
            # alpha' = alpha sqrt(r) depends on both patterns, so they are written out layer by layer.
            own = {exactly(name): self.rank_and_alpha(name) for name in self._matched()}
            own = {name: pair for name, pair in own.items() if pair != (self.r, self.lora_alpha)}
            rank_pattern = {name: r for name, (r, _) in own.items()}
            alpha_pattern = {name: alpha * math.sqrt(r) for name, (r, alpha) in own.items()}
        stock = LoraConfig(
            r=multiple * self.r,
            lora_alpha=_int_if_whole(lora_alpha),  # type: ignore[arg-type]  # PEFT computes with floats too
            lora_dropout=self.lora_dropout,
            target_modules=_sorted(self.target_modules),
            target_parameters=self._stock_parameters(),
            exclude_modules=_sorted(self.exclude_modules),
            rank_pattern=rank_pattern,
            alpha_pattern={name: _int_if_whole(alpha) for name, alpha in alpha_pattern.items()},
            modules_to_save=_unique(self.modules_to_save),
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            bias=self.bias,
            use_dora=self.spec.normalised,
            init_lora_weights=True,
            task_type=self.task_type,
            base_model_name_or_path=self.base_model_name_or_path,
            revision=self.revision,
            inference_mode=self.inference_mode,
        )
        # LoraConfig makes sets of these, whose order in the file would change from process to process.
        stock.target_modules, stock.exclude_modules = _sorted(stock.target_modules), _sorted(stock.exclude_modules)
        return stock

    def _stock_parameters(self) -> list[str] | None:
        """Of stacks in some layers alone the whole names: stock PEFT does not look at layers_to_transform there."""
        wanted = self.target_parameters
        if wanted is None or self.layers_to_transform is None:
            return wanted
        return [name for name in self._layers() if any(name == one or name.endswith(f".{one}") for one in wanted)]

    @override
    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json for stock PEFT, and the manifest into the tensors beside it.

        PEFT calls this after it has written adapter_model.safetensors, so its own `save_pretrained`, the Trainer's
        checkpoints and a hub upload all end up with the same two files.

        Raises:
            ArtifactError: the tensors were written as a pickle, which we neither write nor read.
        """
        if self.is_stock:
            self.stock().save_pretrained(save_directory, **kwargs)
        else:  # under a type that stock PEFT does not know, and refuses
            super().save_pretrained(save_directory, **kwargs)
        directory = Path(save_directory)
        if self._base is None:
            return
        if (directory / WEIGHTS_FILE).is_file():
            stamp(directory, self._manifest_fields(), self._base, self._left_out)
        elif (directory / WEIGHTS_NAME).is_file():
            raise ArtifactError(f"'{directory / WEIGHTS_NAME}' is a pickle; save with safe_serialization=True")
        self._base = None

    @classmethod
    @override
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> DudeConfig:
        """Configuration of a saved adapter, its files checked; adding it to a model needs no SVD.

        Args:
            pretrained_model_name_or_path: folder, or hub id.
            subfolder: folder inside it.
            **kwargs: revision, token and cache_dir for the hub.

        Raises:
            ArtifactError: a file is missing, damaged, edited, or not ours.
        """
        directory = adapter_folder(str(pretrained_model_name_or_path), subfolder, kwargs)
        manifest = read_manifest(directory)
        if is_foreign(manifest.config.get("method")):
            raise ArtifactError(
                f"{shown(directory, 300)} is an adapter of stock PEFT ({shown(manifest.config['method'], 60)}), which "
                "peft.PeftModel loads; dude chat, generate, eval, merge and verify take it"
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(manifest.config) - known)
        if unknown:
            raise ArtifactError(
                f"'{directory / WEIGHTS_FILE}': the manifest has settings unknown to this version "
                f"({', '.join(unknown)}); upgrade with: {install(PROJECT, option='-U')}"
            )
        config = cls._from_manifest(manifest.config, directory / WEIGHTS_FILE)
        try:
            stock = read_json(directory / CONFIG_FILE)  # what PEFT reads
            for settings in (vars(config), stock):
                check_patterns(settings, manifest.base)
            check_quantization((manifest.quantization or {}).get("config", {}), manifest.base)
        except (ConfigError, TypeError, AttributeError) as error:  # in a file it is forged: training refuses such ones
            raise ArtifactError(f"{shown(directory / WEIGHTS_FILE, 300)}: {error}") from error
        config._loading = manifest
        config._check_stock(stock, directory)
        config._warn_of_lost_order(directory)
        return config

    @classmethod
    def _from_manifest(cls, settings: dict[str, Any], where: Path) -> DudeConfig:
        """A configuration from a file, in which nothing has to have the type it should have."""
        try:
            for name, value in settings.items():
                _type_of(name).validate_python(value, strict=name not in ("task_type", "peft_type"))
            return cls(**settings)
        except ValueError as error:  # pydantic's too; ConfigError, where a value cannot work
            reason = str(error).splitlines()[0] if isinstance(error, ConfigError) else f"{name} is {value!r:.80}"
            raise ArtifactError(
                f"'{where}': the manifest's settings cannot be used ({reason}); copy it again"
            ) from error

    @override
    def to_dict(self) -> dict[str, Any]:
        """Fields as plain JSON values."""
        return {f.name: _sorted(getattr(self, f.name)) for f in fields(self)}

    def _manifest_fields(self) -> dict[str, Any]:
        once = {"modules_to_save": _unique(self.modules_to_save)}
        patterns = {name: self._in_any_order(name) for name in _PATTERNS}
        fields = {**self.to_dict(), **once, **patterns, "peft_type": DUDE_TYPE.value}
        for name in ("target_parameters", "ensure_weight_tying"):  # which versions before do not know
            if not fields[name]:
                del fields[name]
        return fields

    def _in_any_order(self, key: str) -> dict[str, Any]:
        """rank_pattern or alpha_pattern as files keep it."""
        return in_any_order(getattr(self, key), self._matched())

    def _layers(self) -> list[str]:
        """Names of the adapted layers, as far as a model or a file has told them."""
        if self._base is not None:
            return list(self._base.layers)
        return [] if self._loading is None else list(self._loading.base)

    def _matched(self) -> list[str]:
        """Of these the names that patterns are compared with."""
        return [name for name in self._layers() if not name.endswith(OUT_PROJECTION)]

    def _check_stock(self, found: dict[str, Any], directory: Path) -> None:
        """The two files of an adapter say the same of its scale, or one of them was forged. Raises ArtifactError."""
        assert self._loading is not None
        if self.is_stock:
            keys = ["r", "lora_alpha", "use_dora"]
            if self._loading.format_version >= FORMAT_VERSION:  # earlier ones wrote patterns in another order
                keys += _PATTERNS
            wanted = self.stock().to_dict()
        else:
            keys = ["method", "peft_type", "target_parameters"]
            wanted = self.to_dict()
        differing = [key for key in keys if found.get(key) != wanted[key]]
        if differing or self.target_modules is None:
            what = differing[0] if differing else "target_modules"
            raise ArtifactError(
                f"{shown(directory / CONFIG_FILE, 300)}: its {what} is {shown(repr(found.get(what)))}, but the "
                f"manifest in {WEIGHTS_FILE} says otherwise; copy both files again"
            )

    def _warn_of_lost_order(self, directory: Path) -> None:
        """Files of before format 4 have the patterns sorted, whatever their order was in training."""
        for key in _PATTERNS:
            if found := overlapping(getattr(self, key), self._matched()):
                layer, (one, other, *_) = found
                warnings.warn(
                    f"adapter {shown(directory, 300)}: {quoted(one)} and {quoted(other)} of its {key} both match "
                    f"{quoted(layer, 100)}, but the file does not say which came first in training; the layer's scale "
                    "may differ",
                    stacklevel=4,
                )


@functools.cache  # made in a hundred times the time that a check takes
def _type_of(name: str) -> TypeAdapter[Any]:
    """The type of a field."""
    return TypeAdapter(get_type_hints(DudeConfig)[name])


def closest(name: str, known: Any) -> str:
    """A hint at the closest of the known names."""
    near = difflib.get_close_matches(name, [str(k) for k in known], n=3, cutoff=0.5)
    if near:
        return f"closest: {', '.join(map(quoted, near))}"
    return f"known: {shown(', '.join(sorted(map(str, known))), None)}"


def adapter_folder(name: str, subfolder: str | None = None, options: dict[str, Any] | None = None) -> Path:
    """The adapter's folder; from the hub, both files are fetched first.

    Args:
        name: folder or hub id.
        subfolder: folder inside it.
        options: revision, token and cache_dir for the hub; others are ignored.

    Raises:
        ArtifactError: it is neither, or a file in it is none that can be read.
    """
    directory = Path(name) / (subfolder or "")
    if directory.is_dir():
        check_folder(directory)
        return directory
    download = {
        key: (options or {})[key] for key in ("revision", "token", "cache_dir") if (options or {}).get(key) is not None
    }
    try:
        hf_hub_download(name, CONFIG_FILE, subfolder=subfolder, **download)
        directory = Path(hf_hub_download(name, WEIGHTS_FILE, subfolder=subfolder, **download)).parent
    except Exception as error:  # the hub client's errors have no common base
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"'{shown(name, 300)}' is not a folder, and cannot be downloaded from the hub; check the path, or connect "
            f"to the hub ({shown(first, 200)})"
        ) from error
    check_folder(directory)
    return directory


def _check_kinds(config: DudeConfig) -> None:
    """Of a string or another kind PEFT makes something that nobody meant, or an error of its own."""
    names = config.modules_to_save
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"modules_to_save={shown(repr(names))}; it must be a list of names, such as ['lm_head']")
    names = config.target_parameters
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise ConfigError(
            f"target_parameters={shown(repr(names))}; it must be a list of names, such as ['mlp.experts.down_proj']"
        )
    layers = config.layers_to_transform
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(_is_int(layer) for layer in numbers):
        raise ConfigError(
            f"layers_to_transform={shown(repr(layers))}; it is the number of a layer, or a list of numbers"
        )
    for name in _PATTERNS:
        patterns = getattr(config, name)
        if not isinstance(patterns, dict) or not all(isinstance(key, str) for key in patterns):
            raise ConfigError(f"{name}={shown(repr(patterns))}; it maps patterns of layer names to numbers")


def _check(config: DudeConfig) -> None:
    if config.method not in METHODS:
        raise ConfigError(f"method={shown(repr(config.method))} is unknown; {closest(str(config.method), METHODS)}")
    for name, r in [("r", config.r), *((f"rank_pattern[{k!r}]", v) for k, v in config.rank_pattern.items())]:
        if not _is_int(r) or r < 1:
            raise ConfigError(f"{name}={r!r}; a rank is a whole number of at least 1, usually 8 to 64")
    alphas = [
        ("lora_alpha", config.lora_alpha),
        *((f"alpha_pattern[{k!r}]", v) for k, v in config.alpha_pattern.items()),
    ]
    for name, alpha in alphas:
        if not _is_number(alpha) or not 0 < alpha <= _LARGEST_ALPHA:
            raise ConfigError(f"{name}={alpha!r}; it is a number above 0, often r or 2 r")
    if pattern := next((name for name in _PATTERNS if getattr(config, name) and not config.spec.ranked), None):
        raise ConfigError(f"{pattern}: method {config.method!r} has no rank and no alpha; leave it out")
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"lora_dropout={config.lora_dropout!r}; it is a probability from 0 to below 1")
    config.norm_gradient = config.spec.gradient_through_norm(config.norm_gradient)
    if config.target_parameters:
        _check_stacks(config)
    if config.bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"bias={config.bias!r}; it is 'none', 'all' or 'lora_only'")
    if not _is_number(config.svd_tol) or not 0 <= config.svd_tol < 1:
        raise ConfigError(f"svd_tol={config.svd_tol!r}; it is a number from 0 (full SVD) to below 1, usually 1e-3")
    if not _is_int(config.svd_seed) or not 0 <= config.svd_seed < 2**63:
        raise ConfigError(f"svd_seed={config.svd_seed!r}; it is a whole number from 0 to 2**63 - 1")
    regex = isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear"
    if regex and config.layers_to_transform is not None:
        raise ConfigError(
            "layers_to_transform needs a list of target_modules; a regular expression can name the layers itself"
        )
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise ConfigError("layers_pattern is set without layers_to_transform; set both or neither")


def _check_stacks(config: DudeConfig) -> None:
    """What a stack of experts cannot have beside it."""
    if not config.spec.stackable:
        able = ", ".join(name for name, method in METHODS.items() if method.stackable)
        raise ConfigError(
            f"target_parameters: method {config.method!r} has no factors A and B for every expert; choose one of {able}"
        )
    for key, value, usual in (
        ("lora_dropout", config.lora_dropout, 0),
        ("bias", config.bias, "none"),
    ):
        if value != usual:
            raise ConfigError(
                f"{key}={shown(repr(value))} has no meaning for experts (target_parameters); leave it out"
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _int_if_whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _unique(names: list[str] | None) -> list[str] | None:
    """Each name once: PEFT adds the head of a task to modules_to_save whenever it makes a model."""
    return names if names is None else list(dict.fromkeys(names))


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
