"""Merging and exporting: what consumers load is what was trained, and whatever goes wrong leaves nothing half done."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from method_rows import each_ranked_kind
from models import logits, make, perturb, tokens
from night import NIGHT
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from served import dude
from tiny import save_tiny

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.durable import locked, whole_folder
from dude_peft.artifact.header import DTYPES
from dude_peft.errors import ArtifactError, BusyError, ConfigError, NumericsError, ResourceError
from dude_peft.exporting import run as runs
from dude_peft.exporting.check import compare, tolerance
from dude_peft.exporting.run import export, merge, parse_target
from dude_peft.exporting.serving import serving_matrix
from dude_peft.exporting.verify import verify
from dude_peft.methods import METHODS
from dude_peft.model.weights import open_weights
from dude_peft.tuner.combine import Combination
from dude_peft.tuner.layer import DudeLinear

ARCHITECTURES = ["llama", "mistral-gqa", "qwen3", "gemma3-tied", "gpt2-conv1d", "opt-bias", "qwen3-moe"]
QUIET = {"verify": False, "quiet": True}


def train(model, steps=10, lr=2e-3, seed=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    ids = tokens(seed=seed)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class Trained:
    """A base model on disk, an adapter trained on it, and what both gave."""

    def __init__(self, folder, architecture="mistral-gqa", dtype=torch.float32, shards="60KB", seed=0, **settings):
        self.base, self.adapter = folder / "base", folder / "adapter"
        if not self.base.exists():
            make(architecture, dtype).save_pretrained(self.base, max_shard_size=shards)
        model = load(self.base)
        self.base_logits = logits(model).float()
        torch.manual_seed(seed)
        defaults = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
        config = DudeConfig(**{**defaults, **settings})
        # A few hundred numbers move a weight less.
        rate = 2e-3 if config.spec.delta is None else 5e-2
        adapted = train(get_peft_model(model, config), lr=rate, seed=seed)
        self.logits = logits(adapted).float()
        self.weights = {
            module.layer_name: module.effective_weight()
            for name, module in adapted.named_modules()
            if isinstance(module, DudeLinear)
        }
        adapted.save_pretrained(self.adapter)


def load(folder):
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()


def kl(p, q):
    return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())


def near(found, trained, dtype=torch.float32):
    if dtype == torch.float32:
        assert (found - trained.logits).abs().max() <= 2e-6 * trained.logits.abs().max()
    effect = kl(trained.logits, trained.base_logits)
    assert kl(trained.logits, found.float()) <= (1e-6 if dtype == torch.float32 else 0.02 * effect)
    assert effect > 1e-4


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("usual"))


def refused(call, error, *parts, output=None):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    if output is not None:
        assert not output.exists()
        assert not list(output.parent.glob(".dude-*"))


# --- merged -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_merged_model_is_the_live_adapter(architecture, dtype, tmp_path):
    targets = ["q_proj", "down_proj", "lm_head"] if architecture == "gemma3-tied" else "all-linear"
    trained = Trained(tmp_path, architecture, dtype, target_modules=targets)
    merge([trained.adapter], tmp_path / "merged", **QUIET)
    merged = load(tmp_path / "merged")
    assert merged.dtype == dtype
    near(logits(merged), trained, dtype)


@each_ranked_kind
def test_every_method_merges_and_its_stock_adapter_is_the_live_one(method, tmp_path):
    trained = Trained(tmp_path, method=method)
    merge([trained.adapter], tmp_path / "merged", **QUIET)
    near(logits(load(tmp_path / "merged")), trained)
    export(trained.adapter, "peft", tmp_path / "peft", **QUIET)
    stock = PeftModel.from_pretrained(load(trained.base), str(tmp_path / "peft"))
    assert not any(isinstance(module, DudeLinear) for module in stock.modules())
    near(logits(stock), trained)
    names = set(safetensors.torch.load_file(tmp_path / "peft/adapter_model.safetensors"))
    assert {name.rpartition(".lora_")[2] for name in names} <= {"A.weight", "B.weight", "magnitude_vector.weight"}


def test_files_and_tensors_are_laid_out_as_in_the_base(usual, tmp_path):
    merge([usual.adapter], tmp_path / "merged", **QUIET)
    base, merged = open_weights(usual.base), open_weights(tmp_path / "merged")
    assert len(base.files) > 2
    assert base.files == merged.files
    place = {name: (Path(t.file).name, t.dtype, t.shape) for name, t in base.tensors.items()}
    assert place == {name: (Path(t.file).name, t.dtype, t.shape) for name, t in merged.tensors.items()}
    for file in base.files:
        before, after = (safetensors.torch.load_file(folder / file) for folder in (usual.base, tmp_path / "merged"))
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) == (name.removesuffix(".weight") not in usual.weights)


def test_a_base_of_mixed_dtypes_and_odd_sizes(tmp_path):
    """A bfloat16 tensor of odd length must not push a float32 one off its alignment."""
    trained = Trained(tmp_path, dtype=torch.bfloat16, shards="5GB")
    path = trained.base / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    # Copies: the tensors are views of the file, which is written anew.
    tensors = {name: t.float() if "norm" in name else t.clone() for name, t in tensors.items()}
    tensors["aaa.odd"], tensors["model.bbb"] = torch.ones(3, dtype=torch.bfloat16), torch.ones(5, dtype=torch.int8)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    merge([trained.adapter], tmp_path / "merged", **QUIET)
    merged = safetensors.torch.load_file(tmp_path / "merged/model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in merged.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert all(torch.equal(merged[name], t) for name, t in tensors.items() if "proj" not in name)
    for stored in open_weights(tmp_path / "merged").tensors.values():
        assert stored.offset % DTYPES.get(stored.dtype, torch.int8).itemsize == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_can_be_chosen(dtype, usual, tmp_path):
    merge([usual.adapter], tmp_path / "merged", dtype=dtype, **QUIET)
    merged = load(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {getattr(torch, dtype)}
    assert kl(usual.logits, logits(merged).float()) <= 0.02 * kl(usual.logits, usual.base_logits)


def test_small_changes_survive_a_merge_in_bfloat16(tmp_path):
    """Rounded to the nearest, a gain of 1.001 on a bfloat16 weight gives the weight back: nothing would be merged."""
    trained = Trained(tmp_path, dtype=torch.bfloat16)
    model = load_adapter(load(trained.base), trained.adapter, is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
            if "lora_dm" in name:
                parameter.fill_(1e-3)
                parameter.mul_(model.get_submodule(name.partition(".lora_dm")[0]).lora_m0["default"])
    model.save_pretrained(tmp_path / "small")
    merge([tmp_path / "small"], tmp_path / "merged", **QUIET)
    before = {name: p for name, p in load(trained.base).named_parameters() if "proj.weight" in name}
    after = dict(load(tmp_path / "merged").named_parameters())
    delivered = [
        float((after[n].double() * p.double()).sum() / p.double().square().sum() - 1) for n, p in before.items()
    ]
    assert 0.9e-3 <= sum(delivered) / len(delivered) <= 1.1e-3


def test_a_tied_weight_is_split_only_where_one_side_changes(tmp_path):
    trained = Trained(tmp_path, "gemma3-tied", target_modules=["q_proj", "lm_head"])
    merge([trained.adapter], tmp_path / "merged", **QUIET)
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    merged = load(tmp_path / "merged")
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert torch.equal(merged.model.embed_tokens.weight, load(trained.base).model.embed_tokens.weight)
    others = Trained(tmp_path / "others", "gemma3-tied")
    merge([others.adapter], tmp_path / "tied", **QUIET)
    assert json.loads((tmp_path / "tied/config.json").read_text())["tie_word_embeddings"] is True
    near(logits(load(tmp_path / "tied")), others)


@pytest.mark.parametrize(("target", "tied"), [("embed_tokens", True), ("lm_head", False)])
def test_a_tied_weight_that_is_stored_twice_is_merged(target, tied, tmp_path):
    base, head = tmp_path / "base", "lm_head.weight"
    make("gemma3-tied").save_pretrained(base)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    stored = {**tensors, head: tensors["model.embed_tokens.weight"].clone()}
    safetensors.torch.save_file(stored, base / "model.safetensors", {"format": "pt"})
    trained = Trained(tmp_path, target_modules=["q_proj", target])
    merge([trained.adapter], tmp_path / "merged", **QUIET)
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is tied
    found = safetensors.torch.load_file(tmp_path / "merged/model.safetensors")
    assert found.keys() == stored.keys()
    assert torch.equal(found[head], found["model.embed_tokens.weight"]) is tied
    near(logits(load(tmp_path / "merged")), trained)
    stored[head][5, 3] += 1
    safetensors.torch.save_file(stored, base / "model.safetensors", {"format": "pt"})
    call = lambda: merge([trained.adapter], tmp_path / "other", **QUIET)  # noqa: E731
    refused(call, ArtifactError, "embed_tokens.weight and lm_head.weight", "differ", output=tmp_path / "other")


@pytest.mark.parametrize("architecture", ["mistral-gqa", "gemma3-tied"])
def test_modules_trained_whole_are_merged(architecture, tmp_path):
    trained = Trained(tmp_path, architecture, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"])
    merge([trained.adapter], tmp_path / "merged", **QUIET)
    near(logits(load(tmp_path / "merged")), trained)
    refused(lambda: export(trained.adapter, "lora:8", tmp_path / "x", **QUIET), ConfigError, "trained in full")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_merged(bias, tmp_path):
    trained = Trained(tmp_path, "opt-bias", bias=bias)
    merge([trained.adapter], tmp_path / "merged", **QUIET)
    near(logits(load(tmp_path / "merged")), trained)


def test_companions_come_along(tmp_path):
    save_tiny(tmp_path / "base")
    (tmp_path / "base/LICENSE").write_text("free")
    (tmp_path / "base/modeling_x.py").write_text("raise SystemExit")
    settings = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**settings, "auto_map": {"AutoConfig": "modeling_x.X"}}))
    (tmp_path / "base/generation_config.json").write_text('{"max_new_tokens": 7}')
    model = get_peft_model(load(tmp_path / "base"), DudeConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    merge([tmp_path / "adapter"], tmp_path / "merged", **QUIET)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"} <= names
    assert "modeling_x.py" not in names
    assert "auto_map" not in (tmp_path / "merged/config.json").read_text()
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 7
    tokenizers = [transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "merged")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template is not None


# --- several adapters ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(usual, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(usual.base, folder / "base")
    return usual, Trained(folder, seed=7, method="dora", r=8)


def merged_weights(folder, name):
    return dict(load(folder).named_modules())[name].weight


def test_weights_are_linear_in_the_changes(two, tmp_path):
    first, second = two
    merge([first.adapter, second.adapter], tmp_path / "m", weights=[0.75, -0.5], base=str(first.base), **QUIET)
    base = load(first.base)
    for name, weight in first.weights.items():
        W0 = base.get_submodule(name).weight
        expected = W0 + 0.75 * (weight - W0) - 0.5 * (second.weights[name] - W0)
        assert torch.allclose(merged_weights(tmp_path / "m", name), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "architecture", "dtype"),
    [
        ("dude", "gpt2-conv1d", torch.bfloat16),
        ("dude", "mistral-gqa", torch.float32),
        ("pissa", "mistral-gqa", torch.float16),
        *(pytest.param(method, "gpt2-conv1d", torch.bfloat16, marks=pytest.mark.slow) for method in METHODS),
    ],
)
def test_merging_in_memory_gives_the_bits_of_the_files(method, architecture, dtype, tmp_path):
    first = Trained(tmp_path, architecture, dtype, method=method)
    shutil.copytree(first.base, tmp_path / "two/base")
    second = Trained(tmp_path / "two", seed=7, method="dora", r=8)
    for number, paths in enumerate(([first.adapter], [first.adapter, second.adapter])):
        model = load(first.base)
        for path in paths:
            model = load_adapter(model, path, adapter_name=path.parent.name.replace("-", "_")[-20:])
        model.base_model.set_adapter(list(model.peft_config))
        plain = model.merge_and_unload().state_dict()
        merge(paths, tmp_path / f"m{number}", base=str(first.base), **QUIET)
        written = load(tmp_path / f"m{number}").state_dict()
        assert all(torch.equal(plain[name], tensor) for name, tensor in written.items())


@pytest.mark.slow  # two processes
def test_a_share_of_a_tied_output_layer_is_verified_and_right(tmp_path):
    trained = Trained(tmp_path, "gemma3-tied", target_modules=["q_proj", "lm_head"])
    merge([trained.adapter], tmp_path / "half", weights=[0.5], quiet=True)  # refused where the live sum is wrong
    tied, weight = load(trained.base).lm_head.weight, trained.weights["lm_head"]
    assert torch.allclose(load(tmp_path / "half").lm_head.weight, tied + 0.5 * (weight - tied), atol=1e-6)


def test_every_layer_loses_entries_of_its_own():
    combination = Combination("dare_linear", 0.5, seed=3)
    first, again, other = (combination.of([torch.ones(64, 64)], [1.0], layer) for layer in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert 0.4 < float((first == other).float().mean()) < 0.6


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_pefts_combinations_run_on_the_changes(kind, two, tmp_path):
    first, second = two
    options = {"combination": kind, "density": 0.4, "weights": [1.0, 0.5], "base": str(first.base), **QUIET}
    merge([first.adapter, second.adapter], tmp_path / "m", **options)
    merge([first.adapter, second.adapter], tmp_path / "again", **options)
    name = "model.layers.1.mlp.up_proj"
    W0 = load(first.base).get_submodule(name).weight
    deltas = [first.weights[name] - W0, second.weights[name] - W0]
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"0:{name}".encode()).digest()[:8], "little"))
    expected = W0 + getattr(merge_utils, kind)(deltas, torch.tensor([1.0, 0.5]), 0.4)
    found = merged_weights(tmp_path / "m", name)
    assert torch.equal(found, merged_weights(tmp_path / "again", name))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"weights": [1.0]}, ("2 adapters and 1 weights", "--weight")),
        ({"weights": [1.0, float("nan")]}, ("--weight nan", "the largest weight is 1000")),
        ({"weights": [1.0, float("-inf")]}, ("--weight -inf", "the largest weight is 1000")),
        ({"weights": [1e308, 1.0]}, ("--weight 1e+308", "the largest weight is 1000")),
        ({"weights": [1.0, 10**400]}, ("--weight 1000", "the largest weight is 1000")),
        ({"weights": []}, ("2 adapters and 0 weights",)),
        ({"combination": "\x1b[2J"}, ("\\x1b[2J", "unknown")),
        ({"combination": "tie"}, ("'tie' is unknown", "'ties'")),
        ({"combination": "ties"}, ("density", "0.5")),
        ({"combination": "ties", "density": 0.0}, ("density",)),
        ({"combination": "ties", "density": 1e-9}, ("density 1e-09 keeps none of the",)),
        ({"seed": -1}, ("seed -1", "2**32")),
        ({"density": 0.5}, ("linear takes no density",)),
        ({"dtype": "int8"}, ("int8", "bfloat16")),
    ],
)
def test_wrong_options_of_a_merge(options, parts, two, tmp_path):
    paths = [one.adapter for one in two]
    refused(lambda: merge(paths, tmp_path / "m", **{**QUIET, **options}), ConfigError, *parts, output=tmp_path / "m")


def test_an_adapter_that_is_listed_twice_is_refused(usual, tmp_path):
    for other in (usual.adapter, f"{usual.adapter}/", usual.adapter / "." / "x" / ".."):
        refused(
            lambda other=other: merge([usual.adapter, other], tmp_path / "m", **QUIET),
            ConfigError, "listed twice", output=tmp_path / "m",
        )  # fmt: skip


# --- lora:K -------------------------------------------------------------------------------------------------------


def test_a_lora_of_the_changes_own_rank_is_exact(tmp_path):
    trained = Trained(tmp_path, method="lora", r=8)
    export(trained.adapter, "lora:8", tmp_path / "lora", **QUIET)
    near(logits(PeftModel.from_pretrained(load(trained.base), str(tmp_path / "lora"))), trained)


@pytest.mark.parametrize("architecture", ["mistral-gqa", "gpt2-conv1d"])
def test_a_lora_of_lower_rank_is_the_best_there_is(architecture, tmp_path):
    trained = Trained(tmp_path, architecture)
    export(trained.adapter, "lora:16", tmp_path / "lora", **QUIET)
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"], settings["use_dora"]) == (
        16,
        16,
        False,
        False,
    )
    assert settings["init_lora_weights"] is True
    assert all("." not in name for name in settings["target_modules"])
    captured = json.loads((tmp_path / "lora/dude_export.json").read_text())["captured"]
    tensors = safetensors.torch.load_file(tmp_path / "lora/adapter_model.safetensors")
    base = load(trained.base)
    for name, weight in trained.weights.items():
        module = base.get_submodule(name)
        W0 = module.weight.T if architecture == "gpt2-conv1d" else module.weight
        change = (weight - W0).double()
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        best = U[:, :16] * S[:16] @ Vh[:16]
        A, B = (tensors[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
        missed = (change - best).norm()
        assert (change - B @ A).norm() <= missed * (1 + 1e-3) + 1e-5 * change.norm()
        assert captured[name] == pytest.approx(float(S[:16].square().sum() / S.square().sum()), abs=1e-4)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert kl(trained.logits, logits(stock)) < 0.5 * kl(trained.logits, trained.base_logits)


def test_the_exported_targets_are_the_adapted_layers_and_no_others(tmp_path):
    trained = Trained(tmp_path, layers_to_transform=[1], target_modules=["q_proj", "v_proj"])
    export(trained.adapter, "lora:8", tmp_path / "lora", **QUIET)
    stock = PeftModel.from_pretrained(load(trained.base), str(tmp_path / "lora"))
    adapted = {name for name, module in stock.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"base_model.model.model.layers.1.self_attn.{which}_proj" for which in "qv"}


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("lora:0", ("8, 16, 32",)),
        ("lora:12", ("lora:12", "8, 16, 32")),
        ("lora:64", ("lora:64", "'model.layers.0.self_attn.k_proj'", "rank 24 at most")),
        ("lora", ("choose",)),
        ("lora:-1", ("choose",)),
        ("lora:8.5", ("choose",)),
        ("lora:auto", ("--max-kl",)),
        ("merged:x", ("choose",)),
        ("gguf:", ("choose",)),
        ("onnx", ("choose", "merged")),
        ("\x1b[2J", ("choose",)),
    ],
)
def test_targets_that_cannot_be(target, parts, usual, tmp_path):
    refused(lambda: export(usual.adapter, target, tmp_path / "x", **QUIET), ConfigError, *parts, output=tmp_path / "x")


def test_targets():
    assert parse_target("lora:16").rank == 16
    assert parse_target("lora:auto").rank is None
    assert parse_target("gguf").quantisation == "F16"
    assert parse_target("gguf:Q8_0").quantisation == "Q8_0"


# --- what is refused, and what is left behind ---------------------------------------------------------------------


def test_an_output_that_is_there_is_never_touched(usual, tmp_path):
    for make_it in (Path.mkdir, Path.touch, lambda path: path.symlink_to(tmp_path / "elsewhere")):
        output = tmp_path / "out"
        make_it(output)
        refused(lambda: merge([usual.adapter], tmp_path / "out", **QUIET), ConfigError, "already exists")
        assert output.is_symlink() or output.exists()
        shutil.rmtree(output) if output.is_dir() and not output.is_symlink() else output.unlink()
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused_or_marked(usual, tmp_path):
    other = tmp_path / "other"
    make("mistral-gqa", seed=1).save_pretrained(other)
    call = {"base": str(other), **QUIET}
    for action in (lambda out, **more: merge([usual.adapter], out, **call, **more),
                   lambda out, **more: export(usual.adapter, "lora:8", out, **call, **more),
                   lambda out, **more: export(usual.adapter, "peft", out, **call, **more)):  # fmt: skip
        refused(
            lambda action=action: action(tmp_path / "out"), ArtifactError, "16 of 21 differ", output=tmp_path / "out"
        )
        action(tmp_path / "out", allow_base_mismatch=True)
        assert json.loads((tmp_path / "out/dude_export.json").read_text())["base_mismatch_allowed"] is True
        shutil.rmtree(tmp_path / "out")


def test_one_changed_weight_and_a_merged_base_are_refused(usual, tmp_path):
    merge([usual.adapter], tmp_path / "merged", **QUIET)
    call = lambda base: lambda: merge([usual.adapter], tmp_path / "out", base=str(base), **QUIET)  # noqa: E731
    refused(call(tmp_path / "merged"), ArtifactError, "not a merged one", output=tmp_path / "out")
    shutil.copytree(usual.base, tmp_path / "drifted")
    file = open_weights(tmp_path / "drifted").tensors["model.layers.1.mlp.up_proj.weight"].file
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-4
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    refused(call(tmp_path / "drifted"), ArtifactError, "1 of 21 differ", "up_proj", output=tmp_path / "out")


def test_the_same_values_resharded_and_in_another_dtype_are_the_same_base(tmp_path):
    trained = Trained(tmp_path, dtype=torch.bfloat16)
    load(trained.base).float().save_pretrained(tmp_path / "wide")
    assert len(open_weights(tmp_path / "wide").files) == 1
    merge([trained.adapter], tmp_path / "merged", base=str(tmp_path / "wide"), **QUIET)
    assert kl(trained.logits, logits(load(tmp_path / "merged"))) < 1e-4


@pytest.mark.parametrize("target", ["peft", "lora:8", "merged"])
@pytest.mark.parametrize(
    ("change", "part"), [({"num_hidden_layers": 1}, "does not have"), ({"intermediate_size": 64}, "shape")]
)
def test_an_export_for_a_base_of_another_size_is_refused(target, change, part, usual, tmp_path):
    settings = transformers.AutoConfig.from_pretrained(usual.base)
    settings.update(change)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "other")
    more = {**QUIET, "base": str(tmp_path / "other"), "allow_base_mismatch": True}
    refused(lambda: export(usual.adapter, target, tmp_path / "x", **more), ArtifactError, part, output=tmp_path / "x")


def test_a_base_of_another_shape_or_architecture_is_refused(usual, tmp_path):
    make("gpt2-conv1d").save_pretrained(tmp_path / "gpt2")
    call = lambda: merge([usual.adapter], tmp_path / "out", base=str(tmp_path / "gpt2"), **QUIET)  # noqa: E731
    refused(call, ArtifactError, "14 layers that the base model does not have", output=tmp_path / "out")
    refused(
        lambda: merge([usual.adapter], tmp_path / "out", base=str(tmp_path / "nowhere"), **QUIET),
        ConfigError,
        "no folder",
        output=tmp_path / "out",
    )


def test_a_merge_that_overflows_leaves_nothing(tmp_path):
    trained = Trained(tmp_path)
    model = load_adapter(load(trained.base), trained.adapter, is_trainable=True)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_dm" in n).fill_(7e5)
    model.save_pretrained(tmp_path / "large")
    call = lambda: merge([tmp_path / "large"], tmp_path / "out", dtype="float16", **QUIET)  # noqa: E731
    refused(call, NumericsError, "overflows", "float16", output=tmp_path / "out")


def test_a_full_disk_leaves_nothing(usual, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 10))
    refused(lambda: merge([usual.adapter], tmp_path / "out", **QUIET), ResourceError, "MiB", output=tmp_path / "out")


@pytest.mark.parametrize("target", ["merged", "peft", "lora:8"])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(target, usual, tmp_path):
    export(usual.adapter, target, tmp_path / "out", **QUIET)
    largest = max(path.stat().st_size for path in (tmp_path / "out").iterdir())
    shutil.rmtree(tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in range(0, largest, largest // 10 + 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                call = lambda: export(usual.adapter, target, tmp_path / "out", **QUIET)  # noqa: E731
                refused(call, ResourceError, "cannot be written", output=tmp_path / "out")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    export(usual.adapter, target, tmp_path / "out", **QUIET)


def test_two_at_a_time_do_not_share_an_output(usual, tmp_path):
    (tmp_path / ".dude-out").mkdir()
    with locked(tmp_path / ".dude-out"), pytest.raises(BusyError, match="another process"):
        merge([usual.adapter], tmp_path / "out", **QUIET)


def test_leftovers_of_a_killed_process_go(usual, tmp_path):
    (tmp_path / ".dude-out/deep").mkdir(parents=True)
    (tmp_path / ".dude-out/model.safetensors").write_bytes(b"half")
    merge([usual.adapter], tmp_path / "out", **QUIET)
    assert "deep" not in {path.name for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_is_flushed_before_it_is_shown(tmp_path, monkeypatch):
    calls = []
    real_sync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (calls.append("rename"), real_rename(self, to)))
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    staging = str(tmp_path / ".dude-out")
    assert calls == [f"{staging}/file", staging, "rename", str(tmp_path)]


_KILLED = """
import os, random, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from dude_peft.model.weights import open_weights
from dude_peft.exporting import merge as _, check, live, run
from dude_peft.exporting.run import merge
import hashlib, signal, pathlib
adapter, out, count = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])

