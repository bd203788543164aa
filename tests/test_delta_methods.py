"""Methods whose factors are made of small trained tensors: each formula written anew, and what files say of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import test_methods
import torch
from night import some_by_day
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors import safe_open
from served import dude as run_dude
from test_files import WEIGHTS, refused, rewrite
from test_relatives import OPTIONS, adapted, layer_of, one_layer, relative_error, rows, train, trained, weight
from tiny import save_tiny, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from dude_peft import DudeConfig, load_adapter
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.init.run import initialise
from dude_peft.methods import METHODS

DELTAS = [name for name, method in METHODS.items() if method.delta is not None]
every_delta = pytest.mark.parametrize("method", DELTAS)
every_stock_delta = pytest.mark.parametrize("method", [name for name in DELTAS if METHODS[name].ranked])
every_shape = pytest.mark.parametrize("shape", [(40, 28), (28, 40)])


def svd_of(W0):
    """With the largest entry of every column of U positive."""
    U, S, Vh = np.linalg.svd(W0.numpy(), full_matrices=False)
    sign = np.sign(U[np.abs(U).argmax(axis=0), np.arange(len(S))])
    return torch.tensor(U * sign), torch.tensor(S), torch.tensor(sign[:, None] * Vh)


def parameters(**tensors):
    return {name: nn.Parameter(tensor.clone().double()) for name, tensor in tensors.items()}


# Of each method: its trained tensors at their start, and W' as a function of them, by whole matrices.


def lora_xs(W0, s, layer):
    U, S, Vh = svd_of(W0)
    p = parameters(R=torch.zeros(4, 4))
    return p, lambda: W0 + s * U[:, :4] @ p["R"] @ torch.diag(S[:4]) @ Vh[:4]


def edora(W0, s, layer):
    p, direction = lora_xs(W0, s, layer)
    p["m"] = nn.Parameter(W0.norm(dim=1))
    return p, lambda: torch.diag(p["m"] / direction().norm(dim=1).detach()) @ direction()


def osora(W0, s, layer):
    U, S, Vh = (part[..., :4] if i < 2 else part[:4] for i, part in enumerate(svd_of(W0)))
    p = parameters(o=torch.ones(len(W0)), sigma=S / s)
    rest = W0 - U @ torch.diag(S) @ Vh
    return p, lambda: rest + s * torch.diag(p["o"]) @ U @ torch.diag(p["sigma"]) @ Vh


def vera(W0, s, layer):
    frozen = layer.lora_f["default"]
    p = parameters(b=torch.zeros(len(W0)), d=torch.full((4,), 0.1))
    return p, lambda: W0 + s * torch.diag(p["b"]) @ frozen["B"] @ torch.diag(p["d"]) @ frozen["A"]


def salt(W0, s, layer):
    U, S, Vh = svd_of(W0)
    n = len(S)
    p = parameters(a=torch.ones(4), b=torch.zeros(4), X=torch.zeros(n - 4, 4), Y=layer.lora_t["default"]["Y"].detach())

    def effective():
        values = torch.cat([p["a"] * S[:4] + s * p["b"], S[4:]])
        low = s * U[:, 4:] @ p["X"] @ p["Y"] @ Vh[4:]
        return U @ torch.diag(values) @ Vh + low

    return p, effective


def spectral(W0, s, layer):
    U, S, Vh = svd_of(W0)
    p = parameters(A=layer.lora_t["default"]["A"].detach(), B=torch.zeros(len(W0), 4), mu=torch.zeros(4))
    return p, lambda: W0 + s * p["B"] @ p["A"] + U[:, :4] @ torch.diag(S[:4] * p["mu"]) @ Vh[:4]


def full(W0, s, layer):
    p = parameters(dW=torch.zeros(W0.shape))
    return p, lambda: W0 + p["dW"]


FORMULAS = {
    "full": full,
    "lora-xs": lora_xs,
    "edora": edora,
    "osora": osora,
    "vera": vera,
    "salt": salt,
    "spectral": spectral,
}


def test_every_delta_has_a_formula_here():
    assert set(FORMULAS) == set(DELTAS)


@every_shape
@every_delta
def test_trained_as_the_papers_formula_by_plain_autograd(method, shape):
    W0 = weight(*shape)
    model = adapted(W0, method)
    layer = layer_of(model)
    bias = layer.get_base_layer().bias
    own, effective = FORMULAS[method](W0, layer.scaling["default"], layer)
    assert sum(p.numel() for p in own.values()) == model.get_nb_trainable_parameters()[0]
    x, target = rows(shape[1], shape[0], torch.float64)
    found = train(trained(model), model, x, target, lr=3e-2)
    wanted = train(list(own.values()), lambda x: x @ effective().T + bias, x, target, lr=3e-2)
    assert relative_error(wanted, x @ W0.T + bias) > 0.02
    assert relative_error(found, wanted) <= 1e-8


@every_shape
def test_vera_trains_as_stock_peft_does(shape):
    W0 = weight(*shape, dtype=torch.float32)
    ours = get_peft_model(one_layer(W0), DudeConfig(method="vera", r=4, lora_alpha=4, target_modules=["0"]))
    theirs = get_peft_model(one_layer(W0), VeraConfig(r=4, target_modules=["0"]))
    twin, layer = theirs.base_model.model[0], layer_of(ours)
    frozen = layer.lora_f["default"]
    with torch.no_grad():
        twin.base_layer.bias.copy_(layer.base_layer.bias)
        twin.vera_A["default"].copy_(frozen["A"])
        twin.vera_B["default"].copy_(frozen["B"])
    bound = twin.vera_A["default"].abs().max()
    assert 0.5 < float(frozen["A"].abs().max() / bound) <= 1
    x, target = rows(shape[1], shape[0], torch.float32)
    before = one_layer_output(layer, x)
    found, wanted = (train(trained(model), model, x, target, lr=3e-2) for model in (ours, theirs))
    assert relative_error(wanted, before) > 0.02
    assert relative_error(found, wanted) <= 1e-5


def one_layer_output(layer, x):
    with torch.no_grad():
        return layer.get_base_layer()(x)


def test_veras_random_factors_are_shared_and_leave_torchs_generator_alone():
    start = METHODS["vera"].delta.start
    state = torch.get_rng_state()
    tall, wide = start(weight(40, 28), 4, 1.0, OPTIONS).tensors, start(weight(12, 28, seed=1), 4, 1.0, OPTIONS).tensors
    assert torch.equal(tall["A"], wide["A"])
    assert torch.equal(tall["B"][:12], wide["B"])
    assert torch.equal(state, torch.get_rng_state())


@every_delta
@pytest.mark.parametrize("rank", [0, 2])
def test_a_weight_of_low_rank_starts_exactly_and_stays_finite(method, rank):
    W0 = weight(40, rank) @ weight(rank, 28, seed=1) if rank else torch.zeros(40, 28, dtype=torch.float64)
    model = adapted(W0, method)
    x, target = rows(28, 40, torch.float64)
    assert torch.equal(model(x), one_layer_output(layer_of(model), x))
    train(trained(model), model, x, target, steps=3)
    assert all(torch.isfinite(tensor).all() for tensor in trained(model))


@every_delta
def test_a_rank_as_large_as_the_layer(method):
    model = get_peft_model(one_layer(weight(6, 9)), DudeConfig(method=method, r=6, target_modules=["0"]))
    x, target = rows(9, 6, torch.float64)
    assert torch.equal(model(x), one_layer_output(layer_of(model), x))
    train(trained(model), model, x, target, steps=2)


# --- what test_methods.py asks of each kind, by day for one of these ------------------------------------------------


def test_edora_resumes_merges_and_lives_beside_others(tmp_path):
    test_methods.test_training_goes_on_from_a_file_bit_by_bit("edora", "detached", tmp_path / "detached")
    test_methods.test_training_goes_on_from_a_file_bit_by_bit("edora", "exact", tmp_path / "exact")
    test_methods.test_merge_is_the_adapter_and_unmerge_restores_every_bit("edora", "gpt2-conv1d", torch.bfloat16)
    test_methods.test_several_adapters("edora", tmp_path / "several")
    test_methods.test_autocast_starts_at_the_base_and_gives_float32_gradients("edora")
    test_methods.test_gradient_checkpointing_changes_nothing("edora", False)
    test_methods.test_low_cpu_mem_usage_and_inference_mode("edora", tmp_path / "low")


@pytest.mark.parametrize("method", some_by_day(DELTAS, ["edora", "vera"]))
def test_the_streamed_start_is_that_of_memory_byte_for_byte(method, tmp_path):
    started(method, tmp_path)


def started(method, tmp_path):
    save_tiny(tmp_path / "model")
    settings = {"method": method, "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    initialise(str(tmp_path / "model"), tmp_path / "start", settings, workers=1, quiet=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = get_peft_model(base, DudeConfig(**settings, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "memory")
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "start" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()
    return model


@pytest.mark.slow
@every_delta
def test_the_commands_take_its_files(method, tmp_path):
    model = started(method, tmp_path)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "moved")
    assert run_dude("verify", "moved", "--base", "model", cwd=tmp_path).returncode == 0
    merged = run_dude("merge", "moved", "-o", "merged", "--base", "model", "--no-verify", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    ids = torch.arange(1, 9)[None]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert torch.allclose(found, model.eval()(ids).logits, atol=1e-5)
    quantised = ("--quantize", "nf4", "--residual", "residual")
    folded = run_dude("init", "model", "--method", method, "--r", "4", *quantised, "-o", "q", cwd=tmp_path)
    assert folded.returncode == 2
    assert f"not {method}" in folded.stderr


# --- files --------------------------------------------------------------------------------------------------------


def moved(method):
    model = get_peft_model(tiny_llama(), DudeConfig(method=method, r=4, lora_alpha=6, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@every_stock_delta
def test_a_small_tensor_that_was_edited_is_refused(method, tmp_path):
    moved(method).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    name = next(name for name in tensors if ".lora_t." in name)
    tensors[name] = tensors[name] + 0.01
    rewrite(tmp_path, tensors, seal=True)
    refused(tmp_path, ArtifactError, "does not match the start stored in the same file", base=tiny_llama())


def test_the_sums_of_another_machine_are_not_refused(tmp_path):
    model = moved("edora")
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    for name in tensors:
        if name.endswith("lora_B.weight"):
            tensors[name] = tensors[name] * (1 + 2**-22)
    rewrite(tmp_path, tensors, seal=True)
    loaded, ids = load_adapter(tiny_llama(), tmp_path), torch.arange(1, 9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_only_files_with_small_tensors_have_the_new_format(tmp_path):
    for method, version in (("lora-xs", 5), ("dude", 4)):
        moved(method).save_pretrained(tmp_path / method)
        with safe_open(tmp_path / method / WEIGHTS, framework="pt") as file:
            assert json.loads(file.metadata()["dude"])["format_version"] == version


def test_a_scaling_set_by_hand_is_not_saved(tmp_path):
    model = moved("lora-xs")
    layer_of(model).set_scale("default", 2.0)
    with pytest.raises(ConfigError, match=r"scaling was set by hand, and lora-xs has no factor .*unscale_layer"):
        model.save_pretrained(tmp_path)
    layer_of(model).unscale_layer()
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(load_adapter(tiny_llama(), tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", ["edora", "spectral"])
def test_beside_another_method_it_is_combined_exactly(method):
    model = moved(method)
    model.add_adapter("other", DudeConfig(method="dude", r=3, target_modules=["q_proj"]))
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_dB["other"].weight.add_(0.1)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -0.7], "sum", "linear")
    wanted = 0.5 * layer.get_delta_weight("default") - 0.7 * layer.get_delta_weight("other")
    assert torch.allclose(layer.get_delta_weight("sum"), wanted, atol=1e-5)


def test_an_output_layer_is_saved_once(tmp_path):
    """PEFT saves an adapted output layer as a whole, and our tensors are in the file already."""
    model = get_peft_model(tiny_llama(), DudeConfig(method="edora", r=4, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path)
    names = {name.partition("lm_head.")[2] for name in safetensors.torch.load_file(tmp_path / WEIGHTS)}
    assert {name for name in names if name.startswith(("lora_t", "lora_f"))} == {"lora_t.C", "lora_f.U", "lora_f.SV"}
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert isinstance(stock.peft_config["default"], LoraConfig)
