"""What makes a run the same run, and a model the same base: every weight, every setting, the tokens, the tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import logits, make, perturb
from peft import PeftModel, get_peft_model
from tiny import CHAT_TEMPLATE, save_tiny, tiny_llama, tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.base_settings import base_settings, other_settings
from dude_peft.artifact.manifest import FORMAT_VERSION, read_manifest
from dude_peft.chat.generate import generate
from dude_peft.config.schema import RunConfig
from dude_peft.data import clock
from dude_peft.errors import ArtifactError, ConfigError, DataError
from dude_peft.exporting.run import merge
from dude_peft.exporting.tokenizer import tokenizer_change
from dude_peft.exporting.verify import verify
from dude_peft.training.run import run

WEIGHTS = "adapter_model.safetensors"

# --- patterns whose order decides -----------------------------------------------------------------------------------

KEYS = ("self_attn.q_proj", "q_proj", "down_proj", r".*layers\.1\..*", r"layers\.0\..*proj", r".*_proj", "mlp.*")
FEW = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6}


def ordered(values):
    return st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=4, unique_by=lambda pair: pair[0]).map(dict)


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ranks=ordered(st.integers(1, 6)),
    alphas=ordered(st.integers(1, 60)),
    method=st.sampled_from(["dude", "lora", "rslora"]),
)
def test_overlapping_patterns_are_saved_as_they_were_trained(tmp_path_factory, ranks, alphas, method):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        make("mistral-gqa"), DudeConfig(method=method, rank_pattern=ranks, alpha_pattern=alphas, **FEW)
    )
    perturb(model)
    trained = logits(model.eval())
    model.save_pretrained(folder)
    loaded = load_adapter(make("mistral-gqa"), folder).eval()
    assert torch.equal(logits(loaded), trained)
    stock = PeftModel.from_pretrained(make("mistral-gqa"), folder).eval()
    torch.testing.assert_close(logits(stock), trained, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(folder / "again")
    assert read_manifest(folder / "again").config == read_manifest(folder).config


def test_patterns_that_mean_one_thing_are_kept_as_they_were_written(tmp_path):
    ranks = {"down_proj": 2, r"layers\.1\..*down_proj": 2, "q_proj": 3}
    get_peft_model(make("llama"), DudeConfig(rank_pattern=ranks, **FEW)).save_pretrained(tmp_path)
    assert read_manifest(tmp_path).config["rank_pattern"] == ranks


def reseal(folder, change):
    """Change the manifest and make its seal fit, as a file of another version has it."""
    with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
        manifest = json.loads(file.metadata()["dude"])
    change(manifest)
    text = json.dumps(manifest)
    metadata = {"format": "pt", "dude": text, "dude_sha256": hashlib.sha256(text.encode()).hexdigest()}
    safetensors.torch.save_file(safetensors.torch.load_file(folder / WEIGHTS), folder / WEIGHTS, metadata)


def as_format_3(manifest):
    for new in ("settings", "files"):
        manifest.pop(new, None)
    manifest |= {"format_version": 3, "beside": {k: v for k, v in manifest["beside"].items() if "embed" in k}}


def test_an_adapter_of_format_3_loads_and_tells_of_a_lost_order(tmp_path):
    model = get_peft_model(make("llama"), DudeConfig(**FEW))
    perturb(model)
    model.save_pretrained(tmp_path)
    reseal(tmp_path, as_format_3)
    assert torch.equal(logits(load_adapter(make("llama"), tmp_path).eval()), logits(model.eval()))
    reseal(tmp_path, lambda manifest: manifest["config"].update(alpha_pattern={"mlp.*": 6, "down_proj": 7}))
    with pytest.warns(UserWarning, match=r"'mlp\.\*' and 'down_proj' of its alpha_pattern both match"):
        load_adapter(make("llama"), tmp_path)


def test_tuples_ranges_and_none_are_what_a_file_can_keep(tmp_path):
    config = DudeConfig(r=2, target_modules=("q_proj",), layers_to_transform=range(1), rank_pattern=None)
    get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    assert read_manifest(tmp_path).config["layers_to_transform"] == [0]


# --- the base as a function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2-conv1d", "gemma3-tied"])
def test_every_changed_tensor_of_the_base_is_noticed(tmp_path, architecture):
    target = "c_attn" if architecture == "gpt2-conv1d" else "q_proj"
    get_peft_model(make(architecture), DudeConfig(r=2, target_modules=[target])).save_pretrained(tmp_path)
    load_adapter(make(architecture), tmp_path)
    for name, _ in make(architecture).named_parameters():
        base = make(architecture)
        with torch.no_grad():
            base.get_parameter(name).view(-1)[-1] += 1
        with pytest.raises(ArtifactError, match=r"different base weights|which differs here"):
            load_adapter(base, tmp_path)
    base = make(architecture)
    with torch.no_grad():
        base.get_parameter(name).add_(1)
    with pytest.warns(UserWarning, match="outputs will differ from those in training"):
        load_adapter(base, tmp_path, allow_base_mismatch=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rms_norm_eps", 1e-3),
        ("is_causal", False),  # which no Llama declares
        ("hidden_act", "gelu"),
        ("max_position_embeddings", 128),
        ("rope_parameters", {"rope_theta": 10.0, "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}),
    ],
)
def test_a_setting_that_changes_the_function_is_another_base(tmp_path, setting, value):
    get_peft_model(make("llama"), DudeConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    base = make("llama")
    setattr(base.config, setting, value)
    with pytest.raises(ArtifactError, match=f"another configuration \\({setting}"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_cache", False), ("pad_token_id", 5), ("transformers_version", "9"), ("tie_word_embeddings", True)],
)
def test_settings_beside_the_point_do_not_matter(tmp_path, setting, value):
    get_peft_model(make("llama"), DudeConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    base = make("llama")
    setattr(base.config, setting, value)
    load_adapter(base, tmp_path)


def test_settings_are_compared_as_far_as_both_sides_have_them():
    here = base_settings(make("llama").config)
    assert here is not None
    assert other_settings(here, here) == []
    assert other_settings({**here, "of_old": 1}, {**here, "new": 2}) == []
    assert (
        other_settings(here, {**here, "rms_norm_eps": here["rms_norm_eps"] * (1 + 5e-8)}) == []
    )  # through a GGUF file
    assert other_settings({**here, "rope_parameters": None}, here) != []
    assert other_settings(here, {**here, "is_causal": True}) == []
    assert base_settings(None) is None


# --- the dtype of the base belongs to the adapter -------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """A run in bfloat16 on a float32 checkpoint, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("rounded")
    return folder, one_run(folder, model={"dtype": "bfloat16"})


