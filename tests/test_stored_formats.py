"""Checkpoints that are stored in fp8, MXFP4, compressed-tensors or GPTQ: trained, merged and answered with."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from served import dude
from test_cli import assert_refused
from tiny import save_tiny, tiny_tokenizer, write_rows
from torch import Tensor, nn

from dude_peft import DudeConfig, load_adapter
from dude_peft.config.schema import ModelSection
from dude_peft.errors import ConfigError
from dude_peft.model import quantised
from dude_peft.model.load import load_model
from dude_peft.training import run as run_module

_BLOCK = 16
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    write_rows(folder / "train.jsonl", 22)
    write_rows(folder / "test.jsonl", 4, start=100)
    save_tiny(folder / "dense", dtype=torch.bfloat16)
    fp8(folder / "dense", folder / "fp8")
    return folder


def restored(folder: Path, tensors: dict[str, Tensor], **quantization: Any) -> Path:
    """A checkpoint with other tensors, and what its config.json says of them."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def fp8(dense: Path, folder: Path) -> Path:
    """As DeepSeek and Qwen store it: float8, and a scale for each square block."""
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight.clone()
            continue
        out, in_ = weight.shape
        blocks = weight.float().reshape(out // _BLOCK, _BLOCK, in_ // _BLOCK, _BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.reshape(out, in_), scale
    settings = {"activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK], "fmt": "e4m3"}
    return restored(folder, tensors, quant_method="fp8", **settings)


def mxfp4(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """As gpt-oss stores it: two codes of 4 bits a byte, and an exponent for each 32; and what the experts then are."""
    settings = transformers.GptOssConfig(
        vocab_size=261, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=257,
        eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(settings).to(torch.bfloat16)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        applied = {}
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, in_, out = tensors.pop(name).shape
            codes = torch.randint(256, (experts, out, in_ // 32, 16), dtype=torch.uint8)
            exponents = torch.randint(120, 124, (experts, out, in_ // 32), dtype=torch.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = codes, exponents
            table = torch.tensor([*_FP4, *(-value for value in _FP4)])
            pairs = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], dim=-1)
            values = pairs.flatten(-2) * torch.exp2(exponents.float() - 127)[..., None]
            applied[name] = values.flatten(-2).mT.to(torch.bfloat16)
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return restored(folder, tensors, quant_method="mxfp4", modules_to_not_convert=left), applied


def compressed(dense: Path, folder: Path) -> Path:
    """As llm-compressor stores it: 4 bits, packed."""
    compressors: Any = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is missing")
    import compressed_tensors.quantization as kinds

    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    weights = kinds.QuantizationArgs(num_bits=4, group_size=_BLOCK, strategy="group", symmetric=True)
    scheme = kinds.QuantizationScheme(targets=["Linear"], weights=weights)
    kinds.apply_quantization_config(
        model,
        kinds.QuantizationConfig(
            config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="compressed", format="pack-quantized"
        ),
    )
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            blocks = layer.weight.detach().unflatten(1, (-1, _BLOCK))
            layer.weight_scale.data.copy_(blocks.abs().amax(dim=-1) / 7)
    packer = compressors.ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    packer.compress_model(model)
    model.save_pretrained(folder)
    packer.update_config(folder)
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return folder


def gptq(dense: Path, folder: Path) -> Path:
    """As GPT-QModel stores it."""
    for package in ("gptqmodel", "optimum"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    how = transformers.GPTQConfig(bits=4, group_size=32, dataset=["some text of words " * 20] * 4, tokenizer=tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, quantization_config=how, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_yaml(place: Path, model: Path, out: Path, **adapter: Any) -> Path:
    settings = {
        "model": {"name_or_path": str(model)},
        "adapter": {"r": 4, **adapter},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl"), "template": "plain"},
        "train": {"learning_rate": 0.01, "max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2},
        "evaluation": {"rows": 2, "max_new_tokens": 3},
        "output_dir": str(out),
    }
    file = place / f"{model.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def trained(place: Path, model: Path, **adapter: Any) -> tuple[Path, str]:
    """The folder of a short run through the command, and what it said."""
    out = place / f"run-{model.name}"
    done = dude("train", write_yaml(place, model, out, **adapter), "--no-page")
    assert done.returncode == 0, done.stderr
    assert "the start equals the base model bit by bit" in done.stdout
    return out, done.stdout


def merged(run: Path, out: Path) -> Path:
    """Exported as a dense model, which the command proves to be the live one."""
    done = dude("export", run / "adapter", "--to", "merged", "-o", out)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "dude_export.json").read_text())["verified"]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    return out


def test_fp8_weights_are_codes_times_scales(place):
    stored, held = load_file(place / "fp8/model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    model = load_model(ModelSection(name_or_path=str(place / "fp8")), str(place / "fp8"))
    scale = stored[f"{held}_scale_inv"].repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
    assert torch.equal(model.get_parameter(held), (stored[held].float() * scale).bfloat16())


@pytest.mark.slow
def test_fp8_is_trained_and_merged(place, tmp_path):
    out, said = trained(place, place / "fp8")
    assert "the checkpoint stores fp8, dequantised to bfloat16" in said
    alone = merged(out, tmp_path / "merged")
    ids = torch.arange(3, 40)[None]
    model = load_model(ModelSection(name_or_path=str(place / "fp8")), str(place / "fp8"))
    live = load_adapter(model, out / "adapter")(input_ids=ids).logits
    plain = transformers.AutoModelForCausalLM.from_pretrained(alone)(input_ids=ids).logits
    assert (live - plain).abs().max() < 0.05 * live.abs().max()
    assert dude("verify", out / "adapter", "--base", place / "fp8").returncode == 0


def test_another_quantisation_of_a_stored_one_is_refused(place, tmp_path):
    file = write_yaml(place, place / "fp8", tmp_path / "out")
    for key, words in (("nf4", "method: nf4, but the checkpoint"), ("none", "method: none, but the checkpoint")):
        line = assert_refused(dude("train", file, "--set", f"model.quantization={key}"), 2, "config")
        assert words in line
        assert "is stored quantised with fp8" in line


def test_mxfp4_experts_are_what_their_codes_say(place):
    model, applied = mxfp4(place / "mxfp4")
    loaded = load_model(ModelSection(name_or_path=str(model)), str(model))
    assert len(applied) == 2
    for name, weight in applied.items():
        assert torch.equal(loaded.get_parameter(name), weight), name


@pytest.mark.slow
def test_mxfp4_trains_its_experts_and_merges(place, tmp_path):
    model, _ = mxfp4(place / "mxfp4-run")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    out, said = trained(place, model, target_modules="all-linear", target_parameters=stacks)
    assert "the checkpoint stores mxfp4, dequantised to bfloat16" in said
    merged(out, tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.parametrize("made", [compressed, gptq])
def test_formats_of_other_libraries(place, tmp_path, made: Callable[[Path, Path], Path]):
    model = made(place / "dense", place / made.__name__)
    out, said = trained(place, model)
    assert ("the base model is quantised (gptq)" if made is gptq else "compressed-tensors, dequantised to") in said
    merged(out, tmp_path / "merged")
    done = dude("generate", out / "adapter", "--file", place / "test.jsonl", "--limit", 1, "--base-too")
    assert done.returncode == 0, done.stderr


class PackedQuantLinear(nn.Module):
    """A layer as GPTQ's libraries have it: no weight, but codes and scales."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype)).T


def test_all_linear_has_the_layers_of_other_libraries(place):
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, PackedQuantLinear(layer))
    wanted = {name for name, layer in model.named_modules() if isinstance(layer, PackedQuantLinear)} - {"lm_head"}
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    ids = torch.arange(3, 40)[None]
    before = model(input_ids=ids).logits
    adapted = peft.get_peft_model(model, DudeConfig(r=4, target_modules="all-linear"))
    assert len(wanted) == 14
    assert set(adapted.base_model.targeted_module_names) == wanted
    assert torch.equal(adapted(input_ids=ids).logits, before)


def test_a_format_that_transformers_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"stored quantised with sparkle, .* give the unquantised checkpoint"):
        quantised.trainable_config({"quant_method": "sparkle"})


def test_an_older_transformers_is_told_of(monkeypatch):
    from transformers.quantizers.auto import AutoQuantizationConfig

    monkeypatch.setattr(AutoQuantizationConfig, "from_dict", lambda config: SimpleNamespace())
    with pytest.raises(ConfigError, match="upgrade transformers"):
        quantised.trainable_config({"quant_method": "compressed-tensors"})


def test_awq_is_refused_before_anything_is_trained():
    with pytest.raises(ConfigError, match=r"stored in AWQ.*give the unquantised checkpoint"):
        quantised.trainable_config({"quant_method": "awq", "bits": 4, "group_size": 32})