def digest():
    return {{p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}}

def child():
    pid = os.fork()
    if pid == 0:
        try:
            merge([adapter], out, verify=False, quiet=True)
        finally:
            os._exit(0)
    return pid

start = time.perf_counter()
os.waitpid(child(), 0)
took = time.perf_counter() - start
whole = digest()
random.seed(0)
absent = complete = 0
for _ in range(count):
    import shutil
    shutil.rmtree(out)
    pid = child()
    time.sleep(random.uniform(0, 1.2 * took))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if out.exists():
        assert digest() == whole
        complete += 1
    else:
        absent += 1
        merge([adapter], out, verify=False, quiet=True)
        assert digest() == whole
        assert not list(out.parent.glob(".dude-*"))
print(absent, complete)
"""


@pytest.mark.slow
def test_killed_at_any_time_there_is_the_whole_model_or_nothing(usual, tmp_path):
    program = _KILLED.format(tests=str(Path(__file__).parent))
    kills = 50 if NIGHT else 15
    done = subprocess.run(
        [sys.executable, "-c", program, str(usual.adapter), str(tmp_path / "out"), str(kills)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    absent, complete = map(int, done.stdout.split())
    assert absent + complete == kills
    assert absent > kills / 10


# --- verification -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """With a tokenizer, so that real prompts are run."""
    folder = tmp_path_factory.mktemp("worded")
    save_tiny(folder / "base")
    model = get_peft_model(load(folder / "base"), DudeConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    train(model).save_pretrained(folder / "adapter")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", ["merged", "peft", "lora:32"])
def test_an_export_is_run_in_a_fresh_process_without_our_package(target, worded, tmp_path, capsys):
    export(worded / "adapter", target, tmp_path / "out", quiet=False)
    record = json.loads((tmp_path / "out/dude_export.json").read_text())
    found = record["difference"]
    assert record["verified"] is True
    assert found["tokens"] > 500
    assert found["kl_tuned_base"] > 1e-4
    assert found["kl_tuned_export"] <= (1e-9 if target != "lora:32" else 1e-2 * found["kl_tuned_base"])
    assert "same next token" in capsys.readouterr().out
    assert not (tmp_path / "out/.work").exists()


@pytest.mark.slow
def test_several_adapters_are_verified_against_their_sum(worded, tmp_path):
    model = get_peft_model(load(worded / "base"), DudeConfig(method="dora", r=8, target_modules=["q_proj", "up_proj"]))
    train(model, seed=3).save_pretrained(tmp_path / "second")
    merge([worded / "adapter", tmp_path / "second"], tmp_path / "out", weights=[0.5, 0.25], quiet=True)
    found = json.loads((tmp_path / "out/dude_export.json").read_text())["difference"]
    assert found["kl_tuned_export"] <= 1e-9 < found["kl_tuned_base"]


def test_an_export_that_is_not_the_adapter_is_removed(worded, tmp_path, monkeypatch):
    from dude_peft.artifact import effective as module

    real = module.effective_weight
    monkeypatch.setattr(module, "effective_weight", lambda W0, *rest: real(W0, *rest) * 1.05)
    call = lambda: export(worded / "adapter", "merged", tmp_path / "out", quiet=True)  # noqa: E731
    refused(call, NumericsError, "mean KL", "more than rounding", output=tmp_path / "out")


def test_what_is_believed_to_be_rounding():
    full, half = {torch.float32}, {torch.float32, torch.bfloat16}
    assert tolerance(full, kl_tuned_base=1.0) == 1e-6
    assert tolerance(half, kl_tuned_base=1.0) == 5e-3
    assert tolerance(half, kl_tuned_base=1e-3) == pytest.approx(2e-4)  # a weak adapter: a fifth of it is not rounding
    assert tolerance(half, kl_tuned_base=0.0) == 1e-4
    assert tolerance(full, 1.0, "F16") == 1e-3
    assert tolerance(full, 1.0, "Q4_K_M") == 0.5
    assert tolerance({torch.float64}, 1.0) == 1e-6


@pytest.mark.slow
def test_dropped_magnitudes_are_noticed(worded, tmp_path, monkeypatch):
    """What PEFT's own conversions do."""
    from dude_peft.artifact import effective as module

    real = module.effective_weight
    monkeypatch.setattr(
        module, "effective_weight", lambda W0, layer, scaling: real(W0, layer._replace(m0=None, dm=None), scaling)
    )
    call = lambda: export(worded / "adapter", "merged", tmp_path / "out", quiet=True)  # noqa: E731
    refused(call, NumericsError, "more than rounding", output=tmp_path / "out")


