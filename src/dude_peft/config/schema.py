"""What a run is: one frozen dataclass-like model a section, a docstring under each field.

The same objects are the YAML file, the `--set` options, the `config.yaml` beside the result and the record in
`report.json`. Names are PEFT's and Trainer's own. Nothing here imports torch or transformers, so that a typo in a
configuration is reported at once; `reading.load_config` turns what pydantic finds into one line.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from math import gcd
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from dude_peft.config.idle import idle_key
from dude_peft.config.trainer_fields import fault
from dude_peft.data.columns import Columns as ColumnNames
from dude_peft.errors import ConfigError
from dude_peft.peft_file import PREFIX, checked_settings, is_foreign, read_peft_file
from dude_peft.reward_file import sealed_file
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL, SCORES, TaskType

DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,4})?")
"""A number as everybody reads it: in ASCII, without leading zeros, which some take for octal."""


def _number_from_text(value: Any) -> Any:
    """YAML 1.1 readers give `1e-4` as text; a decimal number written as text is a number."""
    return float(value) if isinstance(value, str) and DECIMAL.fullmatch(value) else value


def _expand_home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _known_columns(value: dict[str, str]) -> dict[str, str]:
    try:
        ColumnNames(value)
    except ConfigError as error:
        raise ValueError(f"key {error}") from None
    return value


def _template_text(value: str) -> str:
    from dude_peft.data.chat_template import chat_template

    try:
        return chat_template(value)
    except ConfigError as error:
        raise ValueError(f"key 'data.chat_template': {error}") from None


LARGEST_COUNT = 10**9  # far above any real run, far below what overflows an int64 further down

_LARGEST_NUMBER = 1e38  # what float32 holds


def _in_float32(value: float) -> float:
    """Beyond it, tensors overflow somewhere on the way. No bound in the schema, which would be noise at every key."""
    if value > _LARGEST_NUMBER:
        raise PydanticKnownError("less_than_equal", {"le": _LARGEST_NUMBER})
    if value < -_LARGEST_NUMBER:
        raise PydanticKnownError("greater_than_equal", {"ge": -_LARGEST_NUMBER})
    return value


_QUANTITY = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)([kKmMbB%]?)")
_UNITS = {"": 1.0, "k": 10**3, "m": 10**6, "b": 10**9}


def _quantity(value: Any) -> Any:
    """A share as text, as 0.5%; a count as a whole number, whether it was written 2000000 or 2M."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    found = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is not None:
        number, unit = float(found[1]), found[2].lower()
        if unit == "%" and 0 < number <= 100:
            return f"{found[1]}%"
        if unit != "%" and (total := number * _UNITS[unit]) >= 1 and total.is_integer():
            return int(total)
    raise ValueError(
        "key 'adapter.budget.parameters': expected a share of the model's parameters (0.5%) or a count (2M, 2000000), "
        f"got {shown(repr(value), 120)}"
    )


Number = Annotated[float, BeforeValidator(_number_from_text), Field(allow_inf_nan=False), AfterValidator(_in_float32)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
STRONGEST = 1000
Strength = Annotated[Number, Field(gt=0, le=STRONGEST)]
"""Of a term in a loss. Far larger ones overflow there, and the learning rate would be blamed."""
StrengthOrZero = Annotated[Number, Field(ge=0, le=STRONGEST)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Epochs = Annotated[Number, Field(gt=0, le=100_000)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Text], Field(min_length=1)]
Source = Annotated[Text, BeforeValidator(_expand_home)]
Columns = Annotated[dict[Text, Text], AfterValidator(_known_columns)]
ChatTemplate = Annotated[Source, AfterValidator(_template_text)]
Quantity = Annotated[int | str, BeforeValidator(_quantity)]
# 16 stays the int that PEFT's config is written with; 16.5 stays a float.
_AsWritten = PlainSerializer(lambda value: int(value) if value == int(value) else value)
Alpha = Annotated[Positive, _AsWritten]
Bound = Annotated[NonNegative, _AsWritten]


JUDGED = ("rewards/accuracies", "rewards/margins")
"""What a run measures of held-out preferences, and may choose the best adapter by."""
REWARD = "reward"
"""What it measures of the answers to held-out rows where train.objective is grpo."""
HELD_OUT = ("loss", *JUDGED, REWARD)
"""What a run measures of held-out rows."""


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes after reading, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


BITSANDBYTES = ("nf4", "fp4", "int8")
"""Formats of `model.quantization` that bitsandbytes computes."""


def _known_format(value: str) -> str:
    if value in ("none", *BITSANDBYTES) or re.fullmatch(r"torchao:[a-z0-9_]+", value):
        return value
    raise ValueError(
        f"key 'model.quantization': {shown(value)!r} is no format; choose none, nf4, fp4, int8 or torchao:SCHEME, such "
        "as torchao:int8_weight_only"
    )


class QuantizationSection(Section):
    """How the frozen weights are quantised."""

    method: Annotated[Text, AfterValidator(_known_format)]
    """`nf4`, `fp4` or `int8` of bitsandbytes, `torchao:SCHEME` (torchao:int8_weight_only), or `none`."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the products with 4-bit weights; null is that of the model."""

    double_quantization: bool = False
    """Quantise the scales of 4-bit weights too, which saves 0.4 bits a weight."""

    @model_validator(mode="after")
    def _of_four_bits(self) -> QuantizationSection:
        if self.method not in ("nf4", "fp4") and (self.compute_dtype is not None or self.double_quantization):
            raise ValueError("compute_dtype and double_quantization are for nf4 and fp4; leave them out")
        return self


def _as_method(value: Any) -> Any:
    """A bare word is a method."""
    return {"method": value} if isinstance(value, str) else value


Quantization = Annotated[
    QuantizationSection | None,
    BeforeValidator(_as_method, json_schema_input_type=Text | QuantizationSection | None),
]


def _as_text(value: Any) -> Any:
    """Devices by their number are written 0 or "0"; JSON has keys of text alone."""
    return {str(key): each for key, each in value.items()} if isinstance(value, dict) else value


_Placed = Annotated[dict[str, Text | CountOrZero], BeforeValidator(_as_text), Field(min_length=1)]


Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]


LigerKernel = Literal["rms_norm", "fused_linear_cross_entropy"]
"""Others of Liger's (rope, swiglu, geglu) write into the outputs of adapted layers, which gradients may need."""


SHARED_OUT = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of model.device_map by which accelerate decides what is where."""


class ModelSection(Section):
    """The pretrained model to start from."""

    name_or_path: Source
    """A model id on the hub, a local folder, or `package:NAME`: the folder of an installed Python package."""

    gguf_file: Text | None = None
    """Name of a GGUF file in that folder or repository; its weights are dequantised to `dtype`."""

    revision: Text | None = None
    """Branch, tag or commit of a hub model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the frozen weights; `auto` takes the checkpoint's own."""

    quantization: Quantization = None
    """Quantise the frozen weights while they are loaded (QLoRA): `nf4`, `fp4`, `int8`, `torchao:SCHEME`, or a section.
    null takes the checkpoint as it is stored, quantised or not; `none` refuses a quantised one."""

    device_map: Text | _Placed | None = None
    """Where the parts of the model are, as in transformers: `auto`, a device (`cpu`, `cuda:0`), or modules with their
    devices: `{"": cpu}`. `auto` fills the GPUs, then the CPU, then the disk. null is one device, without offloading."""

    max_memory: _Placed | None = None
    """The most that `device_map: auto` puts on each device: `{0: 20GiB, cpu: 60GiB}`. null is what is free."""

    offload_folder: Source | None = None
    """Folder for weights on the disk that cannot be read from the checkpoint itself."""

    attn_implementation: Attention | None = None
    """How training computes attention; null is transformers' choice. The run tries it on the model first."""

    trust_remote_code: bool = False
    """Run the Python code in this model's folder, with your rights. Read the code first, and name its commit in
    `revision`. Only `dude train` and `dude plan` run it. No command runs code of an adapter."""

    @model_validator(mode="after")
    def _placed(self) -> ModelSection:
        if self.device_map is None and (self.max_memory is not None or self.offload_folder is not None):
            name = "offload_folder" if self.max_memory is None else "max_memory"
            raise ValueError(f"key 'model.{name}' has no effect without model.device_map; set it to auto")
        if self.max_memory is not None and self.device_map not in SHARED_OUT:
            raise ValueError(f"key 'model.max_memory' counts with model.device_map: {', '.join(SHARED_OUT)}; set one")
        if self.device_map is not None and self.quantization is not None and self.quantization.method != "none":
            raise ValueError(
                "keys 'model.quantization' and 'model.device_map': a quantised base is on one device; leave one out"
            )
        return self

    @property
    def is_hooked(self) -> bool:
        """Whether the model may be spread over several devices, or the disk."""
        if isinstance(self.device_map, dict):
            return len(set(self.device_map.values())) > 1 or "disk" in self.device_map.values()
        return self.device_map in SHARED_OUT

    @property
    def is_on_cpu(self) -> bool:
        """Whether no device but the CPU computes, whatever else is there."""
        if isinstance(self.device_map, dict):
            return {*self.device_map.values()} <= {"cpu", "disk"}
        return self.device_map == "cpu"

    @model_validator(mode="after")
    def _of_gguf(self) -> ModelSection:
        if self.gguf_file is not None:
            self.check_gguf(self.gguf_file)
        return self

    def check_gguf(self, file: str) -> None:
        """Raises ValueError where a key does not go with weights from the GGUF file `file`, written here or found."""
        key = "device_map" if self.device_map is not None else None
        if self.quantization is not None and self.quantization.method != "none":
            key = "quantization"
        if key is not None:
            raise ValueError(
                f"keys 'model.gguf_file' and 'model.{key}': GGUF weights are dequantised in memory, here "
                f"{shown(file)}; save them as a dense folder (docs/training.md, 'From a GGUF file'), and give that"
            )


