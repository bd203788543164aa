"""An adapted embedding whose weight is the output layer's too: one adapter changes both, and they stay one weight.

The textbook is the model itself with the effective weight of `core/reference.py` in both places, in float64.
"""

from __future__ import annotations

import copy
import io
import json

import peft
import pytest
import torch
import transformers as hf
from method_rows import KINDS, RANKED
from models import logits, make, optimizer_of, perturb, step, tokens
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from dude_peft import DudeConfig, load_adapter
from dude_peft.core.reference import reference_direction
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.methods import METHODS
from dude_peft.training.model_checks import check_whole
from dude_peft.tuner.tied import DudeTiedHead

slow = pytest.mark.slow
each_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in KINDS else slow) for name in RANKED]
)
two_methods = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in ("dude", "lora") else slow) for name in RANKED]
)
# Gemma scales what it looks up, and not what it multiplies by; GPT-2 keeps the two in other places.
each_model = pytest.mark.parametrize("name", ["gemma3-tied", pytest.param("gpt2-conv1d", marks=slow)])
EMBEDDINGS = {"gemma3-tied": "model.embed_tokens", "gpt2-conv1d": "transformer.wte"}


def adapted(method="dude", name="gemma3-tied", dtype=torch.float32, moved=True, seed=0, **settings):
    defaults = {"r": 3, "lora_alpha": 4, "target_modules": [EMBEDDINGS[name]]}
    model = peft.get_peft_model(make(name, dtype, seed), DudeConfig(method=method, **{**defaults, **settings}))
    if moved:
        perturb(model)
    return model.eval()


def layer_of(model, name="gemma3-tied"):
    return model.base_model.model.get_submodule(EMBEDDINGS[name])


def textbook(layer, gradient):
    """The effective weight (embedding_dim, num_embeddings) as autograd follows it, and what is trained."""
    state, scaling = layer.tensors("default"), layer.scaling["default"]
    W0 = layer.effective_weight([]).double()
    A = state.dA if state.A0 is None else state.A0 + state.dA
    B = state.dB if state.B0 is None else state.B0 + state.dB
    V = reference_direction(W0, A, B, scaling, state.A0, state.B0)
    if state.m0 is None:
        return V, state.learned
    m = state.m0 if state.dm is None else state.m0 + state.dm
    n = V.norm(dim=1) if gradient == "exact" else V.norm(dim=1).detach()
    return (m / n)[:, None] * V, state.learned


@each_method
@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_model_bit_by_bit(method, name, dtype):
    expected = logits(make(name, dtype))
    model = adapted(method, name, dtype, moved=False, lora_dropout=0.1)
    assert isinstance(model.get_output_embeddings(), DudeTiedHead)
    assert model.peft_config["default"].ensure_weight_tying
    assert torch.equal(logits(model.train()), expected)
    perturb(model)
    assert not torch.equal(logits(model.eval()), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    plain = model.base_model.unload()
    assert torch.equal(logits(plain), expected)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


@each_method
@each_model
def test_both_places_compute_the_textbook(method, name):
    """Logits, and the gradients of all that is trained, with the effective weight in both places."""
    if METHODS[method].delta is not None:
        pytest.skip("its L and R are compared in test_delta_methods.py")
    model = adapted(method, name, torch.float64)
    weight, learned = textbook(layer_of(model, name), METHODS[method].norm_gradient)
    assert weight.shape == (48, 96)
    base = make(name, torch.float64)
    expected = functional_call(base, {f"{EMBEDDINGS[name]}.weight": weight.T}, kwargs={"input_ids": tokens()}).logits
    found = model(input_ids=tokens()).logits
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)
    dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pairs = (torch.autograd.grad(y, learned, dy, retain_graph=True) for y in (found, expected))
    for one, other in zip(*pairs, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": r".*(lm_head|q_proj)", "ensure_weight_tying": True},
    ],
)
def test_either_name_means_both(settings):
    model = adapted(moved=False, **settings)
    wanted = adapted(target_modules=["embed_tokens", "q_proj"], moved=False)
    for each in (model, wanted):
        perturb(each)
    assert torch.equal(logits(model), logits(wanted))
    assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_output_layer_alone_leaves_the_embedding():
    model = adapted(target_modules=["lm_head"])
    assert not model.peft_config["default"].ensure_weight_tying
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, make("gemma3-tied").model.embed_tokens.weight)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight


@two_methods
@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_adapter_and_one_weight(method, name, dtype):
    model = adapted(method, name, dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected, base = logits(model), logits(make(name, dtype))
    near = 1e-5 if dtype == torch.float32 else 2e-2
    model.merge_adapter()
    head, layer = model.get_output_embeddings(), layer_of(model, name)
    assert head.base_layer.weight is layer.base_layer.weight
    assert (logits(model) - expected).norm() <= near * expected.norm()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert head.base_layer.weight is layer.base_layer.weight
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    plain = model.merge_and_unload()
    assert type(plain.get_output_embeddings()) is nn.Linear
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert plain.config.get_text_config().tie_word_embeddings
    assert (logits(plain) - expected).norm() <= near * expected.norm()


@two_methods
@each_model
def test_save_and_load_are_bit_equal(method, name, tmp_path):
    model = adapted(method, name, rank_pattern={EMBEDDINGS[name]: 2}, r=4)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(EMBEDDINGS[name] in key and ".lora_" in key for key in tensors)
    assert torch.equal(logits(load_adapter(make(name), tmp_path)), expected)
    assert torch.equal(logits(load_adapter(make(name), tmp_path, low_cpu_mem_usage=True)), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    perturb(copied, seed=8)  # and is one of its own
    assert torch.equal(logits(model), expected)
    assert copied.get_output_embeddings().embedding is layer_of(copied, name)
    # Stock PEFT would keep the factors twice, and merge into two weights.
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DUDE"
    with pytest.raises(ArtifactError, match="different base weights"):
        load_adapter(make(name, seed=1), tmp_path)
    untied = make(name)
    untied.get_output_embeddings().weight = nn.Parameter(untied.get_output_embeddings().weight.detach().clone())
    untied.config.tie_word_embeddings = False
    with pytest.raises(ArtifactError, match="embedding and the output layer shared one weight, and here they"):
        load_adapter(untied, tmp_path)


@pytest.mark.parametrize("mode", ["detached", pytest.param("exact", marks=slow)])
def test_training_goes_on_from_a_file_bit_by_bit(mode, tmp_path):
    model = adapted(norm_gradient=mode, moved=False).train()
    base = {name: p.clone() for name, p in model.named_parameters() if ".lora_" not in name}
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    optimizer = optimizer_of(model)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters() if name in base)
    model.save_pretrained(tmp_path)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    uninterrupted = [step(model, optimizer) for _ in range(3)]
    resumed = load_adapter(make("gemma3-tied"), tmp_path, is_trainable=True).train()
    optimizer = optimizer_of(resumed)
    state.seek(0)
    optimizer.load_state_dict(torch.load(state))
    assert [step(resumed, optimizer) for _ in range(3)] == uninterrupted


def test_several_adapters(tmp_path):
    model = adapted()
    first, base = logits(model), logits(make("gemma3-tied"))
    model.add_adapter("second", DudeConfig(method="lora", r=2, target_modules=["embed_tokens", "q_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), base)
    perturb(model, seed=5)
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.merge_adapter(["default"])
    assert torch.allclose(logits(model), both, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter(["second"])
    assert torch.allclose(logits(model), both, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "linear")
    model.set_adapter("sum")
    assert torch.allclose(logits(model), both, atol=1e-3)
    model.delete_adapter("sum")
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, first), (tmp_path / "second", second)):
        assert torch.equal(logits(load_adapter(make("gemma3-tied"), folder)), expected)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    with pytest.raises(ConfigError, match="'lm_head' follows the embedding, which another adapter changes"):
        model.add_adapter("third", DudeConfig(r=2, target_modules=["lm_head"]))


@pytest.mark.parametrize("use_reentrant", [pytest.param(True, marks=slow), False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = adapted(lora_dropout=0.1).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_code_that_reads_the_weight_finds_the_effective_one():
    model = adapted()
    head, x = model.get_output_embeddings(), torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(nn.functional.linear(x, head.weight), head(x), atol=1e-5)
    own = head.base_layer.weight
    with model.disable_adapter():
        assert head.weight is own
    model.merge_adapter()
    with model.disable_adapter():
        assert head.weight is own


def test_a_small_gain_arrives_in_bfloat16():
    """It scales what comes into the output layer, which has eight bits."""
    model = adapted(dtype=torch.bfloat16, moved=False)
    head, layer = model.get_output_embeddings(), layer_of(model)
    x = torch.randn(4096, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    W0 = head.base_layer.weight.double()
    with torch.no_grad():
        base = (x.double() @ W0.T).float()
        for eps in (1e-3, 1e-2):
            layer.lora_dm["default"].weight.data.copy_(eps * layer.lora_m0["default"])
            delivered = ((head(x).float() - head.base_layer(x).float()) * base).sum() / base.square().sum() / eps
            assert 0.9 <= delivered <= 1.1, eps


def test_autocast_computes_the_adapter():
    model = adapted()
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(adapted(moved=False)), logits(make("gemma3-tied")))
        assert (logits(model).float() - expected).norm() <= 0.05 * expected.norm()


@slow
def test_a_compiled_model_computes_the_adapter():
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    for seed in (3, 9):
        perturb(model, seed=seed)
        assert torch.allclose(logits(compiled), logits(model), atol=1e-5)


@slow
def test_a_masked_language_model_has_a_bias_behind():
    model = peft.get_peft_model(make("bert"), DudeConfig(r=3, target_modules=["word_embeddings"]))
    assert torch.equal(logits(model), logits(make("bert")))
    perturb(model)
    expected = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), expected, atol=1e-4)


def test_a_model_that_is_to_be_split_is_refused():
    with pytest.raises(ConfigError, match="'lm_head' is a tied output layer and needs whole weights, and fsdp2"):
        check_whole(adapted(), "fsdp2")
    check_whole(adapted(target_modules=["lm_head"]), "fsdp2")


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_follow_is_refused_and_left_alone():
    model = adapted(target_modules=["lm_head"])
    with pytest.raises(ConfigError, match=r"embed_tokens' shares its weight with 'lm_head' .*adapter of its own"):
        model.add_adapter("second", DudeConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="ensure_weight_tying: no target is an embedding that shares"):
        peft.get_peft_model(make("llama"), DudeConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True))
    with pytest.raises(ConfigError, match="'lm_head' is in target_modules and, by its ending, in modules_to_save"):
        adapted(modules_to_save=["lm_head"])
    config = hf.T5Config(vocab_size=96, d_model=48, d_kv=12, d_ff=80, num_layers=1, num_heads=4)
    t5 = hf.T5ForConditionalGeneration(config)
    t5.encoder.embed_tokens = nn.Embedding(96, 48)
    t5.encoder.embed_tokens.weight = t5.shared.weight
    with pytest.raises(ConfigError, match=r"'encoder.embed_tokens' .*is no plain linear layer"):
        peft.get_peft_model(t5, DudeConfig(r=2, target_modules=["shared"]))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj"]])
@pytest.mark.parametrize("tied", [True, False])
def test_tokens_are_added_before_the_adapter_counts_them(targets, tied):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads))
    config = DudeConfig(r=2, target_modules=targets, ensure_weight_tying=tied and targets != ["q_proj"])
    model = peft.get_peft_model(plain, config)
    model.resize_token_embeddings(40)
    assert logits(model, torch.tensor([[1, 2]])).shape[-1] == 40
    if targets == ["q_proj"]:
        model.resize_token_embeddings(44)
        assert logits(model, torch.tensor([[1, 2]])).shape[-1] == 44
        return
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="resize the model first, then call get_peft_model or load_adapter"):
        model.resize_token_embeddings(44)
    with pytest.raises(ConfigError, match="resize the model first"):
        model.resize_token_embeddings(None, pad_to_multiple_of=64)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