@pytest.mark.slow
def test_a_tokenizer_that_went_wrong_is_noticed(worded, tmp_path, monkeypatch):
    real = runs._Export._merge

    def spoilt(self, base, folder):
        real(self, base, folder)
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"use_regex": false', '"use_regex": true').replace(
            '"add_prefix_space": false', '"add_prefix_space": true'))  # fmt: skip

    monkeypatch.setattr(runs._Export, "_merge", spoilt)
    call = lambda: export(worded / "adapter", "merged", tmp_path / "out", quiet=True)  # noqa: E731
    refused(call, NumericsError, "tokenizer", output=tmp_path / "out")


@pytest.mark.slow
def test_an_approximation_above_the_wanted_kl_is_removed(worded, tmp_path):
    call = lambda: export(worded / "adapter", "lora:8", tmp_path / "out", max_kl=1e-9, quiet=True)  # noqa: E731
    refused(call, NumericsError, "above --max-kl", "larger rank", output=tmp_path / "out")


@pytest.mark.slow
def test_the_smallest_rank_that_reaches_a_kl_is_found(worded, tmp_path):
    export(worded / "adapter", "lora:8", tmp_path / "eight", quiet=True)
    reached = json.loads((tmp_path / "eight/dude_export.json").read_text())["difference"]["kl_tuned_export"]
    export(worded / "adapter", "lora:auto", tmp_path / "out", max_kl=0.9 * reached, quiet=True)
    record = json.loads((tmp_path / "out/dude_export.json").read_text())
    assert record["rank"] == 16
    assert record["difference"]["kl_tuned_export"] <= 0.9 * reached