class BudgetSection(Section):
    """How many parameters the adapted layers may train, and what decides which layers get them."""

    parameters: Quantity
    """The most that may be trained: a share of the model's parameters (`0.5%`), or a count (`2M`, `2000000`)."""

    by: Literal["uniform", "spectrum", "gradient", "fisher"] = "uniform"
    """`uniform`: one rank for all. `spectrum`: energy of the weight's singular values. `gradient`, `fisher`: energy of
    the loss's gradient in the weight's principal subspace, of the mean gradient or on average over rows."""

    calibration_rows: Count = 32
    """Training rows that gradient and fisher look at. train.seed chooses them."""

    min_r: CountOrZero = 0
    """Least rank of every layer; 0 leaves out layers that are worth least."""

    max_r: Count | None = None
    """Largest rank of a layer; null: four times the rank that uniform would give."""

    @model_validator(mode="after")
    def _room_between(self) -> BudgetSection:
        if self.max_r is not None and self.max_r < max(self.min_r, 1):
            raise ValueError("key 'adapter.budget.max_r' is below 'adapter.budget.min_r'; raise it")
        if self.by == "uniform" and (self.min_r or self.max_r is not None):
            raise ValueError("key 'adapter.budget': uniform has one rank for all; leave min_r and max_r out")
        return self


