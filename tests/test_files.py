"""Adapter files: the same from every saver, right in every loader, refused when anything about them is wrong."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from method_rows import RANKED, each_kind, each_ranked_kind, every_ranked_method
from models import logits, make, perturb, tokens
from night import some_by_day
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.fingerprint import fingerprint, same_values
from dude_peft.artifact.manifest import FORMAT_VERSION, JOINT_FORMAT_VERSION, read_manifest
from dude_peft.errors import ArtifactError, DudeError, NumericsError
from dude_peft.methods import METHODS
from dude_peft.tuner.layer import DudeLinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained adapter on disk and the logits it gave, by method."""
    made = {}

    def get(method="dude"):
        if method not in made:
            model = get_peft_model(
                make("mistral-gqa"), DudeConfig(method=method, r=4, lora_alpha=6, target_modules="all-linear")
            )
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(20):
                model(input_ids=tokens(), labels=tokens()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            folder = tmp_path_factory.mktemp(method)
            model.save_pretrained(folder)
            made[method] = (folder, logits(model.eval()))
        return made[method]

    return get


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the DuDe adapter that a test may spoil."""
    folder = tmp_path / "adapter"
    shutil.copytree(trained()[0], folder)
    return folder


def tensors_of(folder):
    return safetensors.torch.load_file(folder / WEIGHTS)


def metadata_of(folder):
    with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.metadata()


def rewrite(folder, tensors=None, manifest=None, seal=False):
    """Write other tensors or another manifest; with seal, hashes are made to fit, as a careful forger would."""
    tensors = tensors_of(folder) if tensors is None else tensors
    manifest = manifest or json.loads(metadata_of(folder)["dude"])
    if seal:
        from dude_peft.artifact.fingerprint import sha256_of

        manifest["tensors"] = {name: sha256_of([tensor]) for name, tensor in tensors.items()}
    text = json.dumps(manifest)
    metadata = {"format": "pt", "dude": text, "dude_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata))


def refused(folder, error=ArtifactError, *parts, base=None):
    with pytest.raises(error) as caught:
        load_adapter(base if base is not None else make("mistral-gqa"), folder)
    text = str(caught.value)
    assert "\n" not in text
    assert isinstance(caught.value, DudeError)
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize(
    ("with_dude", "method"),
    some_by_day(
        [*itertools.product([True], METHODS), *itertools.product([False], RANKED)],
        [(False, "dude")],
    ),
)
def test_another_process_gets_the_same_logits_with_and_without_our_package(method, with_dude, trained, tmp_path):
    folder, expected = trained(method)
    torch.save(expected, tmp_path / "expected.pt")
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "dude_peft":
            raise ModuleNotFoundError(name)
if not {with_dude}:
    sys.meta_path.insert(0, Absent())
import torch, peft
from models import logits, make
torch.set_num_threads(1)
expected = torch.load({str(tmp_path / "expected.pt")!r})
if {with_dude}:
    import dude_peft
    model = dude_peft.load_adapter(make("mistral-gqa"), {str(folder)!r})
    assert torch.equal(logits(model), expected)
else:
    model = peft.PeftModel.from_pretrained(make("mistral-gqa"), {str(folder)!r})
    assert "dude_peft" not in sys.modules
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
print("equal")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "equal", done.stderr
    assert "Unexpected keyword" not in done.stderr
    assert "missing adapter keys" not in done.stderr


@every_ranked_method
def test_the_config_is_one_that_servers_read_right(method, trained):
    settings = json.loads((trained(method)[0] / CONFIG).read_text())
    spec = METHODS[method]
    assert settings["peft_type"] == "LORA"
    assert settings["use_rslora"] is False
    assert settings["init_lora_weights"] is True
    assert settings["use_dora"] is spec.normalised
    assert settings["r"] == 4 * spec.multiple
    assert settings["lora_alpha"] / settings["r"] == spec.scaling(4, 6)
    assert "dude" not in json.dumps(settings).lower()


@every_ranked_method
def test_the_tensors_are_stock_and_a_few_more(method, trained):
    names = {name.partition("q_proj.")[2] for name in tensors_of(trained(method)[0]) if "q_proj" in name}
    spec = METHODS[method]
    expected = {"lora_A.weight", "lora_B.weight"}
    expected |= {"lora_magnitude_vector.weight", "lora_m0"} if spec.normalised else set()
    expected |= {"lora_dm"} if spec.magnitude == "trained" else set()
    expected |= {"lora_A0"} if spec.frozen_start else set()
    if spec.delta is not None:
        expected |= {f"lora_t.{name}" for name in spec.delta.trained} | {f"lora_f.{name}" for name in spec.delta.frozen}
    assert names == expected


@each_kind
def test_no_svd_runs_at_load_and_threads_do_not_matter(method, trained, monkeypatch):
    folder, expected = trained(method)
    for decomposition in ("svd", "qr", "eigh"):
        monkeypatch.setattr(torch.linalg, decomposition, lambda *_, **__: pytest.fail("a decomposition ran at load"))
    for seed in range(3):
        torch.manual_seed(seed)
        model = load_adapter(make("mistral-gqa"), folder)
        assert torch.equal(logits(model), expected)


def test_saving_twice_and_saving_what_was_loaded_give_the_same_bytes(trained, tmp_path):
    folder, _ = trained()
    for name in ("one", "two"):
        model = load_adapter(make("mistral-gqa"), folder)
        model.save_pretrained(tmp_path / name)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("name", "targets"), [("mistral-gqa", "all-linear"), ("gemma3-tied", ["lm_head", "q_proj"])])
def test_the_file_is_the_one_that_safetensors_would_write(name, targets, tmp_path):
    get_peft_model(make(name), DudeConfig(r=4, target_modules=targets)).save_pretrained(tmp_path)
    data = [(tmp_path / WEIGHTS).read_bytes(), safetensors.torch.save(tensors_of(tmp_path), metadata_of(tmp_path))]
    starts = [8 + int.from_bytes(each[:8], "little") for each in data]
    headers = [json.loads(each[8:start]) for each, start in zip(data, starts, strict=True)]
    assert headers[0] == headers[1]
    assert data[0][starts[0] :] == data[1][starts[1] :]


def test_saving_while_merged_saves_the_adapter(trained, tmp_path):
    folder, expected = trained()
    model = load_adapter(make("mistral-gqa"), folder)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make("mistral-gqa"), tmp_path)), expected)


def test_an_adapter_on_a_tied_output_layer_holds_no_base_weights(tmp_path):
    model = get_peft_model(make("gemma3-tied"), DudeConfig(r=4, target_modules=["lm_head", "q_proj"]))
    perturb(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert not [name for name in tensors_of(tmp_path) if "base_layer" in name or "embed" in name]
    assert torch.equal(logits(load_adapter(make("gemma3-tied"), tmp_path)), expected)
    merged = load_adapter(make("gemma3-tied"), tmp_path).merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, make("gemma3-tied").model.embed_tokens.weight)
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_a_base_with_one_other_weight_is_refused(trained):
    base = make("mistral-gqa")
    base.model.layers[1].mlp.down_proj.weight.data[2, 3] += 1e-4
    refused(trained()[0], ArtifactError, "different base weights", "1 of 14", "model.layers.1.mlp.down_proj", base=base)
    assert not any(isinstance(module, DudeLinear) for module in base.modules())
    with pytest.warns(UserWarning, match="will differ from those in training"):
        load_adapter(base, trained()[0], allow_base_mismatch=True)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_base_with_nan_is_refused_whatever_may_differ(trained, allowed):
    base = make("mistral-gqa")
    base.model.layers[1].mlp.down_proj.weight.data[2, 3] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.down_proj.*nan at \[2, 3\]"):
        load_adapter(base, trained()[0], allow_base_mismatch=allowed)
    assert not any(isinstance(module, DudeLinear) for module in base.modules())


def test_another_base_of_the_same_shape_is_refused(trained):
    refused(trained()[0], ArtifactError, "14 of 14", base=make("mistral-gqa", seed=1))


def test_an_adapter_on_a_merged_base_is_refused(trained):
    folder, _ = trained()
    merged = load_adapter(make("mistral-gqa"), folder).merge_and_unload()
    refused(folder, ArtifactError, "different base weights", base=merged)


def test_the_same_values_in_a_wider_dtype_are_the_same_base(tmp_path):
    model = get_peft_model(make("llama", torch.bfloat16), DudeConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    load_adapter(make("llama", torch.bfloat16).float(), tmp_path)
    refused(tmp_path, ArtifactError, "different base weights", base=make("llama"))


def test_fingerprints_know_values_not_layout():
    weight = torch.randn(6, 5).bfloat16()
    recorded = fingerprint(weight)
    assert same_values(weight.float(), recorded)
    assert same_values(weight.T.contiguous().T, recorded)
    changed = weight.float()
    changed[0, 0] += 1e-4
    assert not same_values(changed, recorded)
    assert not same_values(weight.T, recorded)


@pytest.mark.parametrize("cut", [0, 7, 8, 200, -1, -1000])
def test_a_truncated_file_is_refused(copied, cut):
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(data[:cut])
    refused(copied, ArtifactError, WEIGHTS)


def test_every_flipped_bit_is_noticed(copied):
    data = (copied / WEIGHTS).read_bytes()
    generator = torch.Generator().manual_seed(0)
    base = make("mistral-gqa")
    header = int.from_bytes(data[:8], "little") + 8
    places = torch.randint(0, len(data), (60,), generator=generator).tolist()
    places += torch.randint(0, header, (200,), generator=generator).tolist()
    for place in places:
        bit = 1 << (place % 8)
        (copied / WEIGHTS).write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        with pytest.raises(DudeError):
            load_adapter(base, copied)
        assert not any(isinstance(module, DudeLinear) for module in base.modules())


def test_missing_extra_and_renamed_tensors_are_refused(copied):
    tensors = tensors_of(copied)
    name = next(name for name in tensors if name.endswith("q_proj.lora_m0"))
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    rewrite(copied, without)
    refused(copied, ArtifactError, "1 missing", name)
    rewrite(copied, {**tensors, "lm_head.weight": torch.zeros(2)})
    refused(copied, ArtifactError, "1 not recorded", "lm_head.weight")
    rewrite(copied, {**without, name.replace("lora_m0", "lora_mO"): tensors[name]})
    refused(copied, ArtifactError, "1 missing", "1 not recorded")


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        (lambda t: t[:-1], ArtifactError, ("has shape", "need")),
        (lambda t: t.to(torch.int32), ArtifactError, ("dtype",)),
        (lambda t: torch.full_like(t, float("nan")), NumericsError, ("NaN or Inf",)),
        (lambda t: t * 2, ArtifactError, ("does not match",)),
    ],
)
@pytest.mark.parametrize("suffix", ["q_proj.lora_A.weight", "q_proj.lora_magnitude_vector.weight"])
def test_a_forged_tensor_with_a_fitting_hash_is_refused(copied, suffix, change, error, parts):
    tensors = tensors_of(copied)
    name = next(name for name in tensors if name.endswith(suffix))
    tensors[name] = change(tensors[name]).contiguous()
    rewrite(copied, tensors, seal=True)
    refused(copied, error, suffix, *parts)


def test_a_forged_file_with_other_names_is_refused(copied):
    tensors = {key: tensor.clone() for key, tensor in tensors_of(copied).items()}  # not mapped: the file changes
    name = next(name for name in tensors if name.endswith("q_proj.lora_A0"))
    value = tensors.pop(name)
    rewrite(copied, {**tensors, "base_model.model.model.norm.weight": value}, seal=True)
    refused(copied, ArtifactError, "1 missing", "1 unexpected", "model.norm.weight")
    # PEFT saves resized embeddings beside an adapter, so their name is none of a stranger; they have to fit.
    rewrite(copied, {**tensors, name: value, "base_model.model.lm_head.weight": value.clone()}, seal=True)
    refused(copied, ArtifactError, "'lm_head.weight' is [4, 48], the model's [96, 48]", "resize_token_embeddings")


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "use_dora"])
def test_an_edited_config_is_refused(copied, key):
    settings = json.loads((copied / CONFIG).read_text())
    settings[key] = ["q_proj"] if key == "target_modules" else not settings[key] if key == "use_dora" else 3
    (copied / CONFIG).write_text(json.dumps(settings))
    refused(copied, ArtifactError, CONFIG, "changed after saving")


def test_halves_of_two_adapters_are_refused(copied, trained):
    shutil.copy(trained("lora")[0] / CONFIG, copied / CONFIG)
    refused(copied, ArtifactError, "belongs to another adapter")


def test_missing_files_and_foreign_adapters(copied, tmp_path):
    stock = get_peft_model(make("mistral-gqa"), LoraConfig(r=4, target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path / "stock")
    refused(tmp_path / "stock", ArtifactError, "no DuDe manifest", "peft.PeftModel")
    (copied / CONFIG).unlink()
    refused(copied, ArtifactError, CONFIG, "is missing")
    refused(tmp_path / "nowhere", ArtifactError, "is not a folder, and cannot be downloaded", "check the path")


def test_versions_and_unknown_settings(copied):
    manifest = json.loads(metadata_of(copied)["dude"])
    rewrite(copied, manifest={**manifest, "format_version": JOINT_FORMAT_VERSION + 1})
    refused(copied, ArtifactError, f"format {JOINT_FORMAT_VERSION + 1}", "upgrade")
    rewrite(copied, manifest={**manifest, "config": {**manifest["config"], "novelty": 1}})
    refused(copied, ArtifactError, "novelty", "upgrade")
    for broken in (
        {"format_version": FORMAT_VERSION},
        {**manifest, "base": []},
        {**manifest, "more": 1},
        {**manifest, "base": {"x": {"shape": [1]}}},
    ):
        rewrite(copied, manifest=broken)
        refused(copied, ArtifactError, "manifest is damaged")


def test_the_manifest_tells_what_it_is(trained):
    manifest = read_manifest(trained()[0])
    assert manifest.config["method"] == "dude"
    assert manifest.base["model.layers.0.self_attn.k_proj"]["shape"] == [24, 48]
    assert len(manifest.base) == 14


def test_a_failed_write_leaves_the_old_file(copied, monkeypatch):
    import dude_peft.artifact.manifest as module

    before = (copied / WEIGHTS).read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "no space left")))
    with pytest.raises(OSError, match="no space"):
        module.stamp(copied, {}, module.BaseRecord({}))
    assert (copied / WEIGHTS).read_bytes() == before
    assert sorted(p.name for p in copied.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_pickles_are_not_written_unnoticed(tmp_path):
    model = get_peft_model(make("llama"), DudeConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ArtifactError, match="safe_serialization=True"):
        model.save_pretrained(tmp_path, safe_serialization=False)


def test_a_stock_loader_may_pass_our_config(trained):
    folder, expected = trained()
    model = PeftModel.from_pretrained(make("mistral-gqa"), folder, config=DudeConfig.from_pretrained(folder))
    assert torch.equal(logits(model), expected)


def test_loading_into_the_adapter_in_place_as_trainer_does(trained):
    folder, expected = trained()
    model = get_peft_model(make("mistral-gqa"), DudeConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    perturb(model)
    logits(model)
    model.load_adapter(str(folder), "default", is_trainable=True)
    assert torch.equal(logits(model.eval()), expected)


def test_loading_in_place_on_another_base_is_refused(trained):
    model = get_peft_model(make("mistral-gqa", seed=1), DudeConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    expected = logits(model.eval())
    with pytest.raises(ArtifactError, match="different base weights"):
        model.load_adapter(str(trained()[0]), "default")
    assert torch.equal(logits(model), expected)


@each_ranked_kind
def test_transformers_own_loader_gets_it_right(method, trained, tmp_path):
    """Other DoRA files lose their magnitudes there in silence; ours name them so that it finds them."""
    folder, expected = trained(method)
    model = make("mistral-gqa")
    model.load_adapter(str(folder))
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    make("mistral-gqa").save_pretrained(tmp_path / "base")
    shutil.copytree(folder, tmp_path / "adapter")
    settings = json.loads((folder / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(
        json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "base")})
    )
    for automatic in (transformers.AutoModelForCausalLM, AutoPeftModelForCausalLM):
        found = logits(automatic.from_pretrained(tmp_path / "adapter").eval())
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_adapters_are_swapped_over_one_base(trained):
    base = make("mistral-gqa")
    plain = logits(base)
    model = load_adapter(base, trained("dude")[0], adapter_name="a")
    for name, method in (("b", "lora"), ("c", "dora")):
        load_adapter(model, trained(method)[0], adapter_name=name)
    for name, method in [("b", "lora"), ("a", "dude"), ("c", "dora"), ("a", "dude")]:
        model.set_adapter(name)
        assert torch.equal(logits(model), trained(method)[1])
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.delete_adapter("a")
    model.set_adapter("c")
    assert torch.equal(logits(model), trained("dora")[1])
    load_adapter(model, trained("dude")[0], adapter_name="a")
    model.set_adapter("a")
    assert torch.equal(logits(model), trained("dude")[1])
    assert torch.equal(logits(model.unload()), plain)


@pytest.mark.parametrize("where", ["lora_dB", "lora_dm", "modules_to_save"])
def test_no_adapter_with_nan_is_saved_by_anyone(tmp_path, where):
    """save_pretrained is where Trainer, TRL and users' own loops end up."""
    model = get_peft_model(
        tiny_llama(), DudeConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    name, weight = next((n, p) for n, p in model.named_parameters() if where in n and p.requires_grad)
    with torch.no_grad():
        weight.view(-1)[3] = torch.inf
    with pytest.raises(NumericsError, match="holds NaN or Inf and is not saved"):
        model.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.rglob("*.safetensors")), name
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_a_new_file_replaces_none(tmp_path, monkeypatch, links):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    replace_file(tmp_path / "file", b"one", new=True)
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "file", b"two", new=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"one")]
    replace_file(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_bytes() == b"two"