def test_the_comparison_is_the_textbook():
    generator = torch.Generator().manual_seed(0)
    live, out, base = (torch.randn(5, 7, generator=generator) for _ in range(3))
    found = compare({"live.0": live, "base.0": base}, {"out.0": out}, [0])
    assert found.kl_tuned_export == pytest.approx(kl(live, out), rel=1e-5)
    assert found.kl_tuned_base == pytest.approx(kl(live, base), rel=1e-5)
    assert found.logits == pytest.approx(float((live - out).abs().max() / live.abs().max()))
    assert found.agreement == float((live.argmax(-1) == out.argmax(-1)).float().mean())
    with pytest.raises(NumericsError, match="NaN or Inf"):
        compare({"live.0": live, "base.0": base}, {"out.0": out * float("nan")}, [0])


def test_ruled_out_tokens_are_equal_where_both_rule_them_out():
    generator = torch.Generator().manual_seed(0)
    live, out, base = (torch.randn(5, 7, generator=generator) for _ in range(3))
    expected = compare({"live.0": live, "base.0": base}, {"out.0": out}, [0])

    def masked(logits):
        return torch.cat([logits, torch.full((5, 2), -torch.inf)], dim=1)

    assert compare({"live.0": masked(live), "base.0": masked(base)}, {"out.0": masked(out)}, [0]) == expected
    allowing = torch.cat([live, torch.ones(5, 2)], dim=1)
    for ours, theirs, who in ((masked(live), allowing, "live adapter"), (allowing, masked(out), "export")):
        with pytest.raises(NumericsError, match=f"the {who} is the only one that gives token 7 .* one of 10 "):
            compare({"live.0": ours, "base.0": masked(base)}, {"out.0": theirs}, [0])
    nothing = torch.full((5, 9), -torch.inf)
    with pytest.raises(NumericsError, match="live adapter itself gives NaN or Inf"):
        compare({"live.0": nothing, "base.0": masked(base)}, {"out.0": nothing}, [0])


