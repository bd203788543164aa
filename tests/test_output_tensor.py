"""A layer's output is a tensor like any other: changed in place, kept for later, asked for twice; for every method."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from method_rows import each_kind
from models import logits, make, perturb, tokens
from peft import PeftModel, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dude_peft import DudeConfig, load_adapter
from dude_peft.core.linear import adapted_linear
from dude_peft.methods import METHODS
from dude_peft.tuner import DudeLinear


class Pair(nn.Module):
    """Two linear layers, and what a model does with the first one's output."""

    def __init__(self, change, bias=True, opaque=False):
        super().__init__()
        torch.manual_seed(0)
        layer = _PackedLinear if opaque else nn.Linear
        self.a, self.b, self.change = layer(24, 40, bias=bias), layer(40, 8, bias=bias), change

    def forward(self, x):
        return self.b(self.change(self.a(x)))


class _PackedLinear(nn.Module):
    """Rows in, rows out, and no weight that could be read: as a quantised layer."""

    def __init__(self, in_features, out_features, bias):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        layer = nn.Linear(in_features, out_features, bias=bias)
        self.register_buffer("packed", layer.weight.detach().T.contiguous())
        self.bias = layer.bias

    def forward(self, x):
        y = x @ self.packed
        return y if self.bias is None else y + self.bias


def relu_(y):
    return nn.functional.relu(y, inplace=True)


def add_(y):
    y += 0.5 * torch.ones_like(y)
    return y


def write_a_part(y):
    y[..., :5] = 0.25
    return y


def mask_(y):
    return y.masked_fill_(torch.arange(y.shape[-1]) % 3 == 0, 0.0)


IN_PLACE = [relu_, add_, write_a_part, mask_]


def out_of_place(change):
    return lambda y: change(y.clone())


def adapted(change, method="dude", dtype=torch.float32, dropout=0.0, norm_gradient=None, **settings):
    config = DudeConfig(
        method=method, r=4, lora_alpha=6, target_modules=["a", "b"], lora_dropout=dropout, norm_gradient=norm_gradient
    )
    model = get_peft_model(Pair(change, **settings).to(dtype), config)
    perturb(model)
    return model.train()


def gradients(model, x, times=1, wrap=None):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y = model(x) if wrap is None else wrap(model, x)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    found = [x, *(p for p in model.parameters() if p.requires_grad)]
    for _ in range(times):
        result = torch.autograd.grad(y, found, dy, retain_graph=times > 1)
    return [y.detach(), *result]


