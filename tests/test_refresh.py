"""The norm once per optimizer step: seen by every optimizer, right after every other way to change the tensors."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
import transformers as hf
from models import logits, make, perturb, tokens
from night import some_by_day
from peft import get_peft_model

from dude_peft import DudeConfig
from dude_peft.methods import METHODS
from dude_peft.tuner.layer import DudeLinear


def adapted(dtype=torch.float32, architecture="mistral-gqa", **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}
    model = get_peft_model(make(architecture, dtype), DudeConfig(**settings))
    perturb(model)
    return model.train()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DudeLinear)]


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def backward(model, seed=1):
    loss = model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss
    loss.backward()
    return loss.item()


def is_fresh(model):
    """Whether the outputs are those of caches computed anew."""
    value = logits(model)
    for layer in layers_of(model):
        layer.refresh()
    return torch.equal(value, logits(model))


def count_norms(monkeypatch):
    calls = []
    original = DudeLinear.change

    def counted(self, *args):
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(DudeLinear, "change", counted)
    return calls


# Muon takes matrices alone, SparseAdam sparse gradients.
OPTIMIZERS = [
    optimizer
    for name, optimizer in sorted(vars(torch.optim).items())
    if inspect.isclass(optimizer) and issubclass(optimizer, torch.optim.Optimizer)
    if name not in ("Optimizer", "Muon", "SparseAdam")
]
WAYS = [(o, way) for o in OPTIMIZERS for way in ("fused", "foreach", None)]


@pytest.mark.parametrize(
    ("optimizer", "way"), [w for w in WAYS if not w[1] or w[1] in inspect.signature(w[0]).parameters]
)
def test_every_optimizer_of_torch_is_seen(optimizer, way):
    model = adapted()
    chosen = optimizer(trained(model), lr=1e-2, **({way: True} if way else {}))
    before = logits(model)
    backward(model)
    chosen.step(lambda: torch.tensor(backward(model))) if optimizer is torch.optim.LBFGS else chosen.step()
    assert not torch.equal(logits(model), before)
    assert is_fresh(model)


def test_fused_adamw_does_not_raise_the_version():
    """The reason why the optimizer's step is counted. Once this fails, torch has changed, and nothing is wrong."""
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    version = parameter._version
    torch.optim.AdamW([parameter], fused=True).step()
    assert parameter._version == version


def test_muon_is_seen():
    model = adapted()
    optimizer = torch.optim.Muon([p for p in trained(model) if p.ndim == 2], lr=1e-2)
    backward(model)
    optimizer.step()
    assert is_fresh(model)


def test_a_norm_per_optimizer_step_and_layer_whatever_the_micro_batches(monkeypatch):
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, fused=True)
    calls = count_norms(monkeypatch)
    for _ in range(2):
        calls.clear()
        for micro_batch in range(3):
            backward(model, seed=micro_batch)
        assert len(calls) == len(layers_of(model))
        optimizer.step()
        optimizer.zero_grad()


def test_generation_computes_no_norm_per_token(monkeypatch):
    model = adapted().eval()
    calls = count_norms(monkeypatch)
    model.generate(input_ids=tokens(rows=1, length=4), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert len(calls) == len(layers_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_gradients_are_bit_equal_with_and_without_the_cache(dtype):
    gradients = []
    for cached in (True, False):
        model = adapted(dtype)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-3, fused=True)
        for _ in range(2):
            for micro_batch in range(3):
                if not cached:
                    for layer in layers_of(model):
                        layer.refresh()
                backward(model, seed=micro_batch)
            kept = [p.grad.clone() for p in trained(model)]
            optimizer.step()
            optimizer.zero_grad()
        gradients.append(kept)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def moved_in_place(model):
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.05)


def moved_by_new_data(model):
    for parameter in trained(model):
        parameter.data = parameter.data + 0.05


def moved_by_loading(model):
    model.load_state_dict({name: tensor + 0.05 for name, tensor in model.state_dict().items()})


def moved_by_averaging(model):
    for parameter in trained(model):
        parameter.data.mul_(0.5)
    model.eval()


def moved_and_told(model):
    for parameter in trained(model):
        parameter.data.mul_(0.5)
    for layer in layers_of(model):
        layer.refresh()


def moved_to_another_dtype(model):
    model.to(torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        moved_in_place,
        moved_by_new_data,
        moved_by_loading,
        moved_by_averaging,
        moved_and_told,
        moved_to_another_dtype,
    ],
)
def test_every_other_change_is_seen(change):
    model = adapted()
    before = logits(model)
    change(model)
    assert not torch.equal(logits(model), before)
    assert is_fresh(model)


def test_merging_and_saving_trust_no_cache(tmp_path):
    model = adapted().eval()
    logits(model)
    for parameter in trained(model):
        parameter.data.mul_(0.5)  # past torch's count of changes
    fresh = copy.deepcopy(model)
    model.merge_adapter()
    fresh.merge_adapter()
    assert torch.equal(logits(model), logits(fresh))


def test_a_copy_has_caches_of_its_own():
    model = adapted()
    logits(model)
    twin = copy.deepcopy(model)
    moved_in_place(twin)
    assert is_fresh(twin)
    assert is_fresh(model)
    assert not torch.equal(logits(twin), logits(model))


def test_inference_mode_tensors():
    with torch.inference_mode():
        model = get_peft_model(make("llama"), DudeConfig(r=4, target_modules="all-linear"))
        perturb(model)
        assert is_fresh(model)


@pytest.mark.parametrize(
    ("method", "mode", "dtype"),
    some_by_day(
        itertools.product(["dude", "lora", "frozen-m"], ["detached", "exact"], [torch.float32, torch.bfloat16]),
        [("dude", "detached", torch.float32)],
    ),
)
def test_compiled_training_is_eager_training_in_one_graph_without_recompiling(method, mode, dtype):
    from torch._dynamo.testing import CompileCounterWithBackend

    losses, counter = [], CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = adapted(dtype, method=method, norm_gradient=mode)
        step = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2, fused=True)
        history = []
        for number in range(4):
            history.append(backward(step, seed=number))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(history)
    eager, graph = losses
    assert counter.frame_count == 1
    assert eager[0] != eager[-1]
    assert graph == pytest.approx(eager, rel=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("depth", [12, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", some_by_day(METHODS, ["dude"]))
def test_decoder_layers_compiled_one_by_one_share_a_graph(method, depth):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    settings = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**settings, num_hidden_layers=depth))
    model = get_peft_model(base, DudeConfig(method=method, r=4, target_modules="all-linear")).train()
    counter = CompileCounterWithBackend("eager")
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, fused=True)
    seen = []
    for number in range(3):  # transformers' cache of keys has a graph for every layer of its own
        model(input_ids=tokens(seed=number), labels=tokens(seed=number), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(counter.frame_count)
    assert 1 <= seen[0] <= 2
    assert seen[-1] == seen[0]


@pytest.mark.slow
def test_inductor_compiles_it():
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        torch._dynamo.reset()
        eager, compiled = adapted(dtype), adapted(dtype)
        graph = torch.compile(compiled, fullgraph=True)
        optimizers = [torch.optim.AdamW(trained(model), lr=1e-2, fused=True) for model in (eager, compiled)]
        for number in range(3):
            assert backward(graph, seed=number) == pytest.approx(backward(eager, seed=number), rel=bound)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
