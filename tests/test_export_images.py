"""Exports of models that read images: the proof has an image, so that a wrong vision layer is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from night import some_by_day
from tiny_vision import FAMILIES, save_seeing

from dude_peft import DudeConfig
from dude_peft.config.schema import ModelSection
from dude_peft.errors import NumericsError
from dude_peft.exporting import check
from dude_peft.exporting.picture_prompt import picture_prompt
from dude_peft.exporting.run import export, merge
from dude_peft.model.load import load_model, load_tokenizer

LANGUAGE = r".*(language_model|text_model)\.layers.*(q_proj|down_proj)"
EYES = r".*(encoder|visual|multi_modal|connector).*(q_proj|fc1|linear_1|linear_fc1|qkv)"


def save_adapter(model: Path, folder: Path, targets: str, size: float = 0.3) -> Path:
    """A DuDe adapter on layers of a model, as if it had been trained."""
    loaded: Any = load_model(ModelSection(name_or_path=str(model)), str(model))
    made = peft.get_peft_model(loaded, DudeConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                scale = size * parameter.abs().mean().clamp_min(0.1)
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("family", some_by_day(FAMILIES, ["LLaVA"]))
def test_the_prompt_is_the_processors_and_the_same_every_time(family, tmp_path):
    model = save_seeing(tmp_path / "model", family)
    section, where = ModelSection(name_or_path=str(model)), str(model)
    loaded: Any = load_model(section, where)
    one, other = (picture_prompt(section, where, loaded, load_tokenizer(section, where), None) for _ in range(2))
    assert one.keys() == other.keys() >= {"input_ids", "pixel_values"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    with torch.no_grad():
        seen = loaded(**one).logits
        one["pixel_values"] = one["pixel_values"].flip(-1)
        assert not torch.equal(loaded(**one).logits, seen)


def test_few_tokens_with_an_image_are_judged_by_themselves():
    """600 tokens of text that are right hide no 20 that are wrong."""
    generator = torch.Generator().manual_seed(0)
    text, seen, change = (torch.randn(tokens, 7, generator=generator) for tokens in (6000, 20, 20))
    ours = {f"{name}.{n}": text[1000 * n : 1000 * n + 1000] for n in range(6) for name in ("live", "base")}
    theirs = {f"out.{n}": ours[f"live.{n}"] for n in range(6)}
    ours |= {"live.6": seen + 1e-3 * change, "base.6": seen}
    theirs["out.6"] = seen
    found = check.compare(ours, theirs, range(7))
    assert not check.beyond_rounding(found, {torch.float32})
    alone = check.replace(found, with_image=check.compare(ours, theirs, [6]))
    assert "over the prompt with an image" in check.beyond_rounding(alone, {torch.float32})
    assert "with an image" in check.summary(alone)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_merge_of_a_vision_layer_is_found(family, tmp_path, monkeypatch):
    """Right merges pass with an image among the prompts; one that leaves a vision layer as it was is refused."""
    model = save_seeing(tmp_path / "model", family, sharp=30.0)
    adapter = save_adapter(model, tmp_path / "adapter", f"({LANGUAGE})|({EYES})")
    made = merge(adapter, tmp_path / "right").record["difference"]
    assert made["with_image"]["kl_tuned_export"] <= 1e-9
    assert made["with_image"]["kl_tuned_base"] >= 1e-4
    assert made["with_image"]["tokens"] < made["tokens"]

    from dude_peft.exporting import merge as merging

    right = merging.layers_of

    def wrong(*given: Any) -> Any:
        """Leaves out an adapted layer that only images go through, not the last one, which LLaVA does not use."""
        layers = right(*given)
        eye = next(name for name in layers if "language_model" not in name and "text_model" not in name)
        return {name: layer for name, layer in layers.items() if name != eye}

    monkeypatch.setattr(merging, "layers_of", wrong)
    with pytest.raises(NumericsError, match=r"KL\(tuned \|\| export\).*more than rounding can explain"):
        merge(adapter, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_stock_peft_reads_the_image_too(tmp_path):
    model = save_seeing(tmp_path / "model", sharp=30.0)
    adapter = save_adapter(model, tmp_path / "adapter", EYES)
    found = export(adapter, "peft", tmp_path / "out").record["difference"]
    assert found["with_image"]["kl_tuned_export"] <= 1e-9 < 1e-4 <= found["with_image"]["kl_tuned_base"]


@pytest.mark.slow
def test_a_model_that_cannot_be_shown_an_image_is_compared_on_text_and_told(tmp_path, capsys):
    model = save_seeing(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", LANGUAGE)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (model / name).unlink()
    made = merge(adapter, tmp_path / "out", quiet=False)
    assert made.record["verified"]
    assert made.record["difference"]["with_image"] is None
    assert "compared on text alone: the model has no processor of images" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out/dude_export.json").read_text())["difference"]["with_image"] is None