@pytest.mark.slow
def test_a_model_that_masks_unused_vocabulary_is_exported(tmp_path):
    config = transformers.PhiConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, embd_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias[90:] = -torch.inf
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load(tmp_path / "base"), DudeConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", "merged", tmp_path / "out", quiet=True)
    found = json.loads((tmp_path / "out/dude_export.json").read_text())["difference"]
    assert found["kl_tuned_export"] <= 1e-9 < found["kl_tuned_base"]
    assert found["logits"] <= 1e-5


def test_files_have_the_usual_permissions_and_the_umask_is_never_touched(usual, tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("other threads make files meanwhile"))
            merge([usual.adapter], tmp_path / "out", **QUIET)
            # What a killed process left may have been made under another umask.
            (tmp_path / ".dude-again").mkdir(mode=0o700)
            export(usual.adapter, "peft", tmp_path / "again", **QUIET)
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "again"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


# --- dude verify and the command ----------------------------------------------------------------------------------


def test_verify_tells_what_an_adapter_is(usual, capsys):
    verify(usual.adapter, base=str(usual.base), quiet=False)
    text = capsys.readouterr().out
    for part in ("dude, r = 4", "14 layers", "complete, unchanged, finite", "ones the adapter was trained on", "vLLM"):
        assert part in text, text


