"""PEFT's whole surface on our layers: merging some adapters, deleting, disabling, scaling, combining, naming."""

from __future__ import annotations

import pytest
import torch
from method_rows import each_kind, each_ranked_kind
from models import logits, make, perturb
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import merge_utils
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from dude_peft import DudeConfig, load_adapter
from dude_peft.core.weight_rounding import round_weight
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.methods import METHODS
from dude_peft.tuner.layer import DudeLinear

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))


class Small(nn.Module):
    """Two adapted layers, one of them without a bias, and a head that is trained whole."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 20, bias=False), nn.Linear(20, 6)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return Small().to(dtype)


def config(method="dude", **settings):
    return DudeConfig(**{"method": method, "r": 3, "lora_alpha": 5, "target_modules": ["up", "down"], **settings})


def move(model, name, scale=0.1, seed=1):
    """What training one adapter does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in f"{key}." and ("lora_" in key or "modules_to_save" in key):
                parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter))


def adapted(method, names=("a", "b", "c"), dtype=torch.float32, **settings):
    model = get_peft_model(small(dtype), config(method, **settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(method, r=4, lora_alpha=6, **settings))
    for seed, name in enumerate(names):
        move(model, name, seed=seed + 1)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DudeLinear)]


def out(model):
    with torch.no_grad():
        return model(X.to(next(model.parameters()).dtype))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def refused(call, *parts, error=ConfigError):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


# --- merging ------------------------------------------------------------------------------------------------------


@each_kind
def test_merging_some_keeps_the_others(method):
    model = adapted(method)
    model.base_model.set_adapter(["a", "b"])
    base, both = out(small()), out(model)
    for merged in (["a"], ["b"]):
        model.merge_adapter(merged)
        assert torch.allclose(out(model), both, atol=2e-6)
        with model.disable_adapter():
            assert torch.equal(out(model), base)
        assert model.get_model_status().merged_adapters == merged
        assert torch.allclose(out(model), both, atol=2e-6)
        model.unmerge_adapter()
        assert torch.equal(out(model), both)
    model.merge_adapter(["a", "a"])
    model.merge_adapter(["b"])
    assert torch.allclose(out(model), both, atol=2e-6)
    for layer in layers_of(model):
        layer.keep_merged(["b"])
    assert model.get_model_status().merged_adapters == ["b"]
    assert torch.allclose(out(model), both, atol=2e-6)
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("c")
    assert not any(layer.merged for layer in layers_of(model))
    assert torch.equal(out(model), out(fresh_with(model, "c")))


def fresh_with(model, name):
    """The same model, with one adapter active and nothing ever merged."""
    names = list(model.peft_config)
    twin = adapted(model.peft_config[name].method, tuple(names))
    twin.set_adapter(name)
    return twin


@each_kind
def test_gradients_beside_a_merged_adapter_are_those_of_the_unmerged_sum(method):
    model = adapted(method)
    gradients = []
    for merge in (False, True):
        model.base_model.set_adapter(["a", "b"])
        if merge:
            model.merge_adapter(["a"])
        model.zero_grad()
        model(X).square().sum().backward()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if ".b." in n and "lora_d" in n])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_merge_that_overflows_changes_nothing():
    model = adapted("dude", dtype=torch.float16)
    before = out(model)
    with torch.no_grad():
        layers_of(model)[1].lora_dm["b"].weight.fill_(1e6)
    for call in (model.merge_adapter, model.base_model.merge_and_unload):
        refused(lambda call=call: call(adapter_names=["b"]), "overflows", error=NumericsError)
        assert len(layers_of(model)) == 2
        assert not any(layer.merged for layer in layers_of(model))
    assert torch.equal(out(model), before)


def test_what_is_no_adapter_is_refused_not_ignored():
    model = adapted("dude")
    for call in (
        lambda: model.merge_adapter(["d"]),
        lambda: model.merge_and_unload(adapter_names=["d"]),
        lambda: model.base_model.set_adapter(["a", "d"]),
        lambda: model.add_weighted_adapter(["a", "d"], [1, 1], "new"),
        lambda: model.base_model.delete_adapter("d"),
    ):
        refused(call, "no adapter 'd'", "known: a, b, c")


