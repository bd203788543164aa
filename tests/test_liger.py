"""`train.use_liger_kernel`: the same numbers as without it, resumed bit by bit, planned, refused where it cannot work.

Without a GPU Liger's kernels run in Triton's interpreter. Where liger-kernel is not installed, only refusals and the
plan are tested.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from test_train_resume import _CutError, cut_at
from tiny import save_tiny, tiny_llama, write_rows
from transformers.models.llama import modeling_llama

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.model.load import load_settings
from dude_peft.planning.bill import cost
from dude_peft.training import liger
from dude_peft.training import run as run_module
from dude_peft.training.run import run

WEIGHTS = "adapter/adapter_model.safetensors"
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed: .[liger]"
)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch) -> None:
    """Liger 0.8.5 casts scalars of its kernels, which are plain floats in Triton's interpreter, and takes a root from
    CUDA's library."""
    if torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("liger")
    save_tiny(folder / "model", hidden_size=32, intermediate_size=48)
    write_rows(folder / "train.jsonl", 8)
    write_rows(folder / "test.jsonl", 2, start=100)
    return folder


def settings(places: Path, out: Path, *, liger: bool = True, **sections: dict[str, Any]) -> RunConfig:
    found: dict[str, Any] = {
        "model": {"name_or_path": str(places / "model")},
        "adapter": {"r": 2, "exclude_modules": ["lm_head"]},
        "data": {"train": str(places / "train.jsonl"), "test": str(places / "test.jsonl")},
        "train": {
            "learning_rate": 0.02, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "logging_steps": 1, "save_steps": 2, "use_liger_kernel": liger,
        },
        "evaluation": {"rows": 1, "max_new_tokens": 2},
        "output_dir": str(out),
    }  # fmt: skip
    for section, changes in sections.items():
        found[section] = found[section] | changes
    return RunConfig(**found)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- the same numbers -------------------------------------------------------------------------------------------------


@needs_liger
@pytest.mark.slow
@pytest.mark.parametrize("method", ["dude", "lora"])
@pytest.mark.parametrize("data", [{}, {"packing": True, "train_on": "all"}])
def test_a_run_is_the_same_with_and_without(places, tmp_path, method, data):
    for name in ("with", "without"):
        how = {"adapter": {"method": method}, "data": data}
        run(settings(places, tmp_path / name, liger=name == "with", **how), quiet=True)
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-4)
    found, wanted = (load_file(tmp_path / name / WEIGHTS) for name in ("with", "without"))
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-2 * tensor.norm(), name
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__  # not Liger's any more


@needs_liger
@pytest.mark.parametrize("method", ["dude", "lora"])
def test_gradients_are_the_same_with_and_without(places, tmp_path, method):
    import peft

    from dude_peft import DudeConfig

    section = settings(places, tmp_path / "out").train
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    found = []
    with liger.restored():
        for kernels in (False, True):
            model = tiny_llama(hidden_size=32, intermediate_size=48)
            if kernels:
                liger.apply_liger_(model, section)
            model.requires_grad_(False)
            torch.manual_seed(0)  # lora draws its A
            adapted = peft.get_peft_model(
                model, DudeConfig(method=method, r=2, target_modules="all-linear", exclude_modules=["lm_head"])
            ).train()
            trained = {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for tensor in trained.values():
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            out = adapted(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(20))
            assert (out.logits is None) == kernels
            out.loss.backward()
            found.append((out.loss.item(), {name: tensor.grad for name, tensor in trained.items()}))
    (loss, gradients), (fused_loss, fused_gradients) = found
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@needs_liger
@pytest.mark.slow
def test_a_run_resumes_bit_by_bit_and_is_another_run_than_without(places, tmp_path, monkeypatch):
    run(settings(places, tmp_path / "whole"), quiet=True)
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(_CutError):
            run(settings(places, tmp_path / "cut"), quiet=True)
    with pytest.raises(ConfigError, match="use_liger_kernel"):
        run(settings(places, tmp_path / "cut", liger=False), quiet=True)
    run(settings(places, tmp_path / "cut"), quiet=True)
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert "fused_linear_cross_entropy" in json.dumps(record)


@needs_liger
@pytest.mark.slow
def test_a_mixture_takes_the_other_kernels(places, tmp_path):
    write_rows(tmp_path / "general.jsonl", 4, start=500)
    how = {
        "data": {"general": str(tmp_path / "general.jsonl"), "general_share": 0.5},
        "train": {"objective": "mol", "max_steps": 2},
        "adapter": {"method": "lora"},
    }
    for name in ("with", "without"):
        kernels = {"liger_kernel_config": {"fused_linear_cross_entropy": False}} if name == "with" else {}
        changed = how | {"train": how["train"] | kernels}
        run(settings(places, tmp_path / name, liger=name == "with", **changed), quiet=True)
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-4)


