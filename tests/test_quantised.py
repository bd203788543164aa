"""Quantised bases from disk to disk: merging back what was trained on one, and `dude init --quantize`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import transformers
from models import logits, make
from night import some_by_day
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import assert_refused, dude
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from torch import nn

from dude_peft import DudeConfig, load_adapter
from dude_peft.answer.fingerprint import model_fingerprint
from dude_peft.artifact.manifest import read_manifest
from dude_peft.config.schema import ModelSection
from dude_peft.errors import ArtifactError, ConfigError, NumericsError
from dude_peft.exporting.run import merge
from dude_peft.exporting.verify import verify
from dude_peft.init import fold as fold_room
from dude_peft.init.fold import fold
from dude_peft.model.load import load_model
from dude_peft.model.quantised import apply_as_trained_
from dude_peft.tuner import DudeLinear, frozen

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Format:
    """How transformers quantises the base, and how near the merged model comes to the live one."""

    name: str
    config: Callable[[], Any]
    needs: str
    dtype: torch.dtype = torch.float32
    kl: float = 1e-9


def _bnb(**settings: object) -> Callable[[], Any]:
    return lambda: transformers.BitsAndBytesConfig(**settings)


def _torchao(name: str, **settings: object) -> Callable[[], Any]:
    def config() -> Any:
        import torchao.quantization as quantization

        return transformers.TorchAoConfig(quant_type=getattr(quantization, name)(**settings))

    return config


def _intx() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return transformers.TorchAoConfig(
        quant_type=IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    )


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BF16 = torch.bfloat16
NF4_DOUBLE = {**NF4, "bnb_4bit_compute_dtype": BF16, "bnb_4bit_use_double_quant": True}
FORMATS = [
    Format("nf4", _bnb(**NF4), "bitsandbytes"),
    Format("nf4-bf16", _bnb(**NF4_DOUBLE), "bitsandbytes", BF16, 1e-4),
    Format("int8", _bnb(load_in_8bit=True), "bitsandbytes"),
    Format("torchao-int8", _torchao("Int8WeightOnlyConfig"), "torchao"),
    Format("torchao-int4", _intx, "torchao"),
    Format("torchao-int4-tiled", _torchao("Int4WeightOnlyConfig", group_size=32), "torchao", BF16, 1e-4),
]  # fmt: skip
RESIDUALS = ["nf4", "int8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A full-precision checkpoint in several files."""
    folder = tmp_path_factory.mktemp("model") / "model"
    tiny_llama().save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=FORMATS, ids=lambda form: form.name)
def form(request, model) -> Format:
    """A format whose library is here and which runs on this CPU."""
    return _runnable(request.param, model)


@pytest.fixture
def bitsandbytes() -> None:
    _needs("bitsandbytes")


def _needs(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed; install dude-peft[quant]")


def _runnable(form: Format, model: Path) -> Format:
    _needs(form.needs)
    try:
        logits(load(model, form), IDS)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"{form.name} does not run on this CPU: {str(error).splitlines()[0]}")
    return form


def load(folder: Path, form: Format | None = None, dtype: torch.dtype | None = None) -> Any:
    options = {} if form is None else {"quantization_config": form.config(), "dtype": form.dtype}
    options |= {} if dtype is None else {"dtype": dtype}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def trained(base: nn.Module, steps: int = 20, **settings: object) -> tuple[PeftModel, list[float]]:
    torch.manual_seed(0)
    adapted = base
    if not isinstance(base, PeftModel):
        adapted = get_peft_model(
            base, DudeConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings})
        )
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    apply_as_trained_(adapted.eval())
    return adapted, losses


