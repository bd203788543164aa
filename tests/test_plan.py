"""`dude plan`: its bill against real training steps, its refusals against the real run's, what it tells to change."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from models import make
from night import some_by_day
from served import children_seconds, dude, fresh
from tiny import save_tiny, write_rows
from transformers.integrations import integration_utils

from dude_peft import DudeConfig
from dude_peft.config.schema import (
    AdapterSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    RunConfig,
    SourceSection,
    TrainSection,
)
from dude_peft.data.batches import flat, pad_right
from dude_peft.errors import ConfigError, DataError, DudeError, ResourceError
from dude_peft.methods import METHODS
from dude_peft.methods.learning_rate import default_rate, learning_rate_warning
from dude_peft.model.load import load_model, load_settings
from dude_peft.planning.bill import Cost, cost
from dude_peft.planning.device import parse_size
from dude_peft.planning.live_bytes import LiveBytes
from dude_peft.planning.optimizers import state_bytes
from dude_peft.planning.remedies import changed, remedies
from dude_peft.planning.rows import is_local, optimizer_steps
from dude_peft.planning.run import plan
from dude_peft.tuner.foreign import adapt_foreign

EVALUATION = EvaluationSection(enabled=False)


def run_of(folder: Path, adapter: dict[str, Any] | None = None, dtype: str = "auto", **train: Any) -> RunConfig:
    return RunConfig(
        model=ModelSection(name_or_path=str(folder), dtype=dtype),
        adapter=AdapterSection(**{"r": 4, **(adapter or {})}),
        data=DataSection(train="rows.jsonl"),
        train=TrainSection(**{"per_device_train_batch_size": 4, **train}),
        evaluation=EVALUATION,
        output_dir=str(folder / "out"),
    )


def cost_of(config: RunConfig, length: int, whole: bool = False) -> Cost:
    where = config.model.name_or_path
    return cost(config, load_settings(config.model, where), where, length, gpu=False, whole=whole)


def adapted(model: Any, config: RunConfig) -> Any:
    model.requires_grad_(False)
    return peft.get_peft_model(model, DudeConfig(**config.adapter.settings(), task_type="CAUSAL_LM"))


def llama(layers: int = 5, hidden: int = 128, dtype: str = "float32", **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": 352,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = transformers.LlamaConfig(**{**settings, **changes}, dtype=dtype)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


PADDED = functools.partial(pad_right, pad_id=0)


def real_step(
    model: Any, config: RunConfig, length: int, folder: Path, collate: Callable[..., Any] = PADDED
) -> tuple[int, int]:
    """Peak of what lives while Trainer takes two steps, and the bytes of the optimizer's states."""
    train = config.train
    options: dict[str, Any] = {}
    if train.gradient_checkpointing:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=2,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        optim=train.optim,
        bf16=train.bf16,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    rows = []
    for number in range(32):
        ids = [3 + (number + place) % 90 for place in range(length - number % 2)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    model.config.use_cache = False
    gc.collect()
    with LiveBytes([]) as live:
        trainer.train()
    states = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return live.peak, sum(tensor.nbytes for tensor in states)


# --- the bill -----------------------------------------------------------------------------------------------------


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "float32": ("float32", {}, {}),
    "bfloat16": ("bfloat16", {}, {}),
    "autocast": ("float32", {}, {"bf16": True}),
    "checkpointing": ("float32", {}, {"gradient_checkpointing": True}),
    "accumulation": ("float32", {}, {"gradient_accumulation_steps": 2}),
    "adafactor": ("float32", {}, {"optim": "adafactor"}),
    "sgd": ("float32", {}, {"optim": "sgd"}),
    "lora": ("float32", {"method": "lora"}, {}),
    "exact norm": ("float32", {"norm_gradient": "exact"}, {}),
    "head trained": ("float32", {"modules_to_save": ["lm_head"]}, {}),
    "large rank": ("float32", {"r": 64}, {"per_device_train_batch_size": 1}),
}


@pytest.mark.parametrize("case", some_by_day(CASES, ["bfloat16", "checkpointing"]))
def test_the_peak_is_that_of_a_real_step(case, tmp_path):
    dtype, adapter, train = CASES[case]
    config, length = run_of(tmp_path, adapter, dtype, **train), 96
    model = llama(dtype=dtype)
    model.config.save_pretrained(tmp_path)
    bill = cost_of(config, length).bill
    real = adapted(model, config)
    fixed = bill.weights + bill.adapter_frozen + bill.trained
    assert fixed == sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers()))
    # Our layer keeps buffers of a block's size as long as the process lives: filled before bytes are counted.
    real_step(adapted(llama(dtype=dtype), config), config, length, tmp_path / "first")
    peak, states = real_step(real, config, length, tmp_path)
    assert bill.optimizer == states
    assert bill.total - bill.runtime - fixed == pytest.approx(peak, rel=0.1, abs=0)