@each_kind
def test_unloading(method):
    model = adapted(method, modules_to_save=["head"])
    model.set_adapter("b")
    expected = out(model)
    with_a = out(fresh_saved(method, "a"))
    assert torch.allclose(out(adapted(method, modules_to_save=["head"]).merge_and_unload()), with_a, atol=2e-6)
    # Of another adapter than the active one: its head goes with it.
    assert torch.allclose(out(model.merge_and_unload(adapter_names=["a"])), with_a, atol=2e-6)
    model = fresh_saved(method, "b")
    assert torch.equal(out(model), expected)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merge_and_unload"):
        plain = model.unload()
    assert torch.equal(out(plain), out(small()))


def fresh_saved(method, active):
    model = adapted(method, modules_to_save=["head"])
    model.set_adapter(active)
    return model


@each_kind
def test_merged_weights_keep_gains_that_half_precision_cannot_tell_apart(method):
    model = adapted(method, dtype=torch.bfloat16)
    layer = layers_of(model)[0]
    base = layer.get_base_layer().weight.clone()
    for merged in (["a"], ["a", "b"]):
        model.merge_adapter(merged)
        assert torch.equal(layer.get_base_layer().weight, round_weight(layer.effective_weight(merged), torch.bfloat16))
        model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, base)


def test_a_merged_model_has_no_parameters_that_a_server_would_take_for_the_base_models():
    """TRL sends every parameter whose name has no "lora_" in it to vLLM."""
    model = adapted("dude")
    names = {name for name, _ in model.named_parameters() if "lora_" not in name}
    model.merge_adapter()
    assert {name for name, _ in model.named_parameters() if "lora_" not in name} == names


# --- which adapter is active ----------------------------------------------------------------------------------------


@each_kind
def test_deleting_the_active_adapter_activates_another_as_a_whole(method):
    model = fresh_saved(method, "c")
    expected = out(fresh_saved(method, "a"))
    with pytest.warns(UserWarning, match="'a' is now"):
        model.delete_adapter("c")
    assert model.active_adapters == ["a"]
    assert torch.equal(out(model), expected)
    assert any("modules_to_save.a" in name for name in trained(model))
    model.set_requires_grad("a", False)
    model.delete_adapter("b")  # not active: nothing else changes
    assert torch.equal(out(model), expected)
    assert not trained(model)
    model.delete_adapter("a")
    assert torch.equal(out(model.base_model.model), out(small()))
    model.add_adapter("d", config(method, modules_to_save=["head"]))
    model.set_adapter("d")
    assert torch.equal(out(model), out(small()))
    assert {name.rpartition("modules_to_save.")[2] for name in trained(model) if "head" in name} == {
        "d.weight",
        "d.bias",
    }


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize(
    ("make_model", "settings"),
    [
        (small, {"target_modules": ["up", "down"], "modules_to_save": ["head"]}),
        (lambda: make("gemma3-tied"), {"target_modules": ["embed_tokens", "q_proj"]}),
        (lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)), {"target_modules": ["0", "1"]}),
    ],
)
def test_all_that_peft_freezes_is_frozen(make_model, settings, bias):
    if isinstance(plain := make_model(), nn.Sequential) and bias != "none":
        return  # which we refuse
    tuner = get_peft_model(plain, DudeConfig(r=2, bias=bias, **settings)).base_model

    def frozen_by(mark):
        for parameter in tuner.parameters():
            parameter.requires_grad_(True)
        mark(tuner.model)
        return [name for name, parameter in tuner.named_parameters() if not parameter.requires_grad]

    expected = frozen_by(lambda model: BaseTuner._mark_only_adapters_as_trainable(tuner, model))
    assert frozen_by(tuner._mark_only_adapters_as_trainable) == expected
    assert expected