@needs_liger
def test_a_head_that_is_adapted_is_refused_and_what_liger_does_not_know(places, tmp_path):
    with pytest.raises(ConfigError, match="leave the head out of the adapter, or set"):
        run(settings(places, tmp_path / "out", adapter={"target_modules": ["lm_head"], "exclude_modules": None}))
    other = load_settings(settings(places, tmp_path).model, str(places / "model"))
    other.model_type = "opt"
    with pytest.raises(ConfigError, match="no kernels for models of type opt"):
        liger.check_liger(settings(places, tmp_path).train, other, "cpu")


# --- refused ----------------------------------------------------------------------------------------------------------


def test_where_it_is_not_installed_or_there_is_no_gpu_it_is_told_before_weights_are_read(places, tmp_path, monkeypatch):
    monkeypatch.setattr("dude_peft.training.loading.load_model", lambda *_: pytest.fail("loaded"))
    with monkeypatch.context() as patch:
        patch.setattr(liger, "find_spec", lambda _: None)
        with pytest.raises(ConfigError, match=r"liger-kernel is not installed: pip install 'dude-peft\[liger\]'"):
            run(settings(places, tmp_path / "out"), quiet=True)
    monkeypatch.setattr(liger, "find_spec", lambda _: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    section = settings(places, tmp_path / "out").train
    with pytest.raises(ConfigError, match="needs a GPU that Triton knows, and this run is on cpu"):
        liger.check_liger(section, None, torch.device("cpu"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"objective": "dpo"}}, "the loss of dpo takes logits"),
        ({"train": {"torch_compile": True}}, "train.torch_compile"),
        ({"train": {"trainer": "trl"}}, "TRL measures logits"),
        ({"train": {"fp16": True}}, "'train.fp16' and 'train.use_liger_kernel'"),
        ({"model": {"device_map": "auto"}}, "Liger replaces the forwards"),
        ({"adapter": {"target_parameters": ["mlp.experts.down_proj"]}}, "without their adapters"),
        ({"train": {"liger_kernel_config": {"cross_entropy": True}}}, "cross_entropy"),
        ({"train": {"liger_kernel_config": {"swiglu": True}}}, "swiglu"),
        ({"train": {"use_liger_kernel": False, "liger_kernel_config": {"rms_norm": False}}}, "without Liger's kernels"),
    ],
)
def test_what_does_not_go_together_is_refused_when_it_is_read(places, tmp_path, sections, told):
    with pytest.raises(ValidationError, match=told):
        settings(places, tmp_path / "out", **sections)


# --- planned ----------------------------------------------------------------------------------------------------------


def test_the_plan_has_no_logits_of_all_tokens_and_layers_that_keep_less(places, tmp_path):
    where = str(places / "model")
    big = {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}

    def bill(dtype: str, **train: Any) -> Any:
        how = {"model": {"dtype": dtype}, "adapter": {"method": "lora"}}
        batch = {"per_device_train_batch_size": 4}
        config = settings(places, tmp_path / "out", train={**batch, **train}, **how).resolved()
        model = load_settings(config.model, where)
        model.update(big)
        return cost(config, model, where, 512, gpu=True).bill

    loss_alone = {"liger_kernel_config": {"rms_norm": False}}
    tokens, words, width = 4 * 512, 32000, 256
    # Logits, and their gradient, in float32.
    assert bill("float32", use_liger_kernel=False).logits_and_loss >= 2 * 4 * tokens * words
    chunk = 4 * 16 * words  # 2,048 tokens over 125 parts, in whole powers of two: 16 or 32 tokens at a time
    assert bill("float32", **loss_alone).logits_and_loss <= 2 * chunk + 2 * 4 * tokens * width
    # Of which the models' own norms keep a copy in float32.
    assert bill("bfloat16").total < bill("bfloat16", **loss_alone).total