STOCK = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"], "use_dora": True}


@pytest.mark.parametrize("case", some_by_day(["one row", "packed", "stock PEFT"], ["packed"]))
def test_the_peak_is_that_of_a_real_step_where_masks_or_adapters_are_others(case, tmp_path):
    """One row has no mask, rows end to end have one of all their tokens; PEFT's own layers are counted as they are."""
    adapter = {"method": "peft:LORA", "peft": STOCK} if case == "stock PEFT" else {"method": "lora"}
    config = run_of(tmp_path, {}, "bfloat16", per_device_train_batch_size=1 if case == "one row" else 3)
    data = config.data.model_copy(update={"packing": case == "packed"})
    config = config.model_copy(update={"adapter": AdapterSection(**adapter), "data": data})
    length = 255 if case == "one row" else 96
    model = llama(dtype="bfloat16")
    model.config.save_pretrained(tmp_path)
    bill = cost_of(config, length).bill
    real = adapt_foreign(model, STOCK) if config.adapter.foreign else adapted(model, config)
    fixed = bill.weights + bill.adapter_frozen + bill.trained
    assert fixed == sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers()))
    collate = flat if case == "packed" else PADDED
    real_step(adapted(llama(dtype="bfloat16"), run_of(tmp_path)), config, length, tmp_path / "first", collate)
    peak, states = real_step(real, config, length, tmp_path, collate)
    assert bill.optimizer == states
    assert bill.total - bill.runtime - fixed == pytest.approx(peak, rel=0.1, abs=0)


def test_the_softmax_of_cuda_needs_a_table_more(tmp_path):
    """Its backward takes gradient times output first; float32 scores of 4 rows, 4 heads, 512 x 512."""
    llama(2, hidden=64, intermediate_size=64, max_position_embeddings=512).config.save_pretrained(tmp_path)
    config = changed(run_of(tmp_path), {"model.attn_implementation": "eager", "train.gradient_checkpointing": True})
    where = config.model.name_or_path
    found = [cost(config, load_settings(config.model, where), where, 512, gpu=gpu).bill for gpu in (True, False)]
    assert found[0].working - found[1].working == 4 * 4 * 512 * 512 * 4


def test_flash_attention_has_no_table_of_scores(tmp_path):
    llama(max_position_embeddings=4096).config.save_pretrained(tmp_path)

    def step(attention: str, length: int) -> int:
        config = changed(run_of(tmp_path, dtype="bfloat16"), {"model.attn_implementation": attention})
        bill = cost_of(config, length).bill
        return bill.activations + bill.working + bill.logits_and_loss

    flash = step("flash_attention_2", 1024)
    assert step("flash_attention_2", 2048) == pytest.approx(2 * flash, rel=0.02)
    assert step("sdpa", 1024) > 1.1 * flash


@pytest.mark.parametrize("train", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", some_by_day(["llama", "gemma", "patterns"], ["patterns"]))
def test_layers_of_each_kind_stand_for_all(name, train, tmp_path):
    adapter: dict[str, Any] = {}
    if name == "gemma":  # sliding and full attention in turn
        settings = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "head_dim": 12}
        layers = {"num_hidden_layers": 7, "num_key_value_heads": 2, "sliding_window": 16}
        shared = {"vocab_size": 96, "max_position_embeddings": 64, "sliding_window_pattern": 3}
        transformers.Gemma3TextConfig(**settings, **layers, **shared).save_pretrained(tmp_path)
    else:
        llama(8, dtype="bfloat16").config.save_pretrained(tmp_path)
    if name == "patterns":
        adapter = {"rank_pattern": {"layers.3.mlp.up_proj": 32}, "layers_to_transform": [0, 2, 3, 6]}
    config = run_of(tmp_path, adapter, **train)
    cost_of(config, 8)  # the first step of a process fills the table of dithers (256 KiB), which stays
    short, whole = cost_of(config, 48), cost_of(config, 48, whole=True)
    assert short.bill.total - short.bill.runtime == pytest.approx(whole.bill.total - whole.bill.runtime, rel=0.01)
    assert short.flops == whole.flops


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [
        ("llama", {}),
        ("mistral-gqa", {"rank_pattern": {"q_proj": 12}}),
        ("gemma3-tied", {"modules_to_save": ["embed_tokens"]}),
        ("gpt2-conv1d", {"bias": "all"}),
        ("opt-bias", {"bias": "lora_only", "method": "dora"}),
        ("qwen3-moe", {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"], "method": "pissa"}),
    ],
)
def test_trained_parameters_are_those_of_the_real_run(architecture, adapter, tmp_path):
    model = make(architecture)
    model.config.save_pretrained(tmp_path)
    config = run_of(tmp_path, adapter)
    static = cost_of(config, 8).static
    real = adapted(model, config)
    assert (static.trainable_parameters, static.total_parameters) == real.get_nb_trainable_parameters()
    assert static.weights + static.adapter_frozen + sum(t.nbytes for t in static.trained) == pytest.approx(
        sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers())), abs=256
    )