def test_an_adapted_layer_has_no_more_modules_than_pefts():
    ours, theirs = (
        get_peft_model(nn.Sequential(nn.Linear(24, 40)), kind(r=3, target_modules=["0"]))
        for kind in (DudeConfig, LoraConfig)
    )
    assert len(list(ours.modules())) <= len(list(theirs.modules()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_has_a_module_where_there_is_some(dropout):
    model = get_peft_model(small(), config(lora_dropout=dropout))
    layers = [module for module in model.modules() if isinstance(module, DudeLinear)]
    assert [len(layer.lora_dropout) for layer in layers] == [int(dropout > 0)] * 2
    model.eval().train()
    move(model, "default")
    assert torch.equal(out(model), out(model)) == (dropout == 0)


def test_one_adapter_is_chosen_for_all_layers():
    model = get_peft_model(small(), config(target_modules=["up"]), adapter_name="x")
    model.add_adapter("a", config(target_modules=["down"]))
    model.add_adapter("z", config())
    model.set_adapter("z")
    model.delete_adapter("z")
    assert model.get_model_status().active_adapters == ["a"]


def test_deleting_one_of_several_active_adapters_and_a_merged_one():
    model = adapted("dude")
    model.base_model.set_adapter(["a", "b"])
    model.base_model.delete_adapter("b")
    assert model.active_adapters == ["a"]
    assert torch.equal(out(model), out(fresh_with(adapted("dude"), "a")))
    model.merge_adapter(["a"])
    refused(lambda: model.delete_adapter("a"), "merged", "unmerge_adapter()")
    refused(lambda: layers_of(model)[0].delete_adapter("a"), "merged")
    model.delete_adapter("c")
    assert model.get_model_status().merged_adapters == ["a"]


def test_two_trained_heads_cannot_both_be_in_use():
    model = adapted("dude", modules_to_save=["head"])
    before = out(model)
    refused(lambda: model.base_model.set_adapter(["a", "b"]), "'head'", "'a'", "'b'")
    refused(lambda: model.merge_and_unload(adapter_names=["a", "b"]), "'head'")
    assert torch.equal(out(model), before)


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_an_added_adapter_is_in_the_mode_of_the_model(method, training):
    model = get_peft_model(small().train(training), config(method, lora_dropout=0.5), adapter_name="a")
    model.add_adapter("b", config(method, lora_dropout=0.5, modules_to_save=["head"]))
    inner = [m for n, m in model.base_model.model.named_modules() if "lora_dropout." in n or "lora_d" in n or not n]
    assert {module.training for module in inner} == {training}
    assert model.base_model.model.head.training is training


@each_kind
def test_disabling_leaves_what_is_trained(method):
    model = adapted(method, modules_to_save=["head"])
    for flags in (["a", "b"], ["c"], []):
        model.set_requires_grad(["a", "b", "c"], False)
        model.set_requires_grad(flags)
        before = trained(model)
        with pytest.raises(KeyError), model.disable_adapter(), model.disable_adapter():
            raise KeyError
        assert trained(model) == before
    base = small()
    base.head = model.base_model.model.head.original_module
    with model.disable_adapter():
        assert torch.equal(out(model), out(base))


def test_status():
    model = adapted("dude")
    status = model.get_model_status()
    assert status.peft_types == {"a": "DUDE", "b": "DUDE", "c": "DUDE"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["a"], [])
    assert status.available_adapters == ["a", "b", "c"]
    assert {layer.module_type for layer in model.get_layer_status()} == {"dude_peft.DudeLinear"}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    with disable_input_dtype_casting(model):
        out(model)


# --- scaling --------------------------------------------------------------------------------------------------------


@each_kind
def test_scaled_layers_merge_and_save_what_they_compute(method, tmp_path):
    model = adapted(method, ("default",))
    plain = out(model)
    for layer, scale in zip(layers_of(model), (3.0, -0.5), strict=True):
        layer.set_scale("default", 2 * scale)
        layer.scale_layer(0.25)
        layer.unscale_layer(0.5)
        assert layer.scaling["default"] == pytest.approx(scale * METHODS[method].scaling(3, 5))
        x = torch.randn(4, layer.in_features)
        bias = layer.bias
        expected = x @ layer.effective_weight().T + (0 if bias is None else bias)
        assert torch.allclose(layer(x), expected, atol=1e-5)
    expected = out(model)
    assert not torch.allclose(expected, plain, atol=1e-3)
    model.merge_adapter()
    assert torch.allclose(out(model), expected, atol=1e-5)
    model.unmerge_adapter()
    if METHODS[method].delta is not None:
        with pytest.raises(ConfigError, match="scaling was set by hand"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    assert torch.allclose(out(load_adapter(small(), tmp_path)), expected, atol=1e-5)
    assert torch.allclose(out(PeftModel.from_pretrained(small(), tmp_path)), expected, atol=1e-5)
    model.load_adapter(str(tmp_path), "default")  # the file has the scaling in it
    assert torch.allclose(out(model), expected, atol=1e-5)
    for layer in layers_of(model):
        layer.scaling["default"] *= 4
        layer.unscale_layer()
        assert layer.scaling["default"] == METHODS[method].scaling(3, 5)


def test_pefts_own_scale_helper_says_that_it_takes_lora_layers_only():
    with pytest.raises(ValueError, match="LoraLayer"), rescale_adapter_scale(adapted("dude"), 0.5):
        pass


# --- combining ------------------------------------------------------------------------------------------------------


def changes(model, names):
    return {layer.layer_name: [layer.get_delta_weight(name) for name in names] for layer in layers_of(model)}


@each_ranked_kind
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_a_weighted_adapter_is_the_weighted_sum_of_changes(method, kind, tmp_path):
    model = adapted(method)
    move(model, "b", scale=0.3, seed=8)
    state = torch.get_rng_state()
    model.add_weighted_adapter(["a", "b"], [0.75, -0.5], "new", kind, svd_rank=14 if kind == "svd" else None)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.active_adapters == ["a"]
    assert not any(".new." in name for name in trained(model))
    for name, (a, b) in changes(model, ["a", "b"]).items():
        layer = model.base_model.model.get_submodule(name)
        assert torch.allclose(layer.get_delta_weight("new"), 0.75 * a - 0.5 * b, atol=2e-6)
    model.set_adapter("new")
    expected = out(model)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    assert torch.equal(out(load_adapter(small(), tmp_path / "new")), expected)
    assert torch.allclose(out(PeftModel.from_pretrained(small(), tmp_path / "new")), expected, atol=1e-5)


def test_methods_mix_and_layers_that_one_of_them_lacks():
    model = get_peft_model(small(), config("dude", target_modules=["up"]), adapter_name="a")
    model.add_adapter("b", config("rslora"))
    model.add_adapter("c", config("dora", target_modules=["down"], r=2))
    for seed, name in enumerate("abc"):
        move(model, name, seed=seed)
    model.add_weighted_adapter(list("abc"), [1.0, 0.5, 2.0], "new", "cat")
    up, down = layers_of(model)
    for layer, parts in ((up, [("a", 1), ("b", 0.5)]), (down, [("b", 0.5), ("c", 2)])):
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in parts)
        assert torch.allclose(layer.get_delta_weight("new"), expected, atol=2e-6)


@pytest.mark.parametrize("method", ["dude", "lora"])
def test_a_smaller_rank_keeps_most(method):
    model = adapted(method)
    model.add_weighted_adapter(["a", "b"], [1, 1], "whole", "cat")
    errors = []
    for rank in (1, 3, 6):
        model.add_weighted_adapter(["a", "b"], [1, 1], f"r{rank}", "svd", svd_rank=rank)
        layer = layers_of(model)[0]
        errors.append((layer.get_delta_weight(f"r{rank}") - layer.get_delta_weight("whole")).norm().item())
    assert errors[0] > errors[1] > errors[2]
    if method == "lora":  # Eckart and Young
        singular = torch.linalg.svdvals(layer.get_delta_weight("whole"))
        assert errors[1] == pytest.approx(singular[3:].norm().item(), rel=1e-4)


@each_ranked_kind
@pytest.mark.parametrize("kind", ["ties", "dare_linear_svd", "dare_ties", "magnitude_prune_svd"])
def test_entries_are_dropped_from_the_changes(method, kind):
    model = adapted(method)
    options = {"svd_rank": 24, "density": 0.4}
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", kind, **options)
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "again", kind, **options)
    for name, deltas in changes(model, ["a", "b"]).items():
        layer = model.base_model.model.get_submodule(name)
        found = layer.get_delta_weight("new")
        assert torch.equal(found, layer.get_delta_weight("again"))
        if "dare" in kind:
            continue
        expected = getattr(merge_utils, kind.removesuffix("_svd"))(deltas, torch.tensor([1.0, 0.5]), 0.4)
        assert torch.allclose(found, expected, atol=1e-5)


def test_what_cannot_be_combined_is_refused():
    model = adapted("dude")
    for arguments, part in (
        ((["a", "b"], [1.0], "new"), "one weight for each"),
        ((["a"], [float("nan")], "new"), "finite"),
        ((["a", "b"], [1, 1], "c"), "already"),
        ((["a", "b"], [1, 1], "new", "tie"), "'ties'"),
        ((["a", "b"], [1, 1], "new", "ties"), "density"),
        ((["a", "b"], [1, 1], "new", "svd", 0), "svd_rank"),
    ):
        refused(lambda arguments=arguments: model.add_weighted_adapter(*arguments), part)
    assert list(model.peft_config) == ["a", "b", "c"]
    model = adapted("dude", modules_to_save=["head"])
    refused(lambda: model.add_weighted_adapter(["a", "b"], [1, 1], "new"), "'a'", "in full")


# --- names and swapping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"), [("weight", "lora_dA"), ("0", "bias"), ("up", "modules_to_save"), ("A0", "base_layer")]
)
@pytest.mark.parametrize("method", ["dude", "lora"])
def test_adapters_may_be_named_as_parameters_are(method, first, second, tmp_path):
    model = adapted(method, (first, second), modules_to_save=["head"])
    expected = {}
    for name in (first, second):
        model.set_adapter(name)
        expected[name] = out(model)
    model.save_pretrained(tmp_path)
    for name, other in ((first, second), (second, first)):
        assert torch.equal(out(load_adapter(small(), tmp_path / name, adapter_name=other)), expected[name])