def rows(dtype=torch.float32, *shape):
    return torch.randn(*(shape or (2, 9)), 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("change", IN_PLACE)
@each_kind
def test_code_behind_the_layer_may_change_its_output_in_place(method, change, bias):
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        models = [adapted(way, method, dtype, bias=bias) for way in (change, out_of_place(change))]
        ours, want = (gradients(model, rows(dtype)) for model in models)
        assert torch.equal(ours[0], want[0])
        for got, expected in zip(ours, want, strict=True):
            assert (got - expected).double().norm() <= bound * expected.double().norm()


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_gradient": "exact"},
        {"opaque": True},
        {"opaque": True, "dropout": 0.3},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_also_where_the_product_has_to_be_had_again_by_other_means(settings):
    models = [adapted(way, bias=False, **settings) for way in (relu_, out_of_place(relu_))]
    ours, want = (gradients(model, rows()) for model in models)
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_in_place_for_inputs_of_any_number_of_dimensions(shape):
    x = torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1))
    models = [adapted(way, bias=False) for way in (relu_, out_of_place(relu_))]
    for got, expected in zip(*(gradients(model, x) for model in models), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def _checkpointed(reentrant):
    return lambda model, x: checkpoint(model, x, use_reentrant=reentrant)


def _on_cpu(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


@pytest.mark.parametrize("change", [relu_, torch.relu])
def test_in_place_under_hooks_that_drop_or_copy_what_is_saved(change):
    want = gradients(adapted(torch.relu, bias=False), rows())
    for wrap in (_checkpointed(False), _on_cpu):
        for got, expected in zip(gradients(adapted(change, bias=False), rows(), wrap=wrap), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_two_backwards_through_one_graph():
    once, twice = (gradients(adapted(relu_, bias=False), rows(), times=n) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_checkpointing_still_lets_go_of_the_output():
    """The count of changes that is kept beside the graph holds no memory."""
    freed = []

    def watch(y):
        freed.append(StorageWeakRef(y.untyped_storage()))
        return torch.relu(y)

    y = checkpoint(adapted(watch, bias=False), rows().requires_grad_(), use_reentrant=False)
    assert freed[0].expired()
    y.sum().backward()


def test_without_a_way_to_the_product_a_changed_output_is_an_error_not_a_wrong_gradient():
    g = torch.Generator().manual_seed(0)
    base, x = torch.randn(5, 8, generator=g), torch.randn(5, 6, generator=g)
    dA, dB = torch.randn(2, 6, generator=g), torch.randn(8, 2, generator=g)
    gain = torch.full((8,), 1.1, requires_grad=True)
    y = adapted_linear(base, x, dA, dB, None, None, gain, None, 1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.relu_().sum().backward()


@each_kind
def test_falcon_trains(method):
    torch.manual_seed(0)
    settings = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
    settings |= {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False}
    base = hf.FalconForCausalLM(hf.FalconConfig(**settings, hidden_dropout=0.0, attention_dropout=0.0)).eval()
    model = get_peft_model(copy.deepcopy(base), DudeConfig(method=method, r=4, target_modules="all-linear")).train()
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, base(tokens()).logits)
    few = METHODS[method].delta is not None  # some hundred numbers take larger steps
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1 if few else 1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


# --- Between a forward and its backward ---


def language_model(method="dude", architecture="llama", dtype=torch.float32):
    torch.manual_seed(3)
    model = get_peft_model(
        make(architecture, dtype), DudeConfig(method=method, r=4, lora_alpha=6, target_modules="all-linear")
    )
    perturb(model)
    return model.train()


def loss_of(model, seed=1):
    return model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss


def nothing(_):
    pass


def look_in_eval_mode(model):
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens(seed=2))
    model.train()


def step_of_another_model(_):
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(1, 2)).sum().backward()
    optimizer.step()


def generate(model):
    model.eval()
    model.generate(input_ids=tokens(rows=1, length=4), max_new_tokens=3, do_sample=False, eos_token_id=None)
    model.train()


def save(model, tmp_path):
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("meanwhile", [look_in_eval_mode, step_of_another_model, generate])
@each_kind
def test_what_happens_between_forward_and_backward_changes_no_gradient(method, meanwhile):
    found = []
    for between in (nothing, meanwhile):
        model = language_model(method)
        one = loss_of(model)
        between(model)
        two = loss_of(model, seed=3)
        between(model)
        (one + two).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, None])
def test_the_first_forward_may_be_in_inference_mode(method, dtype, tmp_path):
    model, twin = language_model(method), language_model(method)
    if dtype is None:  # loaded without a start of its own
        model.save_pretrained(tmp_path)
        model, twin = (
            load_adapter(make("llama"), tmp_path, is_trainable=True, low_cpu_mem_usage=low).train()
            for low in (True, False)
        )
    else:
        model, twin = model.to(dtype), twin.to(dtype)
    model.eval()
    with torch.inference_mode():
        model(input_ids=tokens())
    for each in (model, twin):
        loss_of(each.train()).backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs if a.requires_grad)


@each_kind
def test_a_model_made_in_inference_mode_is_saved(method, tmp_path):
    with torch.inference_mode():
        model = language_model(method)
        want = model.eval()(tokens()).logits
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(make("llama"), tmp_path)), want)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make("llama"), tmp_path)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("architecture", ["llama", "opt-bias"])
def test_nothing_is_kept_for_a_backward_that_never_comes(architecture, mode, monkeypatch):
    import dude_peft.core.linear as module

    model, kept = language_model(architecture=architecture).eval(), []
    compose = module.compose

    def spy(*args):
        kept.append(args[6])
        return compose(*args)

    monkeypatch.setattr(module, "compose", spy)
    with mode():
        model(input_ids=tokens())
    assert kept
    assert set(kept) == {None}