def one_run(folder, **changes):
    """The settings of a run of two steps that has ended."""
    settings = {
        "model": {"name_or_path": str(save_tiny(folder / "model")), **changes.get("model", {})},
        "adapter": {"r": 4, "target_modules": ["q_proj"]},
        "data": {"train": str(write_rows(folder / "train.jsonl", 8))},
        "train": {"learning_rate": 0.05, "max_steps": 2, "per_device_train_batch_size": 4},
        "evaluation": {"enabled": False},
        "output_dir": str(folder / "out"),
    }
    run(RunConfig(**settings), quiet=True)
    return settings


def test_an_adapter_in_bfloat16_on_a_float32_checkpoint_is_of_use(rounded, tmp_path):
    folder, _ = rounded
    adapter = folder / "out" / "adapter"
    verify(adapter, base=str(folder / "model"), quiet=True)
    (record,) = generate(str(adapter), ["say 1"], max_new_tokens=2)
    assert record["finish"] == "length"
    merge([adapter], tmp_path / "merged", verify=False, quiet=True)
    live = load_adapter(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    expected = live.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def test_a_wider_base_is_told_apart_with_the_dtype_to_load(rounded):
    folder, _ = rounded
    with pytest.raises(ArtifactError, match=r"the base is float32 here; load it with dtype=torch\.bfloat16"):
        load_adapter(tiny_llama(), folder / "out" / "adapter")


def test_a_command_on_another_base_has_a_remedy_of_its_own(rounded, tmp_path):
    save_tiny(tmp_path / "other")
    tensors = safetensors.torch.load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    safetensors.torch.save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"different base weights.*--base") as refused:
        generate(str(rounded[0] / "out" / "adapter"), ["say 1"], base=str(tmp_path / "other"), max_new_tokens=2)
    assert "allow_base_mismatch" not in str(refused.value)


# --- the adapter's own tokenizer ------------------------------------------------------------------------------------