def test_a_step_that_cannot_be_traced_leaves_the_rest_of_the_bill(tmp_path, monkeypatch):
    llama().config.save_pretrained(tmp_path)

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("dude_peft.planning.bill.dry_step", fails)
    found = cost_of(run_of(tmp_path), 16)
    assert "no such operator" in found.uncounted
    assert found.bill.activations == 0
    assert found.bill.weights > 0


def test_a_format_whose_bytes_are_not_known_is_refused(tmp_path):
    settings = llama().config
    settings.quantization_config = {"quant_method": "gptq", "bits": 4}
    settings.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot count the memory of gptq"):
        cost_of(run_of(tmp_path), 16)


QUANTISED: list[Any] = [
    {"method": "nf4"},
    {"method": "fp4", "double_quantization": True},
    {"method": "int8"},
    {"method": "torchao:int8_weight_only"},
    {"method": "torchao:float8_weight_only"},
]


@pytest.mark.parametrize("asked", some_by_day(QUANTISED, QUANTISED[:3]), ids=lambda asked: asked["method"])
@pytest.mark.parametrize("dtype", some_by_day(["float32", "bfloat16"], ["float32"]))
def test_the_weights_of_a_quantised_model_are_counted_to_the_byte(tmp_path, asked, dtype):
    pytest.importorskip("torchao" if "torchao" in asked["method"] else "bitsandbytes", reason="dude-peft[quant]")
    save_tiny(tmp_path, intermediate_size=172)
    plain = run_of(tmp_path, dtype=dtype)
    config = changed(plain, {"model.quantization": asked})
    found, dense = cost_of(config, 16), cost_of(plain, 16)
    assert found.uncounted == ""
    assert found.bill.activations > 0
    assert found.static.total_parameters == dense.static.total_parameters
    assert found.bill.trained == dense.bill.trained
    model = load_model(config.model, str(tmp_path))
    assert found.bill.weights == sum(bytes_in(model).values())
    assert found.bill.weights < dense.bill.weights


def bytes_in(model: torch.nn.Module) -> dict[int, int]:
    """Place in memory -> bytes of every tensor that a quantised model holds."""
    found: dict[int, int] = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            for part in inside(tensor):
                found[part.data_ptr()] = part.nbytes
    return found


def inside(tensor: Any) -> list[torch.Tensor]:
    """A tensor, and what bitsandbytes or torchao keep beside it or in it."""
    if tensor is None:
        return []
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    state: Any = getattr(tensor, "quant_state", None)
    beside = [getattr(tensor, "SCB", None)]
    if state is not None:
        beside += [state.absmax, state.code]
        if state.nested:
            beside += [state.state2.absmax, state.state2.code, state.offset]
    return [tensor, *(each for each in beside if each is not None)]


@pytest.mark.slow
def test_four_bits_are_offered_where_nothing_cheaper_fits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="dude-peft[quant]")
    llama().config.save_pretrained(tmp_path)
    config = run_of(tmp_path, dtype="bfloat16", per_device_train_batch_size=1, gradient_checkpointing=True)
    quantised = changed(config, {"model.quantization": "nf4"})
    memory = cost_of(quantised, 16).bill.total
    assert memory < cost_of(config, 16).bill.total
    found = remedies(config, cost_of(config, 16), 16, memory, cost_of)
    assert [remedy.settings for remedy in found][:1] == [{"model.quantization": "nf4"}]
    assert str(found[0]) == "--set model.quantization=nf4"
    assert not any(
        "model.quantization" in each.settings for each in remedies(quantised, cost_of(quantised, 16), 16, 1, cost_of)
    )