@pytest.mark.parametrize("name", ["A", "layer", "dropout", "m"])
def test_modules_trained_whole_may_be_named_as_a_part_of_ours(name, tmp_path):
    def outer(inner):
        torch.manual_seed(0)
        model = nn.Module()
        model.body, model.block = Small(), nn.Module()
        setattr(model.block, inner, nn.Linear(6, 4))
        model.forward = lambda x: getattr(model.block, inner)(model.body(x))
        return model

    model = get_peft_model(outer(name), config(modules_to_save=[name]), adapter_name="default")
    move(model, "default")
    assert [n for n, m in model.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"] == [
        f"base_model.model.block.{name}"
    ]
    expected = out(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(out(load_adapter(outer(name), tmp_path)), expected)


def test_names_that_torch_or_peft_would_confuse_are_refused():
    for name in ("train", "keys", "type"):
        refused(lambda name=name: get_peft_model(small(), config(), adapter_name=name), name)
    base = small()
    base.layer = base.head
    refused(lambda: get_peft_model(base, config(modules_to_save=["layer"])), "'layer'")


def test_hot_swapping_is_refused_and_changes_nothing(tmp_path):
    model = adapted("dude", ("default",))
    model.save_pretrained(tmp_path)
    move(model, "default", seed=9)
    before = out(model)
    refused(lambda: hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu"), "DUDE", error=ValueError)
    assert torch.equal(out(model), before)


def test_a_transposed_layer_and_tied_embeddings_merge_some_too():
    for architecture, targets in (("gpt2-conv1d", ["c_attn", "c_proj"]), ("gemma3-tied", ["q_proj", "lm_head"])):
        base = make(architecture)
        expected = logits(base)
        model = get_peft_model(base, DudeConfig(r=4, target_modules=targets), adapter_name="a")
        model.add_adapter("b", DudeConfig(r=4, target_modules=targets))
        for seed, name in enumerate("ab"):
            model.set_adapter(name)
            perturb(model, seed=seed)
        model.base_model.set_adapter(["a", "b"])
        both = logits(model.eval())
        model.merge_adapter(["a"])
        assert torch.allclose(logits(model), both, atol=1e-5)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)


def test_saving_again_reads_no_source(tmp_path, monkeypatch):
    """Whether stock PEFT loads it is asked at every checkpoint; Python parses a whole file to find one class."""
    model = get_peft_model(make("llama"), DudeConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "first")
    monkeypatch.setattr("inspect.getsource", lambda kind: pytest.fail(f"read {kind} again"))
    model.save_pretrained(tmp_path / "second")
