"""One behaviour suite for every method of the table; a new entry gets all of these tests by being there.

Which rows the default run takes, and which run with -m slow, says `method_rows.py`.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from method_rows import each_kind, each_kind_with_an_open_norm, every_method, the_others
from models import ARCHITECTURES, logits, make, optimizer_of, perturb, step, tokens
from peft import PeftModel, get_peft_model
from tiny import tiny_llama

from dude_peft import DudeConfig, load_adapter
from dude_peft.core.reference import reference_direction, reference_linear
from dude_peft.core.weight_rounding import round_weight
from dude_peft.errors import ConfigError
from dude_peft.methods import METHODS
from dude_peft.tuner.layer import DudeLinear

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def config(method="dude", **settings):
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    return DudeConfig(method=method, **{**defaults, **settings})


def adapted(method, architecture="mistral-gqa", dtype=torch.float32, moved=True, **settings):
    model = get_peft_model(make(architecture, dtype), config(method, **settings))
    if moved:
        perturb(model)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DudeLinear)]


def relative_error(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


@the_others
@every_dtype
def test_the_other_methods_start_at_the_base_model(method, dtype):
    check_start(method, "mistral-gqa", dtype, 0.1)


@each_kind
@every_architecture
@every_dtype
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_start_is_the_base_model_bit_by_bit(method, architecture, dtype, dropout):
    check_start(method, architecture, dtype, dropout)


def check_start(method, architecture, dtype, dropout):
    base = make(architecture, dtype)
    eval_logits = logits(base)
    train_logits = logits(base.train())
    model = get_peft_model(make(architecture, dtype), config(method, lora_dropout=dropout))
    assert torch.equal(logits(model.train()), train_logits)
    assert torch.equal(logits(model.eval()), eval_logits)
    perturb(model)
    assert not torch.equal(logits(model), eval_logits)
    with model.disable_adapter():
        assert torch.equal(logits(model), eval_logits)
    # A PeftModel without any adapter cannot be called (stock PEFT raises KeyError): the model inside it can.
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), eval_logits)
    assert torch.equal(logits(model.base_model.unload()), eval_logits)


@every_method
def test_each_layer_computes_the_textbook(method):
    """Outputs, and the gradients of the input and of every trained tensor."""
    for architecture in ("gpt2-conv1d", "opt-bias", "mistral-gqa"):
        model = adapted(method, architecture, torch.float64)
        for layer in layers_of(model)[:7]:
            state, s = layer.tensors("default"), layer.scaling["default"]
            base = layer.get_base_layer()
            W0 = base.weight.T if type(base).__name__ == "Conv1D" else base.weight
            A = state.dA if state.A0 is None else state.A0 + state.dA
            B = state.dB if state.B0 is None else state.B0 + state.dB
            V = reference_direction(W0, A, B, s, state.A0, state.B0)
            m = None if state.m0 is None else state.m0 if state.dm is None else state.m0 + state.dm
            x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
            expected = reference_linear(x, W0, base.bias, V, m, METHODS[method].norm_gradient or "detached")
            assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-12)
            leaves = [x, *state.learned]
            dy = torch.randn(expected.shape, dtype=torch.float64)
            found, wanted = (torch.autograd.grad(y, leaves, dy) for y in (layer(x), expected))
            for gradient, textbook in zip(found, wanted, strict=True):
                assert relative_error(gradient, textbook) <= 1e-9


@each_kind
@every_dtype
@pytest.mark.parametrize("architecture", ["gemma3-tied", "gpt2-conv1d", "opt-bias"])
def test_merge_is_the_adapter_and_unmerge_restores_every_bit(method, architecture, dtype):
    model = adapted(method, architecture, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    model.merge_adapter()
    # Merged weights are rounded once to the dtype, and the logits move by a few roundings.
    bound = 1e-5 if dtype == torch.float32 else 10 * torch.finfo(dtype).eps
    for layer in layers_of(model):
        rounded = round_weight(layer.effective_weight(["default"]), dtype)
        rounded = rounded.T if architecture == "gpt2-conv1d" else rounded
        assert torch.equal(layer.get_base_layer().weight, rounded)
    assert relative_error(logits(model), expected) <= bound
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), expected)
    plain = model.merge_and_unload()
    assert not layers_of(plain)
    assert relative_error(logits(plain), expected) <= bound


@each_kind
def test_disabling_while_merged_gives_the_base(method):
    base_logits = logits(make("mistral-gqa"))
    model = adapted(method)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)


@the_others
def test_the_other_methods_are_stock_adapters(method, tmp_path):
    check_files(method, "mistral-gqa", tmp_path)


@each_kind
@every_architecture
def test_save_and_load_are_bit_equal_and_stock_peft_agrees(method, architecture, tmp_path):
    check_files(method, architecture, tmp_path)


def check_files(method, architecture, tmp_path):
    patterns = {"rank_pattern": {"down_proj": 2, "fc2": 3}, "alpha_pattern": {"q_proj": 9}}
    model = adapted(method, architecture, **(patterns if METHODS[method].ranked else {}))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert torch.equal(logits(load_adapter(make(architecture), tmp_path)), expected)
    if not METHODS[method].ranked:
        return  # refused by stock PEFT: `test_full.py`
    stock = PeftModel.from_pretrained(make(architecture), tmp_path)
    assert not layers_of(stock)
    assert (logits(stock) - expected).abs().max() <= 1e-5 * expected.abs().max()


@each_kind_with_an_open_norm
@pytest.mark.parametrize("mode", ["detached", "exact"])
def test_training_goes_on_from_a_file_bit_by_bit(method, mode, tmp_path):
    settings = {"norm_gradient": mode, "weight_decay": 0.1}
    model = get_peft_model(make("mistral-gqa"), config(method, norm_gradient=mode))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
    model.save_pretrained(tmp_path)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    uninterrupted = [step(model, optimizer) for _ in range(3)]

    resumed = load_adapter(make("mistral-gqa"), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    state.seek(0)
    optimizer.load_state_dict(torch.load(state))
    assert [step(resumed, optimizer) for _ in range(3)] == uninterrupted
    assert settings["norm_gradient"] == resumed.peft_config["default"].norm_gradient
    for (name, ours), (_, theirs) in zip(resumed.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@every_method
def test_training_moves_only_adapter_parameters_and_learns(method):
    model = get_peft_model(make("qwen3"), config(method))
    base = {name: p.clone() for name, p in model.named_parameters() if ".lora_" not in name}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    start = {name: t.clone() for name, t in model.named_buffers() if ".lora_" in name}
    few = METHODS[method].delta is not None  # some hundred numbers move the loss less, and take larger steps
    optimizer = optimizer_of(model, 0.1 if few else 1e-2)
    losses = [step(model, optimizer) for _ in range(12)]
    assert losses[-1] < losses[0] - (0.2 if few else 0.3)
    after = dict(model.named_parameters())
    assert all(torch.equal(base[name], after[name]) for name in base)
    buffers = dict(model.named_buffers())
    assert all(torch.equal(start[name], buffers[name]) for name in start)
    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make("qwen3")))


@each_kind
def test_weight_decay_pulls_toward_the_pretrained_model(method):
    model = adapted(method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=1.0)
    base_logits = logits(make("mistral-gqa"))
    before = (logits(model) - base_logits).norm()
    for _ in range(60):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    assert (logits(model) - base_logits).norm() < 0.02 * before


@each_kind
def test_several_adapters(method, tmp_path):
    model = adapted(method)
    first = logits(model)
    base_logits = logits(make("mistral-gqa"))
    model.add_adapter("second", config(method, r=3, lora_alpha=3))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), base_logits)
    assert all(p.requires_grad == (".second" in n) for n, p in model.named_parameters() if ".lora_" in n)
    perturb(model, seed=5)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(both, first)
    model.merge_adapter(["default", "second"])
    assert torch.allclose(logits(model), both, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    for name, folder, expected in (("default", tmp_path, first), ("second", tmp_path / "second", second)):
        assert torch.equal(logits(load_adapter(make("mistral-gqa"), folder)), expected), name
    together = load_adapter(make("mistral-gqa"), tmp_path, "a")
    load_adapter(together, tmp_path / "second", "b")
    assert torch.equal(logits(together), first)
    together.set_adapter("b")
    assert torch.equal(logits(together), second)
    together.delete_adapter("b")
    together.set_adapter("a")
    assert torch.equal(logits(together), first)


@each_kind
def test_a_name_can_be_used_again_for_another_adapter(method):
    model = adapted(method)
    logits(model)  # fills the caches, which must not outlive the adapter
    model.add_adapter("other", config(method))
    model.delete_adapter("default")
    settings = {"r": 7, "lora_alpha": 3, "svd_seed": 5}
    model.add_adapter("default", config(method, **settings))
    model.set_adapter("default")
    torch.manual_seed(0)
    fresh = adapted(method, moved=False, **settings)
    for layer, twin in zip(layers_of(model), layers_of(fresh), strict=True):
        if METHODS[method].draws:
            layer.lora_dA["default"].weight.data.copy_(twin.lora_dA["default"].weight)
    perturb(fresh)
    perturb(model)
    assert torch.equal(logits(model), logits(fresh))


def test_adapters_of_different_methods_live_together():
    model = adapted("dude")
    first = logits(model)
    model.add_adapter("plain", config("lora"))
    model.set_adapter("plain")
    assert torch.equal(logits(model), logits(make("mistral-gqa")))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@each_kind
def test_merging_one_adapter_after_another(method):
    model = adapted(method)
    model.add_adapter("second", config(method))
    model.set_adapter("second")
    perturb(model, seed=5)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert torch.allclose(logits(model), both, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)


def test_an_adapter_of_a_name_that_was_there_has_its_own_dropout():
    base = make("mistral-gqa")
    get_peft_model(base, config("dude", lora_dropout=0.5))
    with pytest.warns(UserWarning, match="peft"):
        model = get_peft_model(base, config("dude")).train()
    assert torch.equal(logits(model), logits(model))


@each_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(method, use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = adapted(method, lora_dropout=0.1).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@each_kind
def test_autocast_starts_at_the_base_and_gives_float32_gradients(method):
    model = adapted(method, moved=False).train()
    base = make("mistral-gqa").train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(base))
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0


@each_kind
def test_adapter_dtypes(method):
    kept = [p.dtype for p in adapted(method, dtype=torch.bfloat16).parameters() if p.requires_grad]
    assert set(kept) == {torch.float32}
    model = get_peft_model(make("llama", torch.bfloat16), config(method), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {t.dtype for n, t in model.named_buffers() if ".lora_" in n} <= {torch.float32}
    perturb(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    double = get_peft_model(make("llama", torch.float64), config(method))
    assert {p.dtype for p in double.parameters() if p.requires_grad} == {torch.float64}


@each_kind
def test_moving_the_whole_model_to_another_dtype_keeps_working(method):
    model = adapted(method)
    expected = logits(model)
    value = logits(model.to(torch.bfloat16))
    assert value.dtype == torch.bfloat16
    assert (value.float() - expected).abs().max() <= 0.05 * expected.abs().max()


@each_kind
def test_low_cpu_mem_usage_and_inference_mode(method, tmp_path):
    model = adapted(method)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make("mistral-gqa"), tmp_path, config=DudeConfig.from_pretrained(tmp_path), low_cpu_mem_usage=True
    )
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(p.requires_grad for p in load_adapter(make("mistral-gqa"), tmp_path).parameters())
    trainable = load_adapter(make("mistral-gqa"), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in trainable.named_parameters() if ".lora_" in n
    }


@each_kind
def test_modules_to_save_and_trained_biases(method, tmp_path):
    settings = {"modules_to_save": ["lm_head"], "bias": "lora_only", "target_modules": ["q_proj", "fc1"]}
    model = get_peft_model(make("opt-bias"), config(method, **settings))
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer)
    moved = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert len(moved) == 4
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make("opt-bias"), tmp_path)), expected)
    stock = PeftModel.from_pretrained(make("opt-bias"), tmp_path)
    assert torch.allclose(logits(stock), expected, atol=1e-5)


@each_kind
def test_layers_patterns_and_exclusions(method, tmp_path):
    settings = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "exclude_modules": ["v_proj"],
        "layers_to_transform": [1],
    }
    spec = METHODS[method]
    if spec.ranked:
        settings |= {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 20}}
    model = adapted(method, "llama", **settings)
    found = {layer.layer_name: (layer.r["default"], layer.scaling["default"]) for layer in layers_of(model)}
    assert found == {
        "model.layers.1.self_attn.q_proj": (4, spec.scaling(4, 20)),
        "model.layers.1.mlp.down_proj": (2 if spec.ranked else 4, spec.scaling(2, 6)),
    }
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make("llama"), tmp_path)), expected)
    assert torch.allclose(logits(PeftModel.from_pretrained(make("llama"), tmp_path)), expected, atol=1e-5)


def test_a_regular_expression_as_target():
    model = adapted("dude", "llama", target_modules=r".*layers\.0\..*(q|k)_proj")
    assert {layer.layer_name[-6:] for layer in layers_of(model)} == {"q_proj", "k_proj"}
    assert len(layers_of(model)) == 2


@each_kind
def test_generation_with_a_cache_equals_the_whole_forward(method):
    model = adapted(method)
    prompt = tokens(rows=1, length=6)
    generated = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    whole = logits(model, generated)[0, 5:-1].argmax(dim=-1)
    assert generated[0, 6:].tolist() == whole.tolist()


@each_kind
def test_deepcopy_and_state_dict_round_trip(method):
    model = adapted(method)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    fresh = get_peft_model(make("mistral-gqa"), config(method))
    logits(fresh)  # fills the caches, which the loading has to drop
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh.eval()), expected)


def test_the_number_of_trained_parameters():
    model = adapted("dude")
    trained, total = model.get_nb_trainable_parameters()
    shapes = [(layer.out_features, layer.in_features) for layer in layers_of(model)]
    assert trained == sum(4 * (out + in_) + out for out, in_ in shapes)
    assert total == trained + sum(p.numel() for p in make("mistral-gqa").parameters())
    model.print_trainable_parameters()


@every_method
def test_initialisation_is_deterministic(method):
    torch.manual_seed(7)
    one = adapted(method, moved=False).state_dict()
    torch.manual_seed(7)
    two = adapted(method, moved=False).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- names that name nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_layers_to_transform_takes_those_layers_alone(targets):
    """PEFT leaves "all-linear" as whole names on a small model, and does not compare those with the layers."""
    config = DudeConfig(r=4, target_modules=targets, layers_to_transform=[1])
    model = get_peft_model(tiny_llama(), config)
    assert {name.split(".")[2] for name in model.targeted_module_names} == {"1"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers_to_transform": 99}, "no layer 99; it has 0 to 1"),
        ({"layers_to_transform": [0, 99]}, "no layer 99"),
        ({"modules_to_save": ["lm_heat"]}, "modules_to_save: 'lm_heat' is not a module of the model; .*lm_head"),
    ],
)
def test_what_names_nothing_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        get_peft_model(tiny_llama(), DudeConfig(r=4, target_modules="all-linear", **settings))