def test_verify_names_the_folder_that_a_dot_means(usual, monkeypatch):
    monkeypatch.chdir(usual.adapter)
    assert verify(".").facts()[0] == f"adapter {Path.cwd()}"
    assert verify("../" + usual.adapter.name).facts()[0] == f"adapter ../{usual.adapter.name}"


def test_another_tokenizer_is_told_and_the_adapters_own_is_merged(worded, tmp_path, capsys):
    shutil.copytree(worded / "adapter", tmp_path / "adapter")
    verify(tmp_path / "adapter", base=str(worded / "base"), quiet=False)
    assert "tokenizer" not in capsys.readouterr().out.replace(str(tmp_path), "")  # the folder has the test's name
    own = transformers.AutoTokenizer.from_pretrained(worded / "base")
    own.chat_template = "{{ messages }}"
    own.add_tokens(["<new>"])
    own.save_pretrained(tmp_path / "adapter")
    verify(tmp_path / "adapter", base=str(worded / "base"), quiet=False)
    assert "not the one used in training: chat template, added tokens" in capsys.readouterr().out
    merge([tmp_path / "adapter"], tmp_path / "merged", verify=False, quiet=False)
    assert "another tokenizer: chat template, added tokens" in capsys.readouterr().out
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"


def test_verify_refuses_what_is_wrong(usual, tmp_path):
    make("mistral-gqa", seed=1).save_pretrained(tmp_path / "other")
    refused(lambda: verify(usual.adapter, base=str(tmp_path / "other"), quiet=True), ArtifactError, "16 of 21 differ")
    shutil.copytree(usual.adapter, tmp_path / "adapter")
    data = bytearray((tmp_path / "adapter/adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(data)
    refused(lambda: verify(tmp_path / "adapter", quiet=True), ArtifactError, "differs from what was saved")
    stock = get_peft_model(load(usual.base), LoraConfig(r=4, target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path / "stock")
    refused(lambda: verify(tmp_path / "stock", quiet=True), ArtifactError, "no DuDe manifest")


def test_the_serving_matrix_knows_ranks_and_magnitudes():
    by_file = lambda name, ranks: {row.file: row.answers for row in serving_matrix(METHODS[name], ranks)}  # noqa: E731
    assert "refused (DoRA)" in by_file("dude", {32})["the adapter, --to peft"]
    assert "exact, --max-lora-rank 64" in by_file("pissa", {48})["the adapter, --to peft"]
    assert "refused (rank 600)" in by_file("lora", {600})["the adapter, --to peft"]


def test_the_commands(usual, tmp_path):
    done = dude("merge", usual.adapter, "-o", tmp_path / "merged", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert "not verified" in done.stdout
    again = dude("export", usual.adapter, "--to", "merged", "-o", tmp_path / "merged")
    assert again.returncode == 2
    assert again.stderr.startswith("dude: error[config]: output")
    wrong = dude("verify", usual.adapter, "--base", tmp_path / "merged")
    assert wrong.returncode == 4
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert dude("export", usual.adapter, "--to", "lora:0", "-o", tmp_path / "x").returncode == 2
