"""The base model of several processes: whatever the first one loads, another one makes without the checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, make
from night import some_by_day
from tiny import save_tiny, tiny_llama
from transformers import GenerationConfig

from dude_peft.config.schema import ModelSection
from dude_peft.errors import NumericsError
from dude_peft.training.model_checks import check_mapped
from dude_peft.training.one_load import _Loader, load_once

TEXTS = [name for name, family in FAMILIES.items() if family.kind == "text"]


def loader(monkeypatch: pytest.MonkeyPatch, folder: Path, rank: int, **section: Any) -> _Loader:
    """Of the process with that number; a test is all of them, one after the other."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    config = SimpleNamespace(model=ModelSection(name_or_path=str(folder), **section))
    return _Loader(SimpleNamespace(config=config), str(folder))


def both(monkeypatch: pytest.MonkeyPatch, folder: Path, **section: Any) -> tuple[Any, Any, str]:
    """The first process's model, another one's, and why that one could not map it."""
    first = loader(monkeypatch, folder, 0, **section)
    told = first.begin()
    assert not isinstance(told, str)
    other = loader(monkeypatch, folder, 1, **section)
    assert other.begin() is None
    reason = other.map_of([told, None])
    first.close()
    return first.model, other.model, reason


def same(first: Any, other: Any) -> None:
    assert type(other) is type(first)
    names = {name for name, _ in first.named_parameters(remove_duplicate=False)}
    assert {name for name, _ in other.named_parameters(remove_duplicate=False)} == names
    found = dict([*other.named_parameters(remove_duplicate=False), *other.named_buffers()])
    for name, tensor in (*first.named_parameters(remove_duplicate=False), *first.named_buffers()):
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name
        assert not found[name].requires_grad, name
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, first(input_ids=ids).logits)


@pytest.mark.parametrize("name", some_by_day(TEXTS, ["Mixtral", "Gemma 3 VL"]))
def test_every_family_is_mapped(name, monkeypatch, tmp_path):
    made = make(name)
    made.save_pretrained(tmp_path)
    first, other, reason = both(monkeypatch, tmp_path)
    assert reason == ""
    same(first, other)


@pytest.mark.parametrize(
    ("changes", "section"),
    [
        ({"tie_word_embeddings": True}, {}),
        ({"dtype": torch.bfloat16}, {}),
        ({"dtype": torch.bfloat16}, {"dtype": "float32"}),
        ({}, {"attn_implementation": "eager"}),
    ],
)
def test_what_the_run_asks_of_it_is_mapped(changes, section, monkeypatch, tmp_path):
    save_tiny(tmp_path, **changes)
    GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=7).save_pretrained(tmp_path)
    first, other, reason = both(monkeypatch, tmp_path, **section)
    assert reason == ""
    same(first, other)
    assert other.generation_config.to_dict() == first.generation_config.to_dict()
    assert other.generation_config.eos_token_id == 7
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == bool(changes.get("tie_word_embeddings"))
    assert other.config._attn_implementation == first.config._attn_implementation


def test_another_model_is_not_mapped(monkeypatch, tmp_path):
    save_tiny(tmp_path / "one")
    save_tiny(tmp_path / "two", rms_norm_eps=1e-3)
    told = loader(monkeypatch, tmp_path / "one", 0).begin()
    other = loader(monkeypatch, tmp_path / "two", 1)
    other.begin()
    assert "has another configuration" in other.map_of([told, None])
    assert "do not tell which of them are on one machine" in other.map_of([None, None])
    assert next(other.model.parameters()).is_meta
    other.load_alone()
    same(tiny_llama(rms_norm_eps=1e-3), other.model)


def test_all_load_where_one_cannot_map(monkeypatch, tmp_path):
    """One process stands for all: what another one tells comes in by what they gather."""
    save_tiny(tmp_path)
    said: list[str] = []
    config = SimpleNamespace(model=ModelSection(name_or_path=str(tmp_path)))
    context: Any = SimpleNamespace(config=config, warn=said.append)
    monkeypatch.setattr("dude_peft.training.one_load.processes.gathered", lambda value: [value, "it is elsewhere"])
    model: Any = load_once(context, str(tmp_path))
    assert len(said) == 1
    assert said[0].startswith("each process has a base model of its own (it is elsewhere); on Linux")
    same(tiny_llama(), model)


def test_processes_that_compute_something_else_are_told(monkeypatch):
    logits = torch.randn(4, 10)
    check_mapped(logits)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def gathered(value: Any) -> list[Any]:
        return [logits.flatten() * 1.1, value] if isinstance(value, torch.Tensor) else [False, value]

    monkeypatch.setattr("dude_peft.training.model_checks.gathered", gathered)
    with pytest.raises(NumericsError, match="computes something else in the processes that map its memory"):
        check_mapped(logits)