def test_real_layers_work_after_a_dry_step(tmp_path):
    """What our layer keeps between calls must not be what a dry step made."""
    model = llama(2, hidden=136, dtype="bfloat16")
    model.config.save_pretrained(tmp_path)
    config = run_of(tmp_path, dtype="bfloat16")
    cost_of(config, 24)
    ids = torch.arange(24)[None]
    assert torch.isfinite(adapted(model, config)(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("optim", "name"),
    [
        ("adamw_8bit", "AdamW8bit"),
        ("paged_adamw_32bit", "PagedAdamW32bit"),
        ("lion_8bit", "Lion8bit"),
        ("lion_32bit", "Lion32bit"),
        ("ademamix", "AdEMAMix32bit"),
        ("ademamix_8bit", "AdEMAMix8bit"),
    ],
)
def test_states_of_bitsandbytes_optimizers_are_counted_to_the_byte(optim, name):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    parameters = [torch.nn.Parameter(torch.randn(64, 100)), torch.nn.Parameter(torch.randn(30))]
    optimizer = getattr(bitsandbytes.optim, name)(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes takes no step on this device: {error}")
    states = [value for state in optimizer.state.values() for name, value in state.items() if "qmap" not in name]
    real = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    assert state_bytes(optim, parameters) == real


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model's configuration and tokenizer, no weights, and rows."""
    folder = tmp_path_factory.mktemp("plan")
    save_tiny(folder / "model")
    (folder / "model/model.safetensors").unlink()
    write_rows(folder / "train.jsonl", 24)
    settings = {
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "adapter": {"r": 8},
        "data": {"train": str(folder / "train.jsonl")},
        "train": {"num_train_epochs": 3, "per_device_train_batch_size": 8},
        "evaluation": {"enabled": False},
        "output_dir": str(folder / "out"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_the_command_prints_one_json_object(place):
    done = dude("plan", place / "run.yaml", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    memory = told["memory"]
    parts = ("weights", "adapter_frozen", "trained", "optimizer", "gradients", "activations", "logits_and_loss")
    assert sum(memory[part] for part in (*parts, "working", "runtime")) == memory["total"]
    assert memory["fits"] is True
    assert told["steps"] == 9
    assert told["data"]["rows"] == 24
    assert told["disk"]["adapter"] > 0
    assert told["least_seconds"] > 0


def test_what_does_not_fit_is_told_after_the_bill_with_what_would(place):
    done = dude(
        "plan", place / "run.yaml", "--set", "train.per_device_train_batch_size=4096", "--device-memory", "1GiB"
    )
    assert done.returncode == 6, done.stderr
    assert "frozen weights" in done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("dude: error[resource]: training needs ")
    assert "1.00 GiB" in line
    assert "--set train.per_device_train_batch_size=" in line


def test_a_misspelt_key_costs_less_than_three_seconds(place):
    before = children_seconds()
    done = fresh("plan", place / "run.yaml", "--set", "train.learning_rat=1")
    assert children_seconds() - before < 3
    assert done.returncode == 2
    assert "learning_rate" in done.stderr


def planned(place: Path, settings: dict[str, Any], memory: str | None = None) -> Any:
    values = yaml.safe_load((place / "run.yaml").read_text())
    return plan(changed(RunConfig(**values), settings), device_memory=memory, quiet=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter.r": 1000}, "r=1000"),
        ({"adapter.r": 40, "adapter.target_modules": ["k_proj"]}, "k_proj"),  # grouped queries: 32 rows
        ({"adapter.target_modules": ["q_prj"]}, "closest: 'q_proj'"),
        ({"adapter.target_modules": ["norm"]}, "RMSNorm"),
        ({"adapter.target_modules": "(q_proj"}, "not a valid regular expression"),
        ({"adapter.method": "dud"}, "closest: 'dude'"),
        ({"model.name_or_path": "/nowhere"}, "no folder"),
        ({"model.name_or_path": "someone/nothing"}, "hub"),
    ],
)
def test_what_the_run_refuses_the_plan_refuses(place, settings, words):
    with pytest.raises(ConfigError, match=r".*") as caught:
        planned(place, settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mixture_ends_in_a_line_or_in_bounded_memory(place):
    """The run, which takes the same rows, is tested in tests/test_doors.py."""
    weights = {"train.jsonl": 1e6, "few.jsonl": 1}
    rows = [SourceSection(source=str(place / name), weight=weight) for name, weight in weights.items()]
    write_rows(place / "few.jsonl", 4)
    with pytest.raises(ConfigError, match="a mixture of 999,999,999 rows is more than"):
        planned(place, {"data.train": rows, "data.train_rows": 999_999_999})
    made = planned(place, {"data.train": rows, "data.train_rows": 20})
    assert sum("few.jsonl' of the mixture gives no row" in warning for warning in made.warnings) == 1


def test_rows_are_checked_too(place, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": \n')
    with pytest.raises(DataError):
        planned(place, {"data.train": str(bad)})
    with pytest.raises(DataError):
        planned(place, {"data.train": str(tmp_path / "missing.jsonl")})


def test_rows_longer_than_the_model_reads(tmp_path, place):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 600, "completion": "b"}) + "\n")
    with pytest.raises(ConfigError, match="the model can read only 512"):
        planned(place, {"data.train": str(long), "data.max_length": 1024})


@pytest.mark.slow
def test_every_remedy_fits_when_it_is_planned(place):
    large = {"train.per_device_train_batch_size": 2048}
    made = planned(place, large, "1000MiB")
    assert not made.fits
    with pytest.raises(ResourceError):
        made.check()
    told = made.as_dict()
    assert len(told["remedies"]) >= 2
    for remedy in told["remedies"]:
        again = planned(place, {**large, **remedy["set"]}, "1000MiB")
        assert again.cost.bill.total == pytest.approx(remedy["total"], rel=0.01)


# --- small parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 << 30), ("24 GB", 24 * 10**9), ("1.5gib", 3 << 29), ("4096", 4096), ("1T", 10**12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "80 PiB", "0", "8 0GiB"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="80GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("rows", "batch", "micro", "epochs"), [(24, 8, 1, 3.0), (25, 8, 2, 1.0), (3, 8, 4, 2.0), (7, 2, 1, 0.5)]
)
def test_steps_are_trainers(rows, batch, micro, epochs):
    from dude_peft.training.fit import trainer_steps, training_arguments

    section = TrainSection(
        learning_rate=1e-4,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=micro,
    )
    data = {"train": "builtin:word-problems", "test": "builtin:word-problems"}
    config = RunConfig(model={"name_or_path": "x"}, data=data, train=section, output_dir="nowhere")
    assert optimizer_steps(section, rows) == trainer_steps(training_arguments(config), rows)


def test_a_learning_rate_of_another_method_is_told():
    assert learning_rate_warning(METHODS["dude"], 1.4e-3) is None
    assert learning_rate_warning(METHODS["lora"], 5e-3) is None
    warning = learning_rate_warning(METHODS["dude"], 5e-3) or ""
    assert warning.count(". ") <= 1
    assert all(len(sentence.split()) <= 15 for sentence in warning.split(". "))
    assert learning_rate_warning(METHODS["lora"], 1e-2)
    assert default_rate(METHODS["dude"], from_rows=False) == 1.5e-5
    warning = learning_rate_warning(METHODS["dude"], 3e-4, from_rows=False) or ""
    assert "20 times the 1.5e-05 that suits dude and this objective." in warning
    unmeasured = replace(METHODS["dude"], name="new", rate_of="dude")
    assert "that suits dude, the relative of new." in (learning_rate_warning(unmeasured, 5e-3) or "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output_dir": "FILE"}, "is a file"),
        ({"output_dir": "FULL"}, "is not empty"),
        ({"data": {"general_test": "/nowhere.jsonl"}}, "nowhere"),
        ({"train": {"report_to": ["wandb"]}}, "pip install wandb"),
    ],
)
def test_what_the_run_would_refuse_is_refused(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [])
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "mine").write_text("x")
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    settings = {
        "model": {"name_or_path": str(save_tiny(tmp_path / "model"))},
        "data": {"train": rows, "test": rows} | changes.get("data", {}),
        "train": changes.get("train", {}),
        "output_dir": str(tmp_path / changes.get("output_dir", "out")),
    }
    with pytest.raises(DudeError, match=words):
        plan(RunConfig(**settings))


@pytest.mark.parametrize(
    "source", ["owner/data.set", "owner/set.v", "HuggingFaceH4/no_robots", "owner/name:config", "set"]
)
def test_what_the_run_takes_from_the_hub_is_no_file_for_the_plan(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local(source)
    assert not is_local([SourceSection(source=source)])


@pytest.mark.parametrize("source", ["x.jsonl", "./set", "/rows", "builtin:word-problems", "a/b/c"])
def test_what_the_run_reads_here_is_local_for_the_plan(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_local(source)


def test_rows_that_are_too_long_are_told(place, tmp_path):
    """The plan said "rows: 225 of 344 tokens", and nothing of the rows that the run would leave out."""
    pairs = [{"prompt": f"say {i}", "completion": "word " * (400 if i % 3 == 0 else 2)} for i in range(9)]
    rows = tmp_path / "some.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = planned(place, {"data.train": str(rows), "data.max_length": 128})
    assert (found.rows.rows, found.rows.left_out) == (6, 3)
    assert "3 longer ones are left out" in dict(found._facts())["rows"]