@pytest.fixture
def adapter(rounded, tmp_path):
    shutil.copytree(rounded[0] / "out" / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_an_edited_or_missing_file_of_the_tokenizer_is_refused(adapter, file):
    content = (adapter / file).read_bytes()
    (adapter / file).write_bytes(content + b" ")
    for use in (lambda: verify(adapter, quiet=True), lambda: generate(str(adapter), ["a"])):
        with pytest.raises(ArtifactError, match=f"{file}: the tokenizer's file was changed after saving"):
            use()
    (adapter / file).unlink()
    with pytest.raises(ArtifactError, match=f"{file} is missing"):
        verify(adapter, quiet=True)


@pytest.mark.parametrize("file", ["added_tokens.json", "additional_chat_templates/tool.jinja", "vocab.json"])
def test_a_file_that_the_tokenizer_had_not_is_refused(adapter, file):
    (adapter / file).parent.mkdir(exist_ok=True)
    (adapter / file).write_text("{}")
    with pytest.raises(ArtifactError, match="was not saved with this adapter"):
        verify(adapter, quiet=True)


def test_an_overwritten_run_leaves_no_file_of_another_tokenizer(tmp_path):
    settings = one_run(tmp_path)
    (tmp_path / "out" / "adapter" / "added_tokens.json").write_text("{}")
    run(RunConfig(**settings), overwrite=True, quiet=True)
    verify(tmp_path / "out" / "adapter", quiet=True)


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("normalizer", {"type": "Lowercase"}, "normalizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer"),
        ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}, "post-processor"),
    ],
)  # fmt: skip
def test_tokenizers_are_compared_whole(tmp_path, part, value, named):
    for side in ("ours", "theirs"):
        tiny_tokenizer().save_pretrained(tmp_path / side)
    assert tokenizer_change(tmp_path / "ours", tmp_path / "theirs") is None
    state = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    (tmp_path / "ours" / "tokenizer.json").write_text(json.dumps(state | {part: value}))
    assert tokenizer_change(tmp_path / "ours", tmp_path / "theirs") == named


# --- the tokens of a run --------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_same_tokens_alone(tmp_path):
    settings = one_run(tmp_path)
    run(RunConfig(**settings), quiet=True)  # has ended
    tiny = tiny_tokenizer()
    tiny.chat_template = CHAT_TEMPLATE.replace("<|end|>\n", "<|end|>")
    tiny.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match="their tokens differ: the model's tokenizer or chat template"):
        run(RunConfig(**settings), quiet=True)


def test_a_run_goes_on_with_the_same_tokenizer_alone(tmp_path):
    """Another one that makes the same tokens of these rows would be saved with the adapter."""
    settings = one_run(tmp_path)
    run(RunConfig(**settings), quiet=True)  # has ended
    path = tmp_path / "model" / "tokenizer.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"decoder": None}))
    with pytest.raises(DataError, match=r"is not the one that this run started with \(decoder\)"):
        run(RunConfig(**settings), quiet=True)


def test_a_run_goes_on_at_the_date_of_its_beginning_and_leaves_it_to_no_other(tmp_path, monkeypatch):
    """In one process a new run once had the date of a run that was resumed before it."""
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHAT_TEMPLATE
    monkeypatch.setattr("tiny.CHAT_TEMPLATE", dated)
    monkeypatch.setattr(clock, "now", lambda: "2026-01-02T03:04:05")
    settings = one_run(tmp_path)
    monkeypatch.setattr(clock, "now", lambda: "2026-01-03T00:00:00")
    run(RunConfig(**settings), quiet=True)  # has ended, and says so: its rows are the same tokens
    run(RunConfig(**settings | {"output_dir": str(tmp_path / "other")}), quiet=True)
    moments = [json.loads((tmp_path / name / "run.json").read_text())["moment"] for name in ("out", "other")]
    assert moments == ["2026-01-02T03:04:05", "2026-01-03T00:00:00"]


def test_what_a_template_sees_of_the_clock_is_part_of_the_cache():
    with clock.at("2026-01-02T03:04:05"):
        assert clock.seen_by("{{ bos_token }}") == []
        assert clock.seen_by("""{{ strftime_now('%d %b') }}{{ strftime_now("%Y") }}""") == ["02 Jan", "2026"]
        assert clock.seen_by("{% set f = '%Y' %}{{ strftime_now(f) }}") == ["2026-01-02T03:04:05"]


def test_the_format_is_told(tmp_path):
    get_peft_model(make("llama"), DudeConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert read_manifest(tmp_path).format_version == FORMAT_VERSION == 4
    reseal(tmp_path, lambda manifest: manifest.update(files={"../x": "0"}))
    with pytest.raises(ArtifactError, match="files must be in the adapter's folder"):
        read_manifest(tmp_path)
    with pytest.raises(ConfigError):
        DudeConfig(rank_pattern={"q_proj": 0})
