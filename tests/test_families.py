"""Model families of transformers from training to exports: what docs/families.md says of each is so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from families import FAMILIES, make
from family_table import SETTINGS, YES, cells, markdown, read_markdown
from models import perturb
from packaging.version import Version
from tiny import tiny_tokenizer
from torch import nn

from dude_peft import DudeConfig
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.exporting.run import export, merge
from dude_peft.exporting.verify import verify
from dude_peft.model.layout import layout_of
from dude_peft.model.weights import open_weights
from dude_peft.tuner.layer import DudeLinear

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
OLD = Version(hf.__version__) < Version("5.6")
QUICK = ("Mixtral", "Qwen3-Next", "Gemma 3 VL")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_page_tells_what_happens(name, tmp_path):
    if name == "Gemma 3 VL" and OLD:
        pytest.skip("transformers 5.3 trains Gemma 3 with its vision tower on images alone")
    assert cells(name, tmp_path) == read_markdown(PAGE.read_text(encoding="utf-8"))[name]


def test_the_page_has_every_family():
    assert list(read_markdown(PAGE.read_text(encoding="utf-8"))) == list(FAMILIES)


def test_a_table_is_read_as_it_was_written():
    rows = {"A": [YES, "no: x | y"], "B": ["no: z", "no: x | y"]}
    assert read_markdown(markdown(rows)) == rows


# --- all-linear ---------------------------------------------------------------------------------------------------


def adapted(model: nn.Module, **settings: object) -> tuple[set[str], list[str]]:
    """Names of the adapted layers, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft.get_peft_model(model, DudeConfig(**{**SETTINGS, **settings}))
    names = {module.layer_name for module in model.modules() if isinstance(module, DudeLinear)}
    return names, [str(w.message) for w in said if "all-linear" in str(w.message)]


@pytest.mark.parametrize(
    ("family", "left_out", "said"),
    [
        ("Gemma 3 VL", "vision_tower", "model.vision_tower (15 layers, not used by text)"),
        ("Qwen2-VL", "visual", "model.visual (10 layers, not used by text)"),
        ("Phi-4 multimodal", "audio_embed.encoder", "model.embed_tokens_extend.audio_embed.encoder (9 layers"),
        ("Qwen2-MoE", "shared_expert_gate", "shared_expert_gate (2 layers, gate or router)"),
        ("Llama 4", "router", "router (1 layer, cannot be adapted)"),
        ("Mixtral", "experts", "experts (2 layers, stacked tensors)"),
    ],
)
def test_all_linear_leaves_out_what_is_no_part_of_the_language_model(family, left_out, said):
    names, lines = adapted(make(family))
    assert names
    assert not any(left_out in name for name in names)
    assert len(lines) == 1
    assert said in lines[0]


def test_what_is_named_is_adapted():
    names, lines = adapted(make("Gemma 3 VL"), target_modules=r".*(vision_tower.*q_proj|text.*|language.*q_proj)")
    assert any("vision_tower" in name for name in names)
    assert not lines
    names, _ = adapted(make("Qwen2-MoE"), target_modules=["shared_expert_gate"], r=1)
    assert len(names) == 2


def test_whole_models_that_see_or_hear_are_adapted():
    """A tower is what stands beside a language model; ViT and Whisper's encoder are the model."""
    assert len(adapted(make("ViT"))[0]) > 10
    config = hf.WhisperConfig(
        vocab_size=320, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=257, bos_token_id=258,
        eos_token_id=256, decoder_start_token_id=258,
    )  # fmt: skip
    names, lines = adapted(hf.WhisperForConditionalGeneration(config))
    assert any("encoder.layers.0" in name for name in names)
    assert not lines


def test_all_linear_leaves_out_layers_smaller_than_the_rank():
    names, lines = adapted(make("Mistral"), r=20)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "k_proj (2 layers, smaller than r=20), v_proj (2 layers, smaller than r=20)" in lines[0]
    names, lines = adapted(make("Mistral"), r=20, rank_pattern={"k_proj": 4, "v_proj": 4})
    assert any("k_proj" in name for name in names)
    assert not lines
    with pytest.raises(ConfigError, match=r"r=20 is more than layer '.*k_proj'"):
        adapted(make("Mistral"), r=20, target_modules=["q_proj", "k_proj"])


def test_what_is_excluded_is_not_listed():
    _, lines = adapted(make("Gemma 3 VL"), exclude_modules=".*vision_tower.*")
    assert not lines


# --- names in the checkpoint --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Saves a family's model, tells its folder, the model without weights and the layout of the two."""

    def save(family):
        model = make(family)
        model.save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        return tmp_path / "base", model, layout_of(model, open_weights(tmp_path / "base"))

    return save


