"""What makes each relative of DuDe the one it is called: oracles written anew, stock PEFT, and the table of all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from method_rows import every_method
from models import logits, make, perturb, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from served import dude as run_dude
from tiny import save_tiny
from torch import nn

import dude_peft
from dude_peft import DudeConfig
from dude_peft.config.schema import RunConfig
from dude_peft.core.magnitude import row_norm
from dude_peft.errors import ConfigError
from dude_peft.init.run import initialise
from dude_peft.methods import METHODS, SplitOptions
from dude_peft.methods.sizes import count, formula
from dude_peft.tuner.layer import DudeLinear

OPTIONS = SplitOptions()


def weight(out=40, in_=28, dtype=torch.float64, seed=0):
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one_layer(W0):
    """A model of one small layer."""
    model = nn.Sequential(nn.Linear(W0.shape[1], W0.shape[0])).to(W0.dtype)
    with torch.no_grad():
        model[0].weight.copy_(W0)
    return model


def adapted(W0, method, **settings):
    return get_peft_model(one_layer(W0), DudeConfig(method=method, r=4, lora_alpha=6, target_modules=["0"], **settings))


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, DudeLinear))


def relative_error(value, expected):
    return float(((value - expected).norm() / expected.norm()).detach())


def train(parameters, output, x, target, steps=20, lr=1e-2):
    """Adam on a squared error; the outputs at the end."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        (output(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return output(x)