class AdapterSection(Section):
    """The adapter: PEFT's own names, handed to `dude_peft.DudeConfig` as they are, and how a run chooses them."""

    method: Text = "dude"
    """The method to train, one of `dude_peft.METHODS`, or `peft:FILE.json`: any other adapter of PEFT, as its
    configuration says."""  # checked in `resolved`: the table imports torch

    peft: dict[Text, Any] | None = None
    """Content of the file of `method: peft:FILE.json`. The run writes it down here, and its own config.yaml needs no
    file."""

    start: Source | None = None
    """Folder of an adapter to start from, as `dude init` writes it. No SVD runs. Method, rank and layers are the
    file's."""

    init_from: Source | None = None
    """On a quantised base: the full-precision model (a folder or a hub id) whose weights give the factors of the start.
    Without it, the quantised weights give them. The start equals the base in both cases."""

    r: Count = 16
    """Rank of the update."""

    lora_alpha: Alpha = 16
    """The update is scaled by lora_alpha / r (rslora: lora_alpha / sqrt(r))."""

    lora_dropout: Fraction = 0.0
    """Dropout on the input of the update. The base weight's input has none."""

    target_modules: Text | list[Text] = "all-linear"
    """"all-linear", a list of module-name endings, or one regular expression; [] for target_parameters alone."""

    exclude_modules: Text | Names | None = None
    """Modules to leave alone, written as in target_modules."""

    target_parameters: Names | None = None
    """Stacks of experts to adapt beside them: names of parameters, or their endings (mlp.experts.down_proj)."""

    modules_to_save: Names | None = None
    """Modules trained in full and saved beside the adapter."""

    rank_pattern: dict[Text, Count] = {}
    """Ranks of single layers: module name or regular expression -> r."""

    alpha_pattern: dict[Text, Alpha] = {}
    """Alphas of single layers: module name or regular expression -> lora_alpha."""

    layers_to_transform: CountOrZero | Annotated[list[CountOrZero], Field(min_length=1)] | None = None
    """Only these transformer layers, counted from 0."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""

    norm_gradient: Literal["detached", "exact"] | None = None
    """Whether the gradient passes through the row norm; null: the method's own, detached for most."""

    svd_tol: Fraction = 1e-3
    """Relative gain of captured energy at which the truncated SVD stops; 0 takes a full SVD."""

    svd_seed: Seed = 0
    """Seed of the truncated SVD, and of random directions."""

    budget: BudgetSection | None = None
    """Parameters to spend on ranks, layer by layer. r and lora_alpha then say the scaling alone: lora_alpha / r, the
    same in every layer. The run writes the ranks into its config.yaml."""

    groups: Count = 1
    """Groups that the r pairs of a layer fall into, as equal as r allows. train.orthogonality keeps them apart."""

    def changed(self) -> dict[str, Any]:
        """The keys that are DudeConfig's own and not at their default, but for what counts with every method."""
        standard = type(self).model_fields
        found = {name: value for name, value in self.settings().items() if value != standard[name].default}
        if self.norm_gradient == "detached":  # what a resolved run says of every method
            del found["norm_gradient"]
        if self.budget is not None and self.budget.by != "uniform":  # it takes an SVD of every weight
            found.pop("svd_tol", None)
        return found

    def settings(self) -> dict[str, Any]:
        """The keys that are DudeConfig's own."""
        return {
            key: value
            for key, value in self.model_dump().items()
            if key not in ("peft", "start", "init_from", "budget", "groups")
        }

    @model_validator(mode="after")
    def _experts_alone(self) -> AdapterSection:
        if self.target_parameters is None:
            if not self.target_modules:
                raise ValueError("key 'adapter.target_modules' is empty; name layers, or set adapter.target_parameters")
            return self
        reasons = {
            "budget": (self.budget, "ranks are chosen for layers alone"),
            "init_from": (self.init_from, "experts start from the model's own weights"),
            "lora_dropout": (self.lora_dropout, "the change of experts has no input of its own"),
            "bias": (None if self.bias == "none" else self.bias, "biases of experts are not trained"),
        }
        for key, (value, reason) in reasons.items():
            if value:
                raise ValueError(
                    f"keys 'adapter.target_parameters' and 'adapter.{key}': {reason}; leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _one_start(self) -> AdapterSection:
        if self.start is not None and self.init_from is not None:
            raise ValueError("key 'adapter.init_from': adapter.start has its factors already; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _budget_alone_decides(self) -> AdapterSection:
        if self.budget is None:
            return self
        if self.start is not None:
            raise ValueError("key 'adapter.budget': adapter.start has its ranks already; leave one of the two out")
        if self.rank_pattern:
            raise ValueError("key 'adapter.rank_pattern': adapter.budget decides the ranks; leave one of the two out")
        if self.modules_to_save is not None or self.bias != "none":
            key = "bias" if self.modules_to_save is None else "modules_to_save"
            raise ValueError(f"key 'adapter.{key}': adapter.budget counts adapted layers alone; leave one of them out")
        return self

    @model_validator(mode="after")
    def _a_pair_for_each_group(self) -> AdapterSection:
        if self.budget is None and self.groups > self.r:
            raise ValueError(f"key 'adapter.groups': {self.groups} groups need a rank of at least {self.groups}")
        return self

    @property
    def foreign(self) -> bool:
        """Whether stock PEFT makes it, from a configuration of its own."""
        return is_foreign(self.method)

    @model_serializer(mode="wrap")
    def _what_counts(self, everything: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Of an adapter of stock PEFT its own settings alone; of ours everything else."""
        found: dict[str, Any] = everything(self)
        if self.foreign:
            return {key: found[key] for key in ("method", "peft")}
        return {key: value for key, value in found.items() if key != "peft" or value is not None}


class SourceSection(Section):
    """One source of a mixture."""

    source: Source
    """A local file, `builtin:word-problems`, or a data set id on the hub, as for data.train."""

    split: Text | None = None
    """Split to read, where the source has splits. The default is data.train_split, or data.test_split."""

    rows: Count | None = None
    """At most this many rows, from the first."""

    weight: Positive | None = None
    """This source's share of the mixture, relative to the others. Give a weight to every source or to none. Without
    weights, each source gives all its rows."""

    columns: Columns | None = None
    """The same as data.columns, for this source alone."""


Sources = Source | Annotated[list[SourceSection], Field(min_length=1)]


class ShareSection(Section):
    """Rows that are taken from others."""

    share: Annotated[Number, Field(gt=0, lt=1)]
    """Share of the training questions to hold out. data.seed chooses them. A repeated question stays on one side."""


def as_share(value: Any) -> Any:
    """A bare number is a share."""
    return {"share": value} if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class DataSection(Section):
    """Rows to learn from and rows to be judged on."""

    train: Sources
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt), `builtin:word-problems`, a data set id on the hub (`id` or
    `id:config`), or a list of sources that are mixed."""

    test: Annotated[Sources | ShareSection | None, BeforeValidator(as_share)] = None
    """Held-out rows, written like `train`. They are never trained on. A number (0.1, or `{share: 0.1}`) holds out that
    share of the training rows. Required, unless evaluation.enabled is false."""

    set_aside: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Share of the training questions that this run neither learns from nor is judged on. `dude compare` keeps the
    test rows of its second stage from the runs of its first one by it: `test: 0.2` holds out the same questions."""

    columns: Columns = {}
    """Names of columns in your data, by our names: `{prompt: customer_query, completion: agent_reply}`. Keys and roles
    of messages are mapped in the same place: `{messages: dialog, role: speaker, user: client}`."""

    train_split: Text = "train"
    """Split of `train`, where the source has splits."""

    test_split: Text = "test"
    """Split of `test`, where the source has splits."""

    train_rows: Count | None = None
    """Use at most this many training rows, from the first. A mixture with weights gives exactly this many."""

    test_rows: Count | None = None
    """The same for held-out rows."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """`chat` is the tokenizer's own template, `plain` needs none; `auto` takes chat where there is one."""

    chat_template: ChatTemplate | None = None
    """Your own chat template in place of the tokenizer's: `FILE.jinja`, or its text. The run keeps the text, and the
    adapter's tokenizer takes it along."""

    special_tokens: Literal["text", "allow"] = "text"
    """How a special token (<|im_start|>, </s>) in a row is read. `text`: as plain text. `allow`: as the token itself.
    Chat, generate and eval of the adapter follow the same rule."""

    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens of a conversation are trained: those of every answer, of the last answer, or all of them."""

    upft: Count | None = None
    """Train on this many first tokens of each answer, and not on its end (UPFT, arXiv 2503.02875). The method is for
    answers of the model itself, as `dude generate --as-rows` writes them. Held-out rows stay whole."""

    general: Sources | None = None
    """General rows on which the model should not change, written like `train`. train.objective: mol needs them. All of
    their tokens count. The default split is train."""

    general_share: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """Share of general rows in every step. A seed chooses them; where there are too few, they repeat."""

    general_test: Sources | None = None
    """Held-out general rows, for any objective. Their loss and their KL to the base model are measured before, every
    evaluation.eval_steps, and after. The default split is test."""

    streaming: bool = False
    """Read data sets of the hub as they come, with no copy of them on this disk. Local files are always read so. The
    tokens of all rows are kept on the disk, in the cache."""

    max_length: Annotated[int, Field(ge=8, le=2**20)] = 512
    """Longest row, in tokens."""

    packing: bool = False
    """Lay rows end to end up to max_length, without padding. The model must keep the rows apart; the run tests that."""

    seed: Seed = 0
    """Seed of generated rows, of a held-out share, and of the choice of rows for a mixture."""

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> DataSection:
        for key in ("train", "test", "general", "general_test"):
            value = getattr(self, key)
            if isinstance(value, list) and len({each.weight is None for each in value}) > 1:
                raise ValueError(f"key 'data.{key}': only some sources have a weight; give one to all or to none")
        return self

    @model_validator(mode="after")
    def _one_template(self) -> DataSection:
        if self.chat_template is not None and self.template == "plain":
            raise ValueError(
                "key 'data.chat_template' has no effect beside data.template: plain; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _beginnings_of_answers(self) -> DataSection:
        if self.upft is not None and self.train_on == "all":
            raise ValueError("key 'data.upft' trains beginnings of answers; set data.train_on: answers")
        return self


class DpoSection(Section):
    """Direct preference optimisation (arXiv 2305.18290), in the words of TRL's DPOConfig."""

    beta: Strength = 0.1
    """How strongly the base model is kept to. For ipo it is the regularisation, tau in its paper."""

    loss_type: Literal[
        "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
        "apo_zero", "apo_down",
    ] = "sigmoid"  # fmt: skip
    """What becomes of the two log-probability ratios of a pair; TRL's names and formulas."""

    label_smoothing: Annotated[Number, Field(ge=0, le=0.49)] | None = None
    """For robust, the share of pairs that are expected to be the wrong way round (0.1 is usual); for exo_pair, its
    epsilon (1e-3 is usual). Other losses have none."""

    precompute_ref_log_probs: bool = False
    """Measure the base model on all pairs once, before training, instead of in every step. The cache keeps the result
    for other runs."""

    @model_validator(mode="after")
    def _smoothing_of_something(self) -> DpoSection:
        smooth = self.loss_type in ("robust", "exo_pair")
        if smooth and not self.label_smoothing:
            raise ValueError(f"key 'train.dpo.label_smoothing': {self.loss_type} needs one above 0")
        if not smooth and self.label_smoothing is not None:
            raise ValueError(f"key 'train.dpo.label_smoothing' has no effect on {self.loss_type}; leave it out")
        return self

    has_base: ClassVar[bool] = True
    """Whether the base model is the reference."""
    sides: ClassVar[int] = 2
    """Conversations of a row."""
    nll: ClassVar[float] = 0.0
    """Weight of the chosen answer's cross-entropy beside the loss of the pair."""


class OrpoSection(Section):
    """Odds ratio preference optimisation (arXiv 2403.07691), in the words of TRL's ORPOConfig. It has no reference."""

    beta: Strength = 0.1
    """Weight of the odds ratio beside the cross-entropy of the chosen row, question and answer; lambda in the paper."""

    has_base: ClassVar[bool] = False
    sides: ClassVar[int] = 2
    nll: ClassVar[float] = 1.0


class CpoSection(Section):
    """Contrastive preference optimisation (arXiv 2401.08417) and SimPO (arXiv 2405.14734), in the words of TRL's
    CPOConfig. They have no reference.
    """

    beta: Strength = 0.1
    """Scale of the log-probabilities in the loss. SimPO uses 2 to 10, on means over tokens."""

    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    """What becomes of the two log-probabilities of a pair; simpo and ipo take means over tokens."""

    cpo_alpha: StrengthOrZero = 1.0
    """Weight of the chosen answer's cross-entropy; 0 for SimPO."""

    simpo_gamma: StrengthOrZero | None = None
    """For simpo, the margin by which the chosen answer should win; null is 0.5. Other losses have none."""

    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] | None = None
    """For sigmoid and simpo, the share of pairs that are expected to be the wrong way round; null is 0."""

    has_base: ClassVar[bool] = False
    sides: ClassVar[int] = 2

    @model_validator(mode="after")
    def _keys_of_the_loss(self) -> CpoSection:
        if self.simpo_gamma is not None and self.loss_type != "simpo":
            raise ValueError(f"key 'train.cpo.simpo_gamma' has no effect on {self.loss_type}; leave it out")
        if self.label_smoothing is not None and self.loss_type not in ("sigmoid", "simpo"):
            raise ValueError(f"key 'train.cpo.label_smoothing' has no effect on {self.loss_type}; leave it out")
        return self

    @property
    def nll(self) -> float:
        """Weight of the chosen answer's cross-entropy beside the loss of the pair."""
        return self.cpo_alpha


class RewardModelSection(Section):
    """A reward model: a head that gives a conversation one number, in the words of TRL's RewardConfig."""

    center_rewards_coefficient: Strength | None = None
    """Weight of the squared sum of a pair's two rewards, which keeps rewards around 0 (arXiv 2312.09244); 0.01 is
    usual. null leaves it out."""

    has_base: ClassVar[bool] = False
    sides: ClassVar[int] = 2


class KtoSection(Section):
    """Kahneman-Tversky optimisation (arXiv 2402.01306) of answers with a label, in the words of TRL's KTOConfig."""

    beta: Strength = 0.1
    """How strongly the base model is kept to."""

    desirable_weight: Strength = 1.0
    """Weight of answers whose label is true."""

    undesirable_weight: Strength = 1.0
    """Weight of answers whose label is false. Weight times number of both should be alike: 1:1 to 4:3."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`kto` judges against the KL to the base model, estimated from the other answers of a batch; `apo_zero_unpaired`
    (arXiv 2408.06266) against 0."""

    has_base: ClassVar[bool] = True
    sides: ClassVar[int] = 1


class RewardSection(Section):
    """One thing that answers are rewarded for."""

    kind: Literal["answer", "math", "format", "length", "function", "model"]
    """`answer` is 1 where the final answer is the row's, else 0, as held-out answers are marked; `math` is the same by
    math-verify; `format` is 1 where the whole answer matches `pattern`; `length` punishes long answers; `function` is
    Python of your own; `model` is the score of a reward model."""

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Its name in the metrics; null is the function's name, or the kind."""

    weight: Number = 1.0
    """What it counts in the sum of all rewards."""

    pattern: Text | None = None
    """Of `format`: a regular expression, in which a dot is a line's end too."""

    soft_punish_cache: Count | None = None
    """Of `length`: 0 up to so many tokens before max_completion_length, from there down to -1 at it, as in DAPO."""

    file: Source | None = None
    """Of `function`: a Python file. It runs in a process of its own, with your permissions."""

    function: Annotated[Text, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Of `function`: the name of a function in the file. It gets the lists `prompts`, `completions`, `completion_ids`
    and `answer`, those of them that it names, and returns a number for each answer."""

    sha256: Text | None = None
    """Of `function`: what the file's bytes have to be. A run writes it; null takes them as they are."""

    model: Source | None = None
    """Of `model`: an adapter that `objective: reward` wrote, or the folder or hub id of a sequence classification with
    one label. It is loaded once, frozen, beside the model that learns."""

    template: Literal["chat", "plain"] | None = None
    """Of `model`: how it reads conversations. null is as its run had it, else the chat template of its tokenizer."""

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> RewardSection:
        needed = {
            "format": ("pattern",),
            "length": ("soft_punish_cache",),
            "function": ("file", "function"),
            "model": ("model",),
        }
        allowed = {"function": ("sha256",), "model": ("template",)}
        for key in ("pattern", "soft_punish_cache", "file", "function", "model", "sha256", "template"):
            wanted, there = key in needed.get(self.kind, ()), getattr(self, key) is not None
            if wanted and not there:
                raise ValueError(f"key 'train.grpo.rewards': {self.kind} needs '{key}'")
            if there and not wanted and key not in allowed.get(self.kind, ()):
                raise ValueError(f"key 'train.grpo.rewards': '{key}' has no effect on {self.kind}; leave it out")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"key 'train.grpo.rewards': pattern {shown(self.pattern, 80)} is no regular expression ({error})"
                ) from None
        if self.weight == 0:
            raise ValueError(f"key 'train.grpo.rewards': {self.title} has weight 0; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _what_is_set(self, everything: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the keys of other kinds."""
        return {key: value for key, value in everything(self).items() if value is not None}

    @property
    def title(self) -> str:
        """Its name in the metrics."""
        return self.name or self.function or self.kind

    def sealed(self) -> RewardSection:
        """The same with the hash of its file, if it has one. Raises what `sealed_file` raises."""
        if self.file is None or self.function is None:
            return self
        return self.model_copy(update=sealed_file(self.file, self.function, self.sha256))


class GrpoSection(Section):
    """Group relative policy optimisation (arXiv 2402.03300), in the words of TRL's GRPOConfig."""

    rewards: Annotated[list[RewardSection], Field(min_length=1)] = [RewardSection(kind="answer")]
    """What answers are rewarded for. The rewards are added, each times its weight."""

    trust_reward_files: bool = False
    """Confirms that the Python files of `rewards` may run. Read them first."""

    reward_timeout: Annotated[Number, Field(gt=0, le=86400)] = 30.0
    """Seconds that a reward may take over the answers to one prompt."""

    reward_memory_gib: Annotated[Number, Field(ge=0.125, le=1_048_576)] = 4.0
    """GiB of memory that the process of the rewards may take, on Linux. What it maps of files, shares with others or
    keeps on a GPU does not count."""

    num_generations: Annotated[int, Field(ge=2, le=4096)] = 8
    """Answers to a prompt: a group. Each answer is judged against its group."""

    max_completion_length: Count = 512
    """Longest answer, in tokens."""

    temperature: Annotated[Number, Field(ge=1e-6, le=1e6)] = 1.0
    """Of the sampling. Log-probabilities are those of this temperature, too."""

    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Answers are drawn from the likeliest tokens that together have this probability."""

    beta: NonNegative = 0.0
    """Weight of the KL to the base model. 0 leaves the base model's pass out."""

    use_bias_correction_kl: bool = True
    """Multiply the KL by the ratio, so that its gradient is that of KL(q || p) (DeepSeek-V3.2, arXiv 2512.02556)."""

    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo"
    """How tokens are averaged: `dapo` over the tokens of the step, `bnpo` of the forward pass, `grpo` over answers,
    `dr_grpo` over max_completion_length."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation an advantage is divided by."""

    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios of single tokens, or of whole answers (GSPO, arXiv 2507.18071)."""

    num_iterations: Annotated[int, Field(ge=1, le=1000)] = 1
    """Optimizer steps with the same answers. Clipping acts from the second one on."""

    epsilon: NonNegative = 0.2
    """How far a ratio may be from 1 before it is clipped."""

    epsilon_high: NonNegative | None = None
    """The same above 1; null is epsilon."""

    mask_truncated_completions: bool = False
    """Leave answers that did not end out of the loss."""

    @property
    def reads_conversations(self) -> bool:
        """Whether a reward is a model's, which reads what rows ask as they have it."""
        return any(reward.kind == "model" for reward in self.rewards)

    @model_validator(mode="after")
    def _names_apart(self) -> GrpoSection:
        titles = [reward.title for reward in self.rewards]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(f"key 'train.grpo.rewards': two are called {twice[0]}; give each a name")
        return self

    @model_validator(mode="after")
    def _files_confirmed(self) -> GrpoSection:
        files = [f"{shown(each.file, 200)}:{each.function}" for each in self.rewards if each.file is not None]
        if files and not self.trust_reward_files:
            raise ValueError(
                f"key 'train.grpo.trust_reward_files': {', '.join(files)} would run with your permissions; read the "
                "file, then set it to true"
            )
        return self


class DropSection(Section):
    """Rows that a curriculum leaves out. What is not written is kept."""

    hopeless: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """Leave out rows with at most this pass rate."""

    solved: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Leave out rows with at least this pass rate."""

    @model_validator(mode="after")
    def _something_between(self) -> DropSection:
        if self.hopeless is not None and self.solved is not None and self.hopeless >= self.solved:
            raise ValueError(
                "keys 'train.curriculum.drop': hopeless is not below solved, which leaves no row; change one"
            )
        return self


_OF_PASS_RATES: dict[str, Any] = {"samples": 8, "temperature": 1.0, "top_p": 1.0}


class CurriculumSection(Section):
    """Training in stages, from easy rows to hard ones (difficulty-aware staging, arXiv 2504.00829)."""

    by: Literal["pass_rate", "length"] = "pass_rate"
    """What is difficult. `pass_rate`: few of the base model's own answers are right; they are drawn before training,
    once. `length`: a row has many tokens."""

    stages: Annotated[int, Field(ge=2, le=1000)] | list[Bound] = 3
    """How many stages of equal size, or a bound for each stage. Of pass_rate the least rate in it, falling, to 0; of
    length the most tokens, rising, to data.max_length or more."""

    samples: Annotated[int, Field(ge=2, le=10_000)] | None = None
    """Of pass_rate: answers to each prompt; null is 8."""

    temperature: Annotated[Number, Field(ge=1e-6, le=1e6)] | None = None
    """Of pass_rate: of the sampling; null is that of grpo, or 1."""

    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Of pass_rate: answers are drawn from the likeliest tokens of this probability; null is that of grpo, or 1."""

    max_new_tokens: Count | None = None
    """Of pass_rate: longest answer, in tokens; null is grpo's max_completion_length, or evaluation.max_new_tokens."""

    reward: Text | None = None
    """Of pass_rate with grpo: name of the reward that tells whether an answer passes; null is the first of the kinds
    answer and math. With sft, an answer passes that ended, with the row's final answer."""

    threshold: Number | None = None
    """Of pass_rate with grpo: an answer passes where that reward is at least this; null is 1."""

    drop: DropSection | None = None
    """Of pass_rate: rows that are not trained on; null is `{hopeless: 0, solved: 1}` of grpo, which learns nothing from
    them, and `{solved: 1}` of sft. `{}` keeps all."""

    @model_validator(mode="after")
    def _stages_in_order(self) -> CurriculumSection:
        if isinstance(self.stages, int):
            return self
        key, bounds = "key 'train.curriculum.stages'", self.stages
        if len(bounds) < 2:
            raise ValueError(f"{key}: one stage is no curriculum; give two bounds or more, or leave curriculum out")
        falls = self.by == "pass_rate"
        if not all(first > then if falls else first < then for first, then in itertools.pairwise(bounds)):
            way = "fall" if falls else "rise"
            raise ValueError(f"{key}: bounds of {self.by} go from easy to hard; they have to {way}")
        if falls and (bounds[0] > 1 or bounds[-1] != 0):
            raise ValueError(f"{key}: pass rates go from 1 to 0, and the last stage takes what is left; end with 0")
        return self

    @model_validator(mode="after")
    def _keys_of_the_measure(self) -> CurriculumSection:
        if self.by == "length":
            for key in ("samples", "temperature", "top_p", "max_new_tokens", "reward", "threshold", "drop"):
                if getattr(self, key) is not None:
                    raise ValueError(f"key 'train.curriculum.{key}' has no effect on by: length; leave it out")
        return self

    @property
    def count(self) -> int:
        """Number of stages."""
        return self.stages if isinstance(self.stages, int) else len(self.stages)

    def completed(self, rewarded: GrpoSection | None, max_new_tokens: int) -> CurriculumSection:
        """The same with every choice that was left open written out.

        Args:
            rewarded: settings of grpo; None for sft.
            max_new_tokens: of held-out answers.
        """
        if self.by == "length":
            return self
        chosen = {**_OF_PASS_RATES, "max_new_tokens": max_new_tokens, "drop": DropSection(solved=1.0)}
        if rewarded is not None:
            judges = [each.title for each in rewarded.rewards if each.kind in ("answer", "math")]
            chosen |= {
                "temperature": rewarded.temperature,
                "top_p": rewarded.top_p,
                "max_new_tokens": rewarded.max_completion_length,
                "reward": judges[0] if judges else None,
                "threshold": 1.0,
                "drop": DropSection(hopeless=0.0, solved=1.0),
            }
        return self.model_copy(update={key: value for key, value in chosen.items() if getattr(self, key) is None})


Paired = DpoSection | OrpoSection | CpoSection
"""Settings of an objective that learns from pairs."""
Preference = Paired | KtoSection | RewardModelSection
"""Settings of an objective that learns from preferences, paired or not."""


RATIOS = (("loraplus_lr_ratio", "dB", "B"), ("magnitude_lr_ratio", "dm", "magnitude"))
"""Key of `train`, the tensor whose rate it multiplies, and what people call that."""


class TrainSection(Section):
    """The optimisation, in the words of `transformers.TrainingArguments`."""

    objective: Literal["sft", "mol", "dpo", "orpo", "cpo", "kto", "reward", "grpo"] = "sft"
    """`sft` is cross-entropy on the training rows; `mol` adds KL to the untouched base model on data.general, to keep
    general ability (mixture of losses, arXiv 2505.12043). `dpo`, `orpo` and `cpo` learn from pairs of answers of which
    one is better, `kto` from single answers with a label, `grpo` from rewards of the model's own answers; for dpo, kto
    and grpo the base model is the reference. `reward` trains a reward model on pairs: it gives a conversation a number,
    and writes nothing."""

    dpo: DpoSection | None = None
    """Settings of `objective: dpo`."""

    orpo: OrpoSection | None = None
    """Settings of `objective: orpo`."""

    cpo: CpoSection | None = None
    """Settings of `objective: cpo`, of which `loss_type: simpo` is SimPO."""

    kto: KtoSection | None = None
    """Settings of `objective: kto`."""

    reward: RewardModelSection | None = None
    """Settings of `objective: reward`."""

    grpo: GrpoSection | None = None
    """Settings of `objective: grpo`."""

    curriculum: CurriculumSection | None = None
    """Of sft and grpo: train in stages, from easy rows to hard ones; null takes all rows in random order."""

    orthogonality: NonNegative = 0.0
    """Weight of a penalty, added once a step: how far each group's change of a weight is from orthogonal to the weight
    and to the other groups' (PEGO, arXiv 2407.15085)."""

    learning_rate: Positive | None = None
    """Peak learning rate. The default is the method's own, and a twentieth of it for preferences and rewards. A reward
    model takes the method's own: its head is new."""

    max_steps: Count | None = None
    """Optimizer steps. Set this or num_train_epochs, not both."""

    num_train_epochs: Epochs | None = None
    """Passes over the training rows; 1 unless max_steps is set."""

    per_device_train_batch_size: Count = 8
    """Rows in one forward pass."""

    gradient_accumulation_steps: Count = 1
    """Forward passes in one optimizer step."""

    warmup_steps: NonNegative = 0.05
    """Steps of linear warm-up; a number below 1 is a share of all steps. The rate is never 0: step i of n has
    i / (n + 1) of the peak."""

    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        "cosine"
    )
    """Schedule of the learning rate after the warm-up."""

    weight_decay: NonNegative = 0.0
    """Weight decay of the trained change: it pulls toward the pretrained model, not toward zero."""

    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0 switches it off."""

    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd", "adamw_8bit", "paged_adamw_8bit",
        "paged_adamw_32bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_lion_8bit",
        "paged_lion_32bit",
    ] = "adamw_torch"  # fmt: skip
    """Optimizer."""

    neftune_noise_alpha: Positive | None = None
    """Noise on the embeddings in training, of this strength (NEFTune, arXiv 2310.05914); 5 is usual."""

    loraplus_lr_ratio: Positive = 1.0
    """Learning rate of B over that of A (LoRA+)."""

    magnitude_lr_ratio: Positive = 1.0
    """Learning rate of the magnitude over that of A."""

    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    """`group_by_length` puts rows of like length into one step, which saves padding."""

    trainer: Literal["transformers", "trl"] = "transformers"
    """`trl` runs TRL's SFTTrainer, with its own packing and collator, on the same token ids."""

    seed: Seed = 0
    """Seed of the adapter's random parts, the order of the rows and dropout."""

    logging_steps: Count = 5
    """Steps between two lines of metrics.jsonl."""

    movement_steps: Count | None = None
    """Steps between two measurements, in metrics.jsonl, of how far each layer's magnitude and direction have moved."""

    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = []
    """Trackers that get the same numbers, through transformers' Trainer."""

    save_steps: Count = 50
    """Steps between two checkpoints; one is written at the end too."""

    save_total_limit: Annotated[int, Field(ge=2, le=LARGEST_COUNT)] = 2
    """Checkpoints to keep."""

    bf16: bool = False
    """bfloat16 autocast."""

    fp16: bool = False
    """float16 autocast with a gradient scaler, for GPUs that lack bfloat16. Elsewhere bf16 is better."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    torch_compile: bool = False
    """Compile the model's training step. Rows are padded to eighths of data.max_length, each a graph of its own, so
    that a resumed run repeats the bits."""

    tf32: bool = False
    """Products of float32 matrices in TF32, on GPUs from Ampere on."""

    use_liger_kernel: bool = False
    """Liger's Triton kernels: a loss in chunks, without the logits of all tokens, and layers that keep less. They serve
    the whole run, measurements included."""

    liger_kernel_config: dict[LigerKernel, bool] | None = None
    """Which of them: `{fused_linear_cross_entropy: false}` or `{rms_norm: false}` leaves one out. Liger's rope, swiglu
    and geglu are never taken: they write into the outputs of adapted layers."""

    extra_arguments: dict[Text, Any] = {}
    """Other fields of TrainingArguments, such as adam_beta2. A field that a run sets itself, or that would break resume
    or the order of the rows, is refused."""

    @model_validator(mode="after")
    def _one_autocast(self) -> TrainSection:
        if not self.fp16:
            return self
        faults = {
            "train.bf16": self.bf16,
            "train.torch_compile": self.torch_compile,
            "train.use_liger_kernel": self.use_liger_kernel,
            "train.orthogonality": bool(self.orthogonality),
            f"train.objective: {self.objective}": self.objective != "sft",
            "train.curriculum": self.curriculum is not None,
        }
        for key, there in faults.items():
            if there:
                raise ValueError(f"keys 'train.fp16' and '{key}': they were not made to work together; use train.bf16")
        return self

    @model_validator(mode="after")
    def _fields_to_hand_on(self) -> TrainSection:
        if found := fault(self.extra_arguments, self):
            raise ValueError(found)
        return self

    @property
    def chunks_loss(self) -> bool:
        """Whether Liger's fused loss is taken, which never has the logits of all tokens."""
        return self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)

    @model_validator(mode="after")
    def _settings_of_the_objective(self) -> TrainSection:
        for name in SECTIONS:
            if name != self.objective and getattr(self, name) is not None:
                raise ValueError(
                    f"key 'train.{name}' has no effect on train.objective: {self.objective}; leave it out, or set "
                    f"train.objective: {name}"
                )
        return self

    @model_validator(mode="after")
    def _curriculum_of_answers(self) -> TrainSection:
        wanted, rewarded = self.curriculum, self.rewarded
        if wanted is None:
            return self
        if self.objective not in ("sft", "grpo"):
            raise ValueError(
                f"key 'train.curriculum': stages are of rows with one right answer, and train.objective: "
                f"{self.objective} learns from others; use sft or grpo, or leave it out"
            )
        for key in ("reward", "threshold"):
            if rewarded is None and getattr(wanted, key) is not None:
                raise ValueError(f"key 'train.curriculum.{key}' has no effect on train.objective: sft; leave it out")
        if rewarded is not None and wanted.by == "pass_rate":
            titles = [each.title for each in rewarded.rewards]
            if wanted.completed(rewarded, 1).reward not in titles:
                raise ValueError(
                    f"key 'train.curriculum.reward': say which reward tells whether an answer passes: "
                    f"{', '.join(titles)}; or set by: length"
                )
        return self

    @property
    def preference(self) -> Preference | None:
        """The settings of an objective that learns from preferences; None for others."""
        found = self.section
        return None if isinstance(found, GrpoSection) else found

    @property
    def rewarded(self) -> GrpoSection | None:
        """The settings of an objective that learns from rewards; None for others."""
        found = self.section
        return found if isinstance(found, GrpoSection) else None

    @property
    def section(self) -> Preference | GrpoSection | None:
        """The settings of the objective; None where it has none of its own."""
        kind = SECTIONS.get(self.objective)
        return None if kind is None else getattr(self, self.objective) or kind()

    @property
    def has_base(self) -> bool:
        """Whether the objective compares with the base model, as a reference."""
        rewarded = self.rewarded is not None and self.rewarded.beta > 0
        return rewarded or (self.preference is not None and self.preference.has_base)

    @property
    def sides(self) -> int:
        """Conversations that a row brings into the forward pass that is trained: 2 of a pair."""
        return 1 if self.preference is None else self.preference.sides

    @property
    def from_rows(self) -> bool:
        """Whether the rate is one for rows of answers: the method's own."""
        return self.section is None or self.task_type == SCORES

    @property
    def autocasts(self) -> bool:
        """Whether forwards compute in half precision, whatever the weights are in."""
        return self.bf16 or self.fp16

    @property
    def task_type(self) -> TaskType:
        """PEFT's, of the adapter: which head the model has."""
        return SCORES if self.objective == "reward" else CAUSAL

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError("keys 'train.max_steps' and 'train.num_train_epochs' are both set; keep one of them")
        return self


SECTIONS: dict[str, type[Preference] | type[GrpoSection]] = {
    "dpo": DpoSection,
    "orpo": OrpoSection,
    "cpo": CpoSection,
    "kto": KtoSection,
    "reward": RewardModelSection,
    "grpo": GrpoSection,
}
"""The section of each objective that has one; all but the last learn from preferences."""


class EvaluationSection(Section):
    """What is measured on the held-out rows, before and after."""

    enabled: bool = True
    """Measure held-out rows. `false` trains without any measurement."""

    rows: Count = 64
    """Held-out rows that the model answers; each answer is marked right or wrong. The loss uses all held-out rows."""

    max_new_tokens: Count = 128
    """Longest answer, in tokens."""

    batch_size: Count = 16
    """Rows evaluated at once."""

    samples: CountOrZero = 3
    """Answers shown before and after, side by side."""

    eval_steps: Count | None = None
    """Steps between two measurements of the held-out loss; null measures before and after only."""

    tasks: list[Text] = []
    """Benchmark tasks, as in `dude eval --tasks`. They are scored at the end, beside the base model, into scores/."""

    tasks_data_dir: Source | None = None
    """Folder of the tasks' local files, as in `dude eval --data-dir`; null uses the hub."""

    tasks_limit: Count | None = None
    """At most this many questions of each task: a seeded sample, the same each time."""

    tasks_chat: bool = False
    """Send the tasks' prompts through the chat template."""

    tasks_num_fewshot: CountOrZero | None = None
    """Examples in each prompt of a task; null uses the task's own number."""

    tasks_text: Source | None = None
    """General text, as in `dude eval --text`. Its loss and its KL to the base show what was forgotten."""

    tasks_steps: Count | None = None
    """Steps between two scorings of the tasks; null scores them at the end only."""

    metric_for_best_model: Text = "loss"
    """What decides the best adapter: the held-out `loss`, of preferences also `rewards/accuracies` or
    `rewards/margins`, of grpo `reward` (its default), a task (its first metric), or TASK/METRIC,FILTER."""

    early_stopping_patience: Count | None = None
    """Stop training after this many measurements of metric_for_best_model without a better one."""

    early_stopping_threshold: NonNegative = 0.0
    """An improvement smaller than this does not reset the patience. It does not decide the best adapter."""

    load_best_model_at_end: bool = True
    """Keep the best adapter by metric_for_best_model, if that is measured during training. `false` keeps the last."""

    @model_validator(mode="after")
    def _tasks_to_score(self) -> EvaluationSection:
        if self.tasks_steps is not None and not self.tasks:
            raise ValueError("key 'evaluation.tasks_steps' needs 'evaluation.tasks'")
        named = self.metric_for_best_model
        if named not in HELD_OUT and (self.tasks_steps is None or named.partition("/")[0] not in self.tasks):
            raise ValueError(
                f"key 'evaluation.metric_for_best_model': {named!r} is not measured during training; name it in "
                "'evaluation.tasks', and set 'evaluation.tasks_steps'"
            )
        return self

    @model_validator(mode="after")
    def _patience_of_something(self) -> EvaluationSection:
        of_rows = self.metric_for_best_model in HELD_OUT
        if self.early_stopping_patience is not None and of_rows and (self.eval_steps is None or not self.enabled):
            raise ValueError(
                "key 'evaluation.early_stopping_patience' needs 'evaluation.eval_steps', and evaluation switched on"
            )
        return self


class RunConfig(Section):
    """One run of `dude train`."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    output_dir: Source
    """Folder of everything that the run writes. It is new or empty, or it holds the same run, which then resumes."""

    @model_validator(mode="after")
    def _something_to_evaluate(self) -> RunConfig:
        if self.evaluation.enabled and self.data.test is None:
            raise ValueError(
                "key 'data.test' is missing, so nothing is held out; name other rows, or set data.test: 0.1 for a "
                "tenth of the training rows; evaluation.enabled: false measures nothing"
            )
        return self

    @model_validator(mode="after")
    def _general_rows_for_mol_alone(self) -> RunConfig:
        mol = self.train.objective == "mol"
        if mol and self.data.general is None:
            raise ValueError("key 'data.general' is missing; train.objective: mol needs general rows")
        if not mol and self.data.general is not None:
            raise ValueError(
                f"key 'data.general' is not used by train.objective: {self.train.objective}; remove it, or set mol"
            )
        if mol and self.train.trainer == "trl":
            raise ValueError("key 'train.trainer': trl has no mixture of losses; use transformers, or objective: sft")
        if self.adapter.bias != "none" and (mol or self.data.general_test is not None):
            raise ValueError("key 'adapter.bias': trained biases leave no base model to compare with; set it to none")
        return self

    @model_validator(mode="after")
    def _what_pairs_allow(self) -> RunConfig:
        objective, named = self.train.objective, self.evaluation.metric_for_best_model
        preference = self.train.preference
        if preference is None:
            if named in JUDGED:
                names = [name for name, kind in SECTIONS.items() if kind is not GrpoSection]
                raise ValueError(
                    f"key 'evaluation.metric_for_best_model': {named} is measured on pairs or labelled answers; use "
                    f"another, or train.objective: {' or '.join(names)}"
                )
            return self
        budget, kto = self.adapter.budget, isinstance(preference, KtoSection)
        padded, whole = ("the answers", "answers") if kto else ("the two answers of a pair", "both answers")
        rows, first = ("labels", "all answers, wanted or not") if kto else ("pairs", "the chosen answers alone")
        others = {
            "data.packing": (self.data.packing, f"{padded} are padded to one length; set it to false"),
            "data.train_on": (self.data.train_on != "answers", f"{whole} are judged whole; set it to answers"),
            "data.upft": (self.data.upft is not None, f"{whole} are judged whole; leave it out"),
            "train.trainer": (self.train.trainer == "trl", f"TRL's SFTTrainer takes no {rows}; set it to transformers"),
            "train.torch_compile": (self.train.torch_compile, f"the loss of {rows} is not compiled; set it to false"),
            "train.per_device_train_batch_size": (
                isinstance(preference, KtoSection)
                and preference.loss_type == "kto"
                and self.train.per_device_train_batch_size == 1,
                "KL is estimated from the other answers of a batch, and a batch of 1 has none; set it to 2 or more, or "
                "train.kto.loss_type: apo_zero_unpaired",
            ),
            "adapter.bias": (
                self.adapter.bias != "none" and preference.has_base,
                "trained biases leave no base model; set it to none",
            ),
            "adapter.budget.by": (
                budget is not None and budget.by in ("gradient", "fisher"),
                f"its gradients are those of {first}; choose uniform or spectrum",
            ),
        }
        if self.train.task_type == SCORES:
            others |= self._what_a_reward_model_has_not()
        for key, (contradicts, reason) in others.items():
            if contradicts:
                raise ValueError(f"keys 'train.objective' and '{key}': {objective}: {reason}")
        return self

    def _what_a_reward_model_has_not(self) -> dict[str, tuple[bool, str]]:
        """Keys -> whether they are set, and why they cannot be."""
        evaluation = self.evaluation
        return {
            "adapter.method": (self.adapter.foreign, "its head needs a method of dude methods; choose one"),
            "adapter.start": (self.adapter.start is not None, "a start has no head; leave it out"),
            "data.general_test": (self.data.general_test is not None, "it writes no text to compare; leave it out"),
            "evaluation.tasks": (bool(evaluation.tasks), "it gives scores and writes no answers; leave it out"),
            "evaluation.tasks_text": (evaluation.tasks_text is not None, "it writes no text; leave it out"),
            "model.trust_remote_code": (self.model.trust_remote_code, "its head is transformers' own; set it to false"),
        }

    @model_validator(mode="after")
    def _what_rewards_allow(self) -> RunConfig:
        settings, named = self.train.rewarded, self.evaluation.metric_for_best_model
        if settings is None:
            if named == REWARD:
                raise ValueError(
                    "key 'evaluation.metric_for_best_model': reward is measured by train.objective: grpo; use another"
                )
            return self
        budget, answers = self.adapter.budget, settings.num_generations
        batch, forwards = self.train.per_device_train_batch_size, self.train.gradient_accumulation_steps
        step, unit = batch * forwards, answers // gcd(answers, forwards)
        others = {
            "train.per_device_train_batch_size": (
                step % answers > 0,
                f"a step, with gradient_accumulation_steps, has {step} answers, and train.grpo.num_generations is "
                f"{answers}; a step needs whole groups; set it to {-(-batch // unit) * unit}",
            ),
            "data.packing": (self.data.packing, "answers are padded to one length; set it to false"),
            "data.train_on": (self.data.train_on != "answers", "the model's own answers are trained; leave it out"),
            "data.upft": (self.data.upft is not None, "answers are trained whole; leave it out"),
            "train.trainer": (self.train.trainer == "trl", "TRL's SFTTrainer asks nothing; set it to transformers"),
            "train.torch_compile": (self.train.torch_compile, "answers have too many lengths; set it to false"),
            "train.train_sampling_strategy": (
                self.train.train_sampling_strategy != "random",
                "steps are made of groups; set it to random",
            ),
            "adapter.bias": (
                self.adapter.bias != "none" and settings.beta > 0,
                "trained biases leave no base model; set it to none",
            ),
            "adapter.budget.by": (
                budget is not None and budget.by in ("gradient", "fisher"),
                "its gradients are those of the rows' answers; choose uniform or spectrum",
            ),
        }
        for key, (contradicts, reason) in others.items():
            if contradicts:
                raise ValueError(f"keys 'train.objective' and '{key}': grpo: {reason}")
        return self

    @model_validator(mode="after")
    def _what_stages_allow(self) -> RunConfig:
        wanted, data = self.train.curriculum, self.data
        if wanted is None:
            return self
        rates = wanted.by == "pass_rate"
        bounds = [] if isinstance(wanted.stages, int) else wanted.stages
        others = {
            "data.packing": (data.packing, "packed rows have no order of their own; set it to false"),
            "data.train_on": (
                rates and data.train_on == "all",
                "a pass rate is of an answer, and this trains the prompts, too; set it to answers",
            ),
            "data.upft": (
                rates and data.upft is not None,
                "a pass rate is of a whole answer, and this trains its beginning; leave it out, or set by: length",
            ),
            "train.trainer": (self.train.trainer == "trl", "TRL orders rows itself; set it to transformers"),
            "train.train_sampling_strategy": (
                self.train.train_sampling_strategy != "random",
                "it would order the rows by length within a stage; set it to random",
            ),
            "data.max_length": (
                not rates and bool(bounds) and bounds[-1] < data.max_length,
                f"the last bound of stages, {bounds[-1] if bounds else 0:g}, leaves longer rows without a stage; raise "
                "it to data.max_length",
            ),
            "train.max_steps": (
                self.train.max_steps is not None and self.train.max_steps < wanted.count,
                f"{wanted.count} stages need as many steps; raise it, or lower the number of stages",
            ),
        }
        for key, (contradicts, reason) in others.items():
            if contradicts:
                raise ValueError(f"keys 'train.curriculum' and '{key}': {reason}")
        return self

    @model_validator(mode="after")
    def _batches_of_few_shapes(self) -> RunConfig:
        if not self.train.torch_compile:
            return self
        others = {
            "data.packing": (self.data.packing, "packed rows have too many lengths; set it to false"),
            "train.objective": (self.train.objective == "mol", "batches of mol have too many shapes; set it to sft"),
            "train.gradient_checkpointing": (
                self.train.gradient_checkpointing,
                "recomputing breaks the graphs, and most layers would not be compiled; set it to false",
            ),
            "train.trainer": (self.train.trainer == "trl", "trl pads rows itself; set it to transformers"),
        }
        for key, (contradicts, reason) in others.items():
            if contradicts:
                raise ValueError(f"keys 'train.torch_compile' and '{key}': {reason}, or leave torch_compile out")
        return self

    @model_validator(mode="after")
    def _folders_apart(self) -> RunConfig:
        away = self.model.offload_folder
        if away is not None and os.path.realpath(away) == os.path.realpath(self.output_dir):
            raise ValueError("keys 'model.offload_folder' and 'output_dir' are one folder; change one")
        return self

    @model_validator(mode="after")
    def _what_liger_replaces(self) -> RunConfig:
        train, adapter = self.train, self.adapter
        if not train.use_liger_kernel:
            return self
        others = {
            "train.objective": (
                train.chunks_loss and train.objective != "sft",
                f"the loss of {train.objective} takes logits, which Liger's fused loss never makes; add "
                "train.liger_kernel_config: {fused_linear_cross_entropy: false}",
            ),
            "train.objective: grpo": (
                train.rewarded is not None,
                "answers drawn through Liger's kernels were not tried; choose another objective",
            ),
            "train.torch_compile": (train.torch_compile, "the two were not tried together; set it to false"),
            "train.trainer": (train.trainer == "trl", "TRL measures logits of its own; set it to transformers"),
            "model.device_map": (
                self.model.is_hooked,
                "Liger replaces the forwards that bring weights to the device; leave it out",
            ),
            "adapter.target_parameters": (
                bool(adapter.target_parameters),
                "Liger computes experts itself, without their adapters; leave it out",
            ),
            "adapter.method": (adapter.foreign, f"{adapter.method} was not tried; choose a method of dude methods"),
        }
        for key, (contradicts, reason) in others.items():
            if contradicts:
                raise ValueError(f"keys 'train.use_liger_kernel' and '{key}': {reason}, or leave use_liger_kernel out")
        return self

    @model_validator(mode="after")
    def _groups_of_something(self) -> RunConfig:
        if self.adapter.groups > 1 and self.train.orthogonality == 0:
            raise ValueError(
                "key 'adapter.groups' counts with train.orthogonality alone; set that, or leave groups out"
            )
        return self

    @model_validator(mode="after")
    def _every_key_counts(self) -> RunConfig:
        if found := idle_key(self, JUDGED):
            raise ValueError(found)
        return self

    def resolved(self) -> RunConfig:
        """The same run with every choice that was left open written out.

        Raises:
            ConfigError: the method is not in the table, or another key contradicts it.
        """
        from dude_peft.methods import METHODS
        from dude_peft.methods.learning_rate import default_rate

        if self.adapter.foreign:
            return self._resolved_foreign()
        if self.adapter.peft is not None:
            raise ConfigError(
                f"key 'adapter.peft': adapter.method is {shown(self.adapter.method)}, which has no such settings; "
                "leave it out, or set adapter.method: peft:FILE.json"
            )
        method = METHODS.get(self.adapter.method)
        if method is None:
            near = difflib.get_close_matches(self.adapter.method.lower(), METHODS, n=1)
            hint = f"closest: {near[0]!r}" if near else f"known: {', '.join(METHODS)}"
            raise ConfigError(f"key 'adapter.method': there is no method {shown(repr(self.adapter.method))}; {hint}")
        if self.train.orthogonality and method.delta is not None:
            raise ConfigError(
                f"key 'train.orthogonality': method {method.name!r} trains no factors A and B; leave it out, or choose "
                "another method"
            )
        if self.adapter.target_parameters is not None and not method.stackable:
            able = ", ".join(name for name, one in METHODS.items() if one.stackable)
            raise ConfigError(
                f"key 'adapter.target_parameters': method {method.name!r} has no factors A and B for every expert; "
                f"choose one of {able}"
            )
        if self.adapter.target_parameters is not None and self.train.orthogonality:
            raise ConfigError(
                "key 'train.orthogonality' is for layers alone, not for experts; leave it out, or "
                "adapter.target_parameters"
            )
        for key, tensor, what in RATIOS:
            if getattr(self.train, key) != 1 and tensor not in method.trained:
                raise ConfigError(f"key 'train.{key}': method {method.name!r} trains no {what}; leave it out")
        if self.adapter.budget is not None and not method.ranked:
            raise ConfigError(
                f"key 'adapter.budget': method {method.name!r} has no rank to choose; leave it out, or choose another "
                "method"
            )
        if self.adapter.budget is not None and any("rest" in sides for sides in method.trained.values()):
            raise ConfigError(
                f"key 'adapter.budget': a larger rank of method {method.name!r} can take fewer parameters; set "
                "adapter.r, or choose another method"
            )
        if self.adapter.init_from is not None and method.start == "none":
            raise ConfigError(
                f"key 'adapter.init_from': the start of method {method.name!r} takes nothing of the weights; leave it "
                "out, or choose another method"
            )
        norm_gradient = method.gradient_through_norm(self.adapter.norm_gradient)
        adapter = self.adapter.model_copy(update={"norm_gradient": norm_gradient})
        train = self.train
        choices: dict[str, Any] = self._chosen_section()
        if train.learning_rate is None:
            choices["learning_rate"] = default_rate(method, from_rows=train.from_rows)
        if train.max_steps is None and train.num_train_epochs is None:
            choices["num_train_epochs"] = 1.0
        return self._with(adapter, train.model_copy(update=choices))

    def _with(self, adapter: AdapterSection, train: TrainSection) -> RunConfig:
        return self.model_copy(update={"adapter": adapter, "train": train, "evaluation": self._chosen_metric()})

    def _chosen_section(self) -> dict[str, Any]:
        """The objective's section with its defaults, and the hashes of the files that it names; the curriculum's."""
        section = self.train.section
        if isinstance(section, GrpoSection):
            section = section.model_copy(update={"rewards": [each.sealed() for each in section.rewards]})
        found: dict[str, Any] = {} if section is None else {self.train.objective: section}
        if (stages := self.train.curriculum) is not None:
            found["curriculum"] = stages.completed(self.train.rewarded, self.evaluation.max_new_tokens)
        return found

    def _chosen_metric(self) -> EvaluationSection:
        """What decides the best adapter, where nobody said: of grpo the reward."""
        evaluation = self.evaluation
        said = "metric_for_best_model" in evaluation.model_fields_set
        if self.train.rewarded is None or said:
            return evaluation
        return evaluation.model_copy(update={"metric_for_best_model": REWARD})

    def _resolved_foreign(self) -> RunConfig:
        """The same of an adapter that stock PEFT makes; its settings are in it, and the file is no longer needed."""
        if self.train.orthogonality:
            raise ConfigError(
                "key 'train.orthogonality' is for the methods of dude methods; leave it out beside adapter.method: "
                "peft:..."
            )
        beside = sorted(self.adapter.model_fields_set - {"method", "peft"})
        if beside:
            raise ConfigError(
                f"key 'adapter.{beside[0]}' has no effect beside adapter.method: peft:...; write it into the PEFT "
                "configuration, in PEFT's words"
            )
        content = self.adapter.peft
        content = read_peft_file(self.adapter.method) if content is None else content
        settings = checked_settings(content, self.model.name_or_path)
        name = f"{PREFIX}{settings['peft_type']}"
        train = self.train
        if train.learning_rate is None:
            raise ConfigError(f"key 'train.learning_rate' is missing: {name} has no rate of ours; set one")
        for key, *_ in RATIOS:
            if getattr(train, key) != 1:
                raise ConfigError(f"key 'train.{key}' has no effect on {name}; leave it out")
        if train.movement_steps is not None:
            raise ConfigError(f"key 'train.movement_steps': the movement of {name} cannot be measured; leave it out")
        choices = self._chosen_section()
        choices |= {} if train.max_steps or train.num_train_epochs else {"num_train_epochs": 1.0}
        adapter = AdapterSection(method=name, peft=settings)
        return self._with(adapter, train.model_copy(update=choices))