@pytest.mark.parametrize(
    ("family", "parameter", "key"),
    [
        (
            "Gemma 3 VL",
            "model.language_model.layers.0.mlp.up_proj.weight",
            "language_model.model.layers.0.mlp.up_proj.weight",
        ),
        ("Gemma 3 VL", "lm_head.weight", "language_model.lm_head.weight"),  # tied: a name for a tensor to come
        ("GPT-NeoX", "lm_head.weight", "embed_out.weight"),
        ("Mixtral", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("Llama", "lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_go_both_ways(saved, family, parameter, key):
    if family == "GPT-NeoX" and OLD:
        pytest.skip("transformers 5.3 has no other name for this head")
    _, _, layout = saved(family)
    assert layout.key(parameter) == key
    assert layout.names.loaded(key) == ([parameter], False)


def test_a_weight_without_a_tensor_of_its_own_is_refused_with_the_way_out(saved):
    """Experts that the checkpoint has one by one and the model in one tensor."""
    _, _, layout = saved("Mixtral")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(ArtifactError, match=r"builds it from .*save_original_format=False") as error:
        layout.find(name, [name])
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_the_models_own_names_is_read_too(tmp_path):
    model = make("Gemma 3 VL")
    model.save_pretrained(tmp_path, save_original_format=False)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert layout_of(model, open_weights(tmp_path)).find(name, [name]).name == name


def test_an_untied_head_gets_the_checkpoints_own_name(saved, tmp_path):
    """Gemma 3 ties its head; a change of the head alone makes a tensor that the base has not."""
    base, model, _ = saved("Gemma 3 VL")
    ids = FAMILIES["Gemma 3 VL"].batch()["input_ids"]
    live = peft.get_peft_model(type(model).from_pretrained(base), DudeConfig(r=4, target_modules=["lm_head"])).eval()
    perturb(live)
    live.save_pretrained(tmp_path / "adapter")
    merge([tmp_path / "adapter"], tmp_path / "merged", verify=False, quiet=True)
    assert "language_model.lm_head.weight" in open_weights(tmp_path / "merged").tensors
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = live(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(type(model).from_pretrained(base).eval()(input_ids=ids).logits, expected, atol=1e-3)


# --- what stock PEFT does not load ----------------------------------------------------------------------------------


def test_what_stock_peft_refuses_is_said_and_not_exported(saved, tmp_path, capsys):
    base, model, _ = saved("Mamba 2")
    live = peft.get_peft_model(type(model).from_pretrained(base), DudeConfig(**SETTINGS))
    with pytest.warns(UserWarning, match="stock PEFT refuses this adapter on a mamba2 model.*out_proj.*dude merge"):
        live.save_pretrained(tmp_path / "adapter")
    verify(tmp_path / "adapter", quiet=False)
    told = " ".join("".join(capsys.readouterr()).split())
    assert "warning: stock PEFT refuses this adapter on a mamba2 model" in told
    assert "refused" in told
    for target in ("peft", "lora:8"):
        with pytest.raises(ConfigError, match=r"stock PEFT refuses.*use --to merged"):
            export(tmp_path / "adapter", target, tmp_path / "out", quiet=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").unlink()
    verify(tmp_path / "adapter", quiet=False)
    assert "stock PEFT: not checked" in " ".join("".join(capsys.readouterr()).split())
    (base / "config.json").write_text(json.dumps(config))


def test_without_that_layer_stock_peft_loads_it(saved, tmp_path):
    base, model, _ = saved("Mamba 2")
    live = peft.get_peft_model(
        type(model).from_pretrained(base), DudeConfig(**{**SETTINGS, "target_modules": ["in_proj"]})
    )
    perturb(live)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="stock PEFT")
        live.save_pretrained(tmp_path / "adapter")
    ids = FAMILIES["Mamba 2"].batch()["input_ids"]
    stock = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, live.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Gemma 3 VL", "Qwen2-VL", "GPT-NeoX", "Jamba"])
def test_merges_and_exports_prove_themselves(saved, tmp_path, family):
    """As the command does, in fresh processes."""
    base, model, _ = saved(family)
    live = peft.get_peft_model(type(model).from_pretrained(base), DudeConfig(**SETTINGS))
    perturb(live)
    live.save_pretrained(tmp_path / "adapter")
    merge([tmp_path / "adapter"], tmp_path / "merged", quiet=True)
    if family == "Jamba":
        with pytest.raises(ConfigError, match=r"stock PEFT leaves out the change of .*dt_proj.*; use --to merged"):
            export(tmp_path / "adapter", "peft", tmp_path / "stock", quiet=True)
    else:
        export(tmp_path / "adapter", "peft", tmp_path / "stock", quiet=True)