def rows(in_, out, dtype):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(32, in_, generator=generator).to(dtype), torch.randn(32, out, generator=generator).to(dtype)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- olora --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [4, 6])
@pytest.mark.parametrize("shape", [(40, 28), (28, 40)])
def test_olora_trains_as_stock_peft_does(shape, alpha):
    W0 = weight(*shape, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": alpha, "target_modules": ["0"]}
    ours = get_peft_model(one_layer(W0), DudeConfig(method="olora", **settings))
    theirs = get_peft_model(one_layer(W0), LoraConfig(init_lora_weights="olora", **settings))
    theirs.base_model.model[0].bias.data.copy_(ours.base_model.model[0].base_layer.bias)
    x, target = rows(shape[1], shape[0], torch.float32)
    start = one_layer(W0)
    start[0].bias.data.copy_(ours.base_model.model[0].base_layer.bias)
    before = start(x)
    found, wanted = (train(trained(model), model, x, target) for model in (ours, theirs))
    assert relative_error(wanted, before) > 0.05
    assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("shape", [(40, 28), (28, 40)])
def test_oloras_factors_are_those_of_the_whole_qr(shape):
    W0 = weight(*shape)
    A, B, captured = METHODS["olora"].split(W0, 5, 1.5, OPTIONS)
    Q, R = np.linalg.qr(W0.numpy())
    sign = np.where(np.diag(R) < 0, -1.0, 1.0)[:5]
    assert np.allclose(B.numpy(), Q[:, :5] * sign, atol=1e-12)
    assert np.allclose(A.numpy(), sign[:, None] * R[:5], atol=1e-12)
    assert bool((A.diagonal() > 0).all())
    assert captured is None


# --- milora -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 28), (28, 40)])
def test_milora_is_the_papers_formula_trained(shape):
    """W0 = W_p + W_m, the minor part W_m = B A trained from its balanced factors; in float64, by plain autograd."""
    W0 = weight(*shape)
    model = adapted(W0, "milora")
    layer = layer_of(model)
    s, bias = layer.scaling["default"], layer.get_base_layer().bias
    U, S, Vh = np.linalg.svd(W0.numpy(), full_matrices=False)
    minor = slice(min(shape) - 4, None)
    A = nn.Parameter(torch.tensor(np.sqrt(S[minor] / s)[:, None] * Vh[minor]))
    B = nn.Parameter(torch.tensor(U[:, minor] * np.sqrt(S[minor] / s)))
    residual = W0 - s * (B @ A).detach()
    state = layer.tensors("default")
    assert torch.allclose(state.B0 @ state.A0, B @ A, atol=1e-12)
    x, target = rows(shape[1], shape[0], torch.float64)
    found = train(trained(model), model, x, target)
    wanted = train([A, B], lambda x: x @ residual.T + s * (x @ A.T @ B.T) + bias, x, target)
    assert relative_error(wanted, x @ W0.T + bias) > 0.05
    assert relative_error(found, wanted) <= 1e-9
    energy = METHODS["milora"].split(W0, 4, s, OPTIONS).captured
    assert energy == pytest.approx((S[minor] ** 2).sum() / (S**2).sum())


@pytest.mark.parametrize("method", ["milora", "dude", "pissa", "random-basis", "olora"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_weight_of_low_rank_leaves_no_factor_without_a_gradient(method, rank):
    W0 = weight(40, rank) @ weight(rank, 28, seed=1) if rank else torch.zeros(40, 28, dtype=torch.float64)
    model = adapted(W0, method)
    x, target = rows(28, 40, torch.float64)
    assert torch.equal(model(x), one_layer_output(model, x))
    train(trained(model), model, x, target, steps=3)
    state = layer_of(model).tensors("default")
    assert all(torch.isfinite(tensor).all() for tensor in trained(model))
    assert bool((state.dA.norm(dim=1) + state.dB.norm(dim=0) > 0).all())


def one_layer_output(model, x):
    return layer_of(model).get_base_layer()(x)


# --- controls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 28), (28, 40)])
def test_random_basis_has_the_singular_values_and_not_the_directions(shape):
    W0, s = weight(*shape), 1.5
    A, B, captured = METHODS["random-basis"].split(W0, 5, s, OPTIONS)
    U, S, _ = np.linalg.svd(W0.numpy())
    assert np.allclose(np.linalg.svd(s * (B @ A).numpy())[1][:5], S[:5], rtol=1e-10)
    assert np.allclose((s * B.T @ B).numpy(), np.diag(S[:5]), atol=1e-10)
    assert np.allclose((s * A @ A.T).numpy(), np.diag(S[:5]), atol=1e-10)
    unit = (B / B.norm(dim=0)).numpy()
    assert np.abs(U[:, :5].T @ unit).max() < 0.7
    assert captured is None


def test_random_basis_follows_from_the_weight_the_rank_and_the_seed_alone():
    split = METHODS["random-basis"].split
    W0, other = weight(), weight(seed=1)
    torch.manual_seed(1)
    first = split(W0, 3, 1.0, OPTIONS)
    state = torch.get_rng_state()
    split(other, 3, 1.0, OPTIONS)
    again = split(W0.clone(), 3, 1.0, OPTIONS)
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    assert torch.equal(state, torch.get_rng_state())

    def directions(W0, **options):
        B = split(W0, 3, 1.0, SplitOptions(**options)).B
        return B / B.norm(dim=0)

    for changed in (directions(other), directions(W0, svd_seed=1)):
        assert not torch.allclose(directions(W0), changed, atol=0.1)


def test_frozen_m_keeps_every_rows_norm(tmp_path):
    model = get_peft_model(
        make("opt-bias"), DudeConfig(method="frozen-m", r=4, lora_alpha=6, target_modules="all-linear")
    )
    assert not any("lora_dm" in name for name, _ in model.named_parameters())
    perturb(model)
    layers = [module for module in model.modules() if isinstance(module, DudeLinear)]
    for layer in layers:
        W0 = layer.get_base_layer().weight
        assert torch.allclose(row_norm(layer.effective_weight()), row_norm(W0), rtol=1e-5)
        assert not torch.allclose(layer.effective_weight(), W0, rtol=1e-2)
        assert set(layer.movement("default")) == {"direction"}
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    magnitudes = {name: tensor for name, tensor in saved.items() if name.endswith("lora_magnitude_vector.weight")}
    assert len(magnitudes) == len(layers)
    assert all(torch.equal(m, saved[name.replace("magnitude_vector.weight", "m0")]) for name, m in magnitudes.items())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    stock = PeftModel.from_pretrained(make("opt-bias"), tmp_path)
    assert (logits(stock) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()


def test_frozen_m_is_not_pissa_and_a_zero_row_loads_in_stock_peft(tmp_path):
    base = make("llama")
    base.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    base.save_pretrained(tmp_path / "model")
    load = type(base).from_pretrained
    found = []
    for method in ("frozen-m", "pissa"):
        model = get_peft_model(load(tmp_path / "model"), DudeConfig(method=method, r=4, target_modules=["q_proj"]))
        perturb(model)
        found.append(logits(model.eval()))
        model.save_pretrained(tmp_path / method)
        stock = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / method)
        assert (logits(stock) - found[-1]).abs().max() <= 1e-5 * found[-1].abs().max()
        ours = dude_peft.load_adapter(load(tmp_path / "model"), tmp_path / method)
        assert torch.equal(logits(ours), found[-1])
    assert not torch.allclose(*found, atol=1e-3)


@pytest.mark.parametrize("method", ["dude", "dora"])
def test_the_exact_controls_are_the_method_with_the_exact_gradient(method):
    losses = []
    for name, settings in ((method, {"norm_gradient": "exact"}), (f"{method}-exact", {}), (method, {})):
        torch.manual_seed(0)
        model = adapted(weight(), name, **settings)
        x, target = rows(28, 40, torch.float64)
        losses.append(train(trained(model), model, x, target, steps=5))
    assert torch.equal(losses[0], losses[1])
    assert not torch.allclose(losses[0], losses[2])


def test_the_method_says_how_its_norm_is_differentiated(tmp_path):
    assert DudeConfig().norm_gradient == "detached"
    assert DudeConfig(norm_gradient="exact").norm_gradient == "exact"
    assert DudeConfig(method="dude-exact").norm_gradient == "exact"
    assert DudeConfig(method="dude-exact", norm_gradient="exact").norm_gradient == "exact"
    with pytest.raises(ConfigError, match=r"norm_gradient='detached' contradicts method 'dora-exact'"):
        DudeConfig(method="dora-exact", norm_gradient="detached")

    def run(**adapter):
        data = {"train": "a.jsonl", "test": 0.1}
        return RunConfig(model={"name_or_path": "m"}, data=data, adapter=adapter, output_dir="runs/x").resolved()

    assert run().adapter.norm_gradient == "detached"
    assert run(method="dude-exact").adapter.norm_gradient == "exact"
    with pytest.raises(ConfigError, match="contradicts method 'dude-exact'"):
        run(method="dude-exact", norm_gradient="detached")


@pytest.mark.parametrize("method", ["olora", "random-basis", pytest.param("milora", marks=pytest.mark.slow)])
def test_a_transposed_weight_starts_the_same_on_disk_and_in_memory(method, tmp_path):
    base = make("gpt2-conv1d")
    base.save_pretrained(tmp_path / "model")
    settings = {"method": method, "r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"]}
    initialise(str(tmp_path / "model"), tmp_path / "streamed", settings, workers=1, quiet=True)
    loaded = type(base).from_pretrained(tmp_path / "model")
    config = DudeConfig(**settings, task_type="CAUSAL_LM")
    get_peft_model(loaded, config).save_pretrained(tmp_path / "memory", save_embedding_layers=False)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()


# --- the table ----------------------------------------------------------------------------------------------------


@every_method
def test_the_table_counts_what_a_layer_trains_and_keeps(method):
    model = adapted(weight(dtype=torch.float32), method)
    row = METHODS[method]
    assert count(row.trained, 40, 28, 4) == model.get_nb_trainable_parameters()[0]
    layer = layer_of(model)
    buffers = [tensor for name, tensor in layer.named_buffers() if not name.startswith("base_layer.")]
    model(rows(28, 40, torch.float32)[0])
    products = [tensor for cached in layer._starts.values() for tensor in cached.tensors]
    assert count(row.kept, 40, 28, 4) == sum(tensor.numel() for tensor in buffers + products)


def test_every_row_says_what_a_reader_needs():
    for name, row in METHODS.items():
        assert name == row.name
        assert row.summary
        assert row.choose
        assert row.paper
        assert row.rate_of in ("", *METHODS)
        assert not row.rate_of or row.learning_rate == METHODS[row.rate_of].learning_rate
    assert formula(METHODS["dude"].trained) == "r in + r out + out"
    assert formula(METHODS["dude"].kept) == "r in + 2 r out + out"
    assert formula(METHODS["lora"].kept) == "0"


def test_default_rates_stand_to_each_other_as_the_best_measured_ones():
    """Wherever this repository lies with its records."""
    record = Path(__file__).resolve().parent.parent / "benchmarks/results/2026-11-29-family.json"
    measured = json.loads(record.read_text())["results"]["methods"]
    assert set(measured) == {name for name, row in METHODS.items() if not row.rate_of}
    for name, found in measured.items():
        ours = METHODS[name].learning_rate / METHODS["dude"].learning_rate
        theirs = found["learning_rate"] / measured["dude"]["learning_rate"]
        assert 0.8 <= ours / theirs <= 1.25, (name, ours, theirs)


def test_the_command_shows_the_table_of_a_model(tmp_path):
    save_tiny(tmp_path / "model")
    done = run_dude("methods", "--model", "model", "--r", "4", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    table = dude_peft.method_table(tmp_path / "model", r=4)
    assert found["layers"] == table.layers == 14
    assert found["methods"] == table.as_dict()["methods"]
    by_name = {row["name"]: row for row in found["methods"]}
    assert list(by_name) == list(METHODS)
    assert by_name["lora"]["trained"] < by_name["dude"]["trained"] == by_name["dora"]["trained"]
    assert by_name["frozen-m"]["trained"] == by_name["pissa"]["trained"] == by_name["lora"]["trained"]
    assert by_name["lora"]["bytes"] < by_name["pissa"]["bytes"] < by_name["dude"]["bytes"]
    plain = run_dude("methods", cwd=tmp_path)
    assert plain.returncode == 0
    assert all(f"{name}: {row.summary}" in plain.stdout for name, row in METHODS.items())
    assert len(plain.stdout.splitlines()) == len(METHODS) + 3  # a title, and what to do next
    one = run_dude("methods", "milora", cwd=tmp_path)
    assert "whole SVD" in one.stdout
    assert "dora" not in one.stdout
    unknown = run_dude("methods", "milra", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "closest: 'milora'" in unknown.stderr
    refused = run_dude("methods", "--r", "0", cwd=tmp_path)
    assert refused.returncode == 2
    assert table._repr_html_().startswith("<table>")