def kl(live: nn.Module, other: nn.Module) -> float:
    """Mean KL(live || other), nats a token."""
    for model in (live, other):
        apply_as_trained_(model.eval())
    log_p, log_q = (logits(m, IDS).double().log_softmax(-1) for m in (live, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


# --- merging what was trained on a quantised base -----------------------------------------------------------------


def test_merging_gives_a_dense_model_that_does_what_the_adapter_does(form, model, tmp_path):
    base = load(model, form)
    live, losses = trained(base)
    assert losses[-1] < losses[0] - 0.3
    live.save_pretrained(tmp_path / "adapter")
    recorded = read_manifest(tmp_path / "adapter").quantization
    assert recorded["dtype"] == str(form.dtype).removeprefix("torch.")
    merge([tmp_path / "adapter"], tmp_path / "merged", verify=False, quiet=True)
    merged = load(tmp_path / "merged", dtype=form.dtype)
    assert not hasattr(merged.config, "quantization_config")
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert {p.dtype for p in merged.parameters()} == {form.dtype}
    with live.disable_adapter():
        moved = kl(live, merged)
    assert kl(live, merged) < form.kl
    assert moved > 10 * form.kl
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert not list(tmp_path.rglob(".work"))


@pytest.mark.parametrize("name", some_by_day(["nf4", "int8"], []))
def test_the_command_proves_the_merge_in_fresh_processes(name, model, tmp_path):
    form = _runnable(next(f for f in FORMATS if f.name == name), model)
    live, _ = trained(load(model, form))
    live.save_pretrained(tmp_path / "adapter")
    done = dude("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads((tmp_path / "merged" / "dude_export.json").read_text())["verified"]
    if name == "int8":
        return  # PEFT's own DoRA fails in its second forward on these layers
    done = dude("export", tmp_path / "adapter", "--to", "peft", "-o", tmp_path / "stock")
    assert done.returncode == 0, done.stderr


def test_a_base_that_was_saved_quantised(bitsandbytes, model, tmp_path):
    load(model, FORMATS[0]).save_pretrained(tmp_path / "base")
    live, _ = trained(load(tmp_path / "base"))
    live.save_pretrained(tmp_path / "adapter")
    verify(tmp_path / "adapter", base=str(tmp_path / "base"), quiet=True)
    verify(tmp_path / "adapter", base=str(model), quiet=True)  # the same weights, quantised while they are loaded
    merge([tmp_path / "adapter"], tmp_path / "merged", verify=False, quiet=True)
    assert kl(live, load(tmp_path / "merged")) < 1e-9


@pytest.mark.slow
def test_several_adapters_on_one_quantised_base(bitsandbytes, model, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        live, _ = trained(load(model, FORMATS[0]), svd_seed=seed, r=seed + 2)
        live.save_pretrained(tmp_path / name)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged", weights=[0.5, 0.25], quiet=True)
    assert json.loads((tmp_path / "merged" / "dude_export.json").read_text())["difference"]["kl_tuned_export"] < 1e-9


def test_another_base_is_refused(bitsandbytes, model, tmp_path):
    save_tiny(tmp_path / "other", seed=5)
    live, _ = trained(load(model, FORMATS[0]), steps=1)
    live.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="different base weights: 14 of 14 differ") as caught:
        merge([tmp_path / "adapter"], tmp_path / "merged", base=str(tmp_path / "other"), quiet=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="different base weights"):
        verify(tmp_path / "adapter", base=str(tmp_path / "other"), quiet=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("merged")] == []
    allowed = merge(
        [tmp_path / "adapter"], tmp_path / "merged", base=str(tmp_path / "other"), allow_base_mismatch=True,
        verify=False, quiet=True,
    )  # fmt: skip
    assert json.loads((allowed.path / "dude_export.json").read_text()) == allowed.record
    assert allowed.record["base_mismatch_allowed"]


@pytest.mark.parametrize("quantization", ["nf4", "int8", "torchao:int8_weight_only"])
def test_the_print_of_a_quantised_model_tells_a_weight_from_its_double(quantization, tmp_path):
    """The codes of both are the same; answers that are kept belong to one of them."""
    pytest.importorskip(quantization.partition(":")[0] if ":" in quantization else "bitsandbytes")
    found = {}
    for name, factor in (("once", 1), ("again", 1), ("twice", 2)):
        save_tiny(tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        scaled = {key: value * factor if "_proj" in key else value for key, value in weights.items()}
        save_file(scaled, tmp_path / name / "model.safetensors", {"format": "pt"})
        section = ModelSection(name_or_path=str(tmp_path / name), quantization=quantization)
        model = load_model(section, section.name_or_path)
        found[name] = model_fingerprint(model)
        for training in (True, False):
            model.train(training)(torch.arange(8)[None])
        assert model_fingerprint(model) == found[name], "a forward changes it"
    assert found["once"] == found["again"] != found["twice"]


def test_adapters_of_plain_bases_say_nothing_of_quantisation(model, tmp_path):
    live, _ = trained(load(model), steps=1)
    live.save_pretrained(tmp_path / "adapter")
    assert read_manifest(tmp_path / "adapter").quantization is None
    assert b"quantization" not in (tmp_path / "adapter" / WEIGHTS).read_bytes()


# --- dude init --quantize -----------------------------------------------------------------------------------------


SETTINGS = {"method": "dude", "r": 8, "lora_alpha": 12, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folded(model, tmp_path_factory) -> Callable[[str], tuple[Path, Path, list[Any]]]:
    """Format -> adapter, its base, the errors."""
    _needs("bitsandbytes")
    made: dict[str, tuple[Path, Path, list[Any]]] = {}

    def get(name: str) -> tuple[Path, Path, list[Any]]:
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            errors = fold(str(model), place / "adapter", place / "base", SETTINGS, name, quiet=True)
            made[name] = place / "adapter", place / "base", errors
        return made[name]

    return get


@pytest.mark.parametrize("name", RESIDUALS)
def test_stock_transformers_loads_the_residual_model(name, folded, model):
    adapter, base, errors = folded(name)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not any(info.values()), info
    kinds = {n: type(m).__name__ for n, m in loaded.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"Linear4bit" if name == "nf4" else "Linear8bitLt"}
    assert len(errors) == len(kinds) == 14
    original = load(model)
    assert torch.equal(loaded.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert (base / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in adapter.iterdir()) == [CONFIG, WEIGHTS]
    transformers.AutoTokenizer.from_pretrained(base)


@pytest.mark.parametrize("name", RESIDUALS)
def test_the_layout_is_that_of_a_model_which_transformers_quantised_and_saved(name, folded, model, tmp_path):
    config = FORMATS[0].config() if name == "nf4" else FORMATS[2].config()
    own = transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    own.save_pretrained(tmp_path)
    ours, theirs = {}, {}
    for folder, found in ((folded(name)[1], ours), (tmp_path, theirs)):
        for file in folder.glob("*.safetensors"):
            found |= {n: (t.dtype, tuple(t.shape)) for n, t in load_file(file).items()}
    assert ours == theirs


@pytest.mark.parametrize("name", RESIDUALS)
def test_the_start_is_nearer_to_the_model_than_plain_quantisation(name, folded, model):
    adapter, base, errors = folded(name)
    original = load(model)
    plain = load(model, FORMATS[0] if name == "nf4" else FORMATS[2])
    start = load_adapter(load(base), adapter).eval()
    assert all(error.residual < error.plain for error in errors)
    assert kl(original, start) < kl(original, plain)
    for layer in start.modules():
        if isinstance(layer, DudeLinear):
            W0 = original.get_submodule(layer.layer_name).weight.double()
            error = next(e for e in errors if e.layer == layer.layer_name)
            assert torch.allclose(layer.gain("default"), torch.ones(()), atol=1e-6)
            assert (
                abs(float((layer.effective_weight().detach().double() - W0).norm() / W0.norm()) - error.residual) < 1e-5
            )
            Q = frozen.dense_weight(plain.get_submodule(layer.layer_name)).double()
            assert abs(float((Q - W0).norm() / W0.norm()) - error.plain) < 1e-5
    with start.disable_adapter():  # the folded form: what is left is the residual, not the model
        assert kl(original, start) > 10 * kl(original, plain)


@pytest.mark.parametrize("name", RESIDUALS)
def test_training_reloading_and_merging(name, folded, tmp_path):
    adapter, base, _ = folded(name)
    live, losses = trained(load_adapter(load(base), adapter, is_trainable=True), steps=20)
    assert losses[-1] < losses[0] - 0.3
    live.save_pretrained(tmp_path / "trained")
    again = load_adapter(load(base), tmp_path / "trained").eval()
    apply_as_trained_(again)
    assert torch.equal(logits(again, IDS), logits(live, IDS))
    stock = PeftModel.from_pretrained(load(base), tmp_path / "trained").eval()
    assert kl(live, stock) < 1e-9
    merge([tmp_path / "trained"], tmp_path / "merged", verify=False, quiet=True)
    assert kl(live, load(tmp_path / "merged")) < 1e-9


def test_the_start_itself_reloads_bit_by_bit(folded, tmp_path):
    adapter, base, _ = folded("nf4")
    first = load_adapter(load(base), adapter, is_trainable=True)
    first.save_pretrained(tmp_path)
    second = load_adapter(load(base), tmp_path)
    assert torch.equal(logits(first.eval(), IDS), logits(second.eval(), IDS))


def test_the_bytes_do_not_depend_on_the_number_of_threads(folded, model, tmp_path):
    _, base, _ = folded("nf4")
    torch.set_num_threads(3)
    try:
        fold(str(model), tmp_path / "adapter", tmp_path / "base", SETTINGS, "nf4", quiet=True)
    finally:
        torch.set_num_threads(1)
    for file in base.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "base" / file.name).read_bytes()


COMMON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _gpt2() -> Any:  # Conv1D
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4))


def _opt() -> Any:  # biases
    return transformers.OPTForCausalLM(transformers.OPTConfig(**COMMON, ffn_dim=128, word_embed_proj_dim=64))


def _gemma3() -> Any:  # tied embeddings
    config = {**COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config))


@pytest.mark.parametrize(
    ("architecture", "dtype", "settings"),
    [
        (_gpt2, torch.float32, {}),
        (_opt, BF16, {"method": "pissa", "exclude_modules": ["k_proj"]}),
        (_gemma3, BF16, {"rank_pattern": {"q_proj": 5}, "target_modules": ["q_proj", "down_proj"]}),
    ],
)
@pytest.mark.parametrize("name", RESIDUALS)
def test_other_architectures_dtypes_and_methods(name, bitsandbytes, architecture, dtype, settings, tmp_path):
    torch.manual_seed(0)
    original = architecture().to(dtype).eval()
    original.save_pretrained(tmp_path / "model")
    settings = {**SETTINGS, **settings}
    errors = fold(str(tmp_path / "model"), tmp_path / "adapter", tmp_path / "base", settings, name, quiet=True)
    assert mean(e.residual for e in errors) < mean(e.plain for e in errors)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values()), info
    start = load_adapter(loaded, tmp_path / "adapter").eval()
    assert start.peft_config["default"].method == ("lora" if settings["method"] == "pissa" else "dora")
    quantised = [m for m in start.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert len(quantised) == len(errors)
    ours, theirs = logits(start), logits(original)
    assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 0.2


def test_zero_rows_and_a_zero_weight(bitsandbytes, tmp_path):
    original = tiny_llama()
    original.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    original.model.layers[1].mlp.up_proj.weight.data.zero_()
    original.save_pretrained(tmp_path / "model")
    for name in RESIDUALS:
        place = tmp_path / name
        fold(str(tmp_path / "model"), place / "adapter", place / "base", SETTINGS, name, quiet=True)
        _, losses = trained(load_adapter(load(place / "base"), place / "adapter", is_trainable=True))
        assert losses[-1] < losses[0]


# --- refusals -----------------------------------------------------------------------------------------------------


def refused(error: type[Exception], match: str, tmp_path: Path, model: Path, **changes: Any) -> None:
    arguments = {"output": tmp_path / "adapter", "residual": tmp_path / "base", "form": "nf4", **changes}
    settings = {**SETTINGS, **arguments.pop("settings", {})}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match) as caught:
        fold(
            str(model), arguments.pop("output"), arguments.pop("residual"), settings, arguments.pop("form"),
            **{"quiet": True, **arguments},
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_done_is_said_in_one_line(bitsandbytes, model, tmp_path):
    refused(ConfigError, "--quantize fp3: choose nf4 or int8", tmp_path, model, form="fp3")
    refused(ConfigError, "not lora", tmp_path, model, settings={"method": "lora"})
    refused(ConfigError, "need each other", tmp_path, model, residual=None)
    refused(ConfigError, "need each other", tmp_path, model, form=None)
    refused(ConfigError, "leave out --workers", tmp_path, model, workers=2)
    refused(ConfigError, "two separate folders", tmp_path, model, residual=tmp_path / "adapter" / "base")
    refused(ConfigError, "already exists", tmp_path, model, output=model)
    refused(ConfigError, "already exists", tmp_path, model, residual=model)
    tied = tmp_path / "tied"
    tiny_llama(tie_word_embeddings=True).save_pretrained(tied)
    settings = {"target_modules": ["lm_head", "q_proj"]}
    refused(ConfigError, "'lm_head' cannot be quantised: another layer has", tmp_path, tied, settings=settings)
    narrow = tmp_path / "narrow"
    make("llama").save_pretrained(narrow)
    refused(ConfigError, r"q_proj' \(out 48, in 48\) does not fit nf4", tmp_path, narrow)
    wide = tmp_path / "wide"
    tiny_llama(dtype=torch.float64).save_pretrained(wide)
    refused(ConfigError, "no nf4 for a model in torch.float64", tmp_path, wide)
    large = tmp_path / "large"
    broken = tiny_llama()
    broken.model.layers[0].self_attn.q_proj.weight.data[:, 5] = 1e6  # int8 goes through float16
    broken.model.layers[0].self_attn.q_proj.weight.data += torch.randn(64, 64) * 1e5
    broken.save_pretrained(large)
    refused(NumericsError, "overflows int8", tmp_path, large, form="int8")


def test_without_bitsandbytes_the_line_says_how_to_get_it(model, tmp_path, monkeypatch):
    import dude_peft.init.bnb as bnb

    monkeypatch.setattr(bnb.importlib.util, "find_spec", lambda name: None)
    refused(ConfigError, r"needs bitsandbytes: pip install 'dude-peft\[quant\]'", tmp_path, model)


def test_a_layer_that_bitsandbytes_cannot_take(bitsandbytes, model, tmp_path, monkeypatch):
    import bitsandbytes.functional as functional

    monkeypatch.setattr(functional, "quantize_4bit", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("blocks")))
    refused(ConfigError, r"cannot quantise 'model.layers.0.self_attn.q_proj' .*\(blocks\)", tmp_path, model)


def test_whatever_ends_it_leaves_nothing_half_written(bitsandbytes, model, tmp_path, monkeypatch):
    monkeypatch.setattr(fold_room, "_write_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fold(str(model), tmp_path / "adapter", tmp_path / "base", SETTINGS, "nf4", quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command(bitsandbytes, model, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    arguments = ("init", model, "-o", adapter, "--r", 4, "--quantize", "nf4", "--residual", base)
    done = dude(*arguments)
    assert done.returncode == 0, done.stderr
    assert "quantisation error" in done.stdout
    assert "without the factors taken out" in done.stdout
    assert "already exists" in assert_refused(dude(*arguments), 2, "config")
    shutil.rmtree(base)
    assert "need each other" in assert_refused(dude(*arguments[:-2]), 2, "config")
    shutil.rmtree(adapter)
    assert dude(*arguments).returncode == 0
    done = dude("export", adapter, "--to", "merged", "-o", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert kl(load(model), load(tmp_path / "merged")) < 0.05