# --- Writes past torch's count: MeZO perturbs the parameters themselves, twice a step, without a backward ---


def perturb_by_new_data(parameter, change):
    parameter.data = parameter.data + change


def perturb_in_place(parameter, change):
    parameter.data.add_(change)


def perturb_augmented(parameter, change):
    parameter.data += change


@pytest.mark.parametrize("write", [perturb_by_new_data, perturb_in_place, perturb_augmented])
@pytest.mark.parametrize("mode", ["train", "eval"])
@each_kind
def test_every_perturbation_of_mezo_is_seen(method, mode, write):
    model = language_model(method).train(mode == "train")
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = [module for module in model.modules() if isinstance(module, DudeLinear)]
    for change in (0.02, -0.04, 0.02, -0.005):
        with torch.no_grad():
            for parameter in trained:
                write(parameter, change / 2)
                write(parameter, change / 2)
        found = logits(model)
        for layer in layers:
            layer.refresh()
        assert torch.equal(found, logits(model))


def test_a_changed_scaling_is_seen():
    model = language_model().eval()
    layers = [module for module in model.modules() if isinstance(module, DudeLinear)]
    logits(model)
    for layer in layers:
        layer.scaling["default"] *= 3
    found = logits(model)
    for layer in layers:
        layer.refresh()
    assert torch.equal(found, logits(model))


@pytest.mark.parametrize("way", ["write", "optimizer", "mode"])
def test_what_is_counted_where_the_bytes_cannot_be_asked(way, monkeypatch):
    """On a GPU a hash would stop the queue: steps, versions, storages and modes stand in for it."""
    monkeypatch.setattr("dude_peft.tuner.refresh._is_readable", lambda tensor: False)
    model = language_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    for change in (0.02, -0.05, 0.03):
        before = logits(model)
        if way == "write":
            for p in trained:
                p.data = p.data + change
                p.data = p.data - change / 2
        elif way == "mode":
            for p in trained:
                p.data.add_(change)
            model.train(not model.training)
        else:
            optimizer = torch.optim.AdamW(trained, lr=abs(change), fused=True)
            loss_of(model).backward()
            optimizer.step()
        found = logits(model)
        assert not torch.equal(found, before)
        for module in model.modules():
            if isinstance(module, DudeLinear):
                module.refresh()
        assert torch.equal(found, logits(model))


# --- What is not a tensor like any other, said at once ---


@each_kind
def test_a_second_derivative_is_refused_not_wrong(method):
    model, x = adapted(torch.relu, method), rows().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_whose_output_is_changed_behind_the_graph(dtype):
    torch._dynamo.reset()
    found = []
    for change in (lambda y: y.mul_(2), lambda y: y * 2):
        model = adapted(lambda y: y, bias=False, dtype=dtype)
        layer = torch.compile(model.base_model.model.a, backend="aot_eager")
        change(layer(rows(dtype))).float().square().sum().backward()
        found.append([p.grad for p in model.base_model.model.a.parameters() if p.requires_grad])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_an_exported_model_takes_its_gain_along():
    model = adapted(torch.relu).eval()
    program = torch.export.export(model, (rows(),))
    want = model(rows())
    assert not any("dude_peft" in str(node.target) for node in program.graph.nodes)
    del model
    torch.testing.assert_close(program.module()(rows()), want, rtol=1e-4, atol=1e-5)


def test_merged_layers_take_several_threads():
    model = adapted(torch.relu).eval()
    with torch.no_grad():
        model.merge_adapter()
        merged = model(rows())
        with model.disable_adapter():
            base = model(rows())
            with ThreadPoolExecutor(4) as pool:
                outputs = list(pool.map(lambda _: model(rows()), range(200)))
        assert all(torch.equal(y, base) for y in outputs)
        assert torch.equal(model(rows()), merged)
