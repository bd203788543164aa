"""DuDe adapters, unchanged, in other people's training loops: transformers' Trainer, TRL's SFT and DPO trainers."""

from __future__ import annotations

import copy
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from models import logits, perturb, tokens
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE, read_manifest
from dude_peft.core.reference import reference_direction, reference_linear
from dude_peft.tuner import DudeLinear

datasets = pytest.importorskip("datasets", reason="the trainers read datasets; install dude-peft[train]")

METHODS = ["dude", "lora"]
EOS = 256


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(method: str = "dude", **changes) -> DudeConfig:
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return DudeConfig(method=method, **{**settings, **changes})


def _wrapped(method: str = "dude", **changes) -> PeftModel:
    torch.manual_seed(3)  # LoRA draws its A from the global generator
    return get_peft_model(tiny_llama(), _config(method, **changes))


def _rows(count: int = 16, length: int = 12, seed: int = 1):
    """Random ids, two rows of them over and over: a few steps learn them by heart."""
    ids = tokens(2, length, seed=seed).repeat(count // 2, 1).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * length] * count})


def _arguments(folder: Path, **changes) -> hf.TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return hf.TrainingArguments(**{**settings, **changes})


def _trainer(model: nn.Module, folder: Path, rows=None, **changes) -> hf.Trainer:
    rows = _rows() if rows is None else rows
    return hf.Trainer(model, _arguments(folder, **changes), train_dataset=rows, eval_dataset=rows)


def _losses(trainer: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything that is no adapter tensor, under the base model's own names."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" in name}


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different


def _layers(model: nn.Module) -> dict[str, DudeLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DudeLinear)}


# --- transformers' Trainer ---


@pytest.mark.parametrize("method", METHODS)
def test_trainer_lowers_the_loss_and_moves_only_the_adapter(tmp_path, method):
    model = _wrapped(method)
    base, trained = _base_tensors(model), _trained(model)
    frozen = {name: t for name, t in _adapter_tensors(model).items() if name not in trained}
    trainer = _trainer(model, tmp_path)
    trainer.train()
    losses = _losses(trainer)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    _assert_same(_base_tensors(model), base)
    _assert_same(_base_tensors(model), _base_tensors(tiny_llama()))
    after = _adapter_tensors(model)
    _assert_same({name: after[name] for name in frozen}, frozen)
    assert bool(frozen) == (method == "dude")
    still = [name for name, tensor in trained.items() if torch.equal(after[name], tensor)]
    assert not still
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_checkpoint_is_the_adapter_that_save_pretrained_writes(tmp_path, method):
    model = _wrapped(method)
    _trainer(model, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2).train()
    model.save_pretrained(tmp_path / "own")
    last, own = tmp_path / "run" / "checkpoint-4", tmp_path / "own"
    _assert_same(load_file(last / WEIGHTS_FILE), load_file(own / WEIGHTS_FILE))
    assert read_manifest(last) == read_manifest(own)
    assert json.loads((last / CONFIG_FILE).read_text()) == json.loads((own / CONFIG_FILE).read_text())
    assert not list(last.glob("model*.safetensors"))
    assert not list(last.glob("pytorch_model*"))
    manifest = read_manifest(last)
    assert manifest.config["method"] == method
    assert set(manifest.base) == {layer.layer_name for layer in _layers(model).values()}

    loaded = load_adapter(tiny_llama(), last)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    earlier = load_adapter(tiny_llama(), tmp_path / "run" / "checkpoint-2")
    assert not torch.equal(logits(earlier.eval()), logits(model.eval()))


@pytest.mark.parametrize("method", METHODS)
def test_load_best_model_at_end_restores_the_best_adapter(tmp_path, method):
    model = _wrapped(method)
    trainer = _trainer(
        model,
        tmp_path,
        max_steps=9,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the "best" is the first checkpoint and not the last
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-3"
    best = load_adapter(tiny_llama(), tmp_path / "checkpoint-3")
    last = load_adapter(tiny_llama(), tmp_path / "checkpoint-9")
    _assert_same(_adapter_tensors(model), _adapter_tensors(best))
    assert torch.equal(logits(model.eval()), logits(best.eval()))
    assert not torch.equal(logits(best.eval()), logits(last.eval()))
    _assert_same(_base_tensors(model), _base_tensors(tiny_llama()))


@pytest.mark.parametrize("method", METHODS)
def test_the_stock_trainer_resumes_bit_by_bit(tmp_path, method):
    straight = _wrapped(method)
    _trainer(straight, tmp_path, max_steps=8, save_strategy="steps", save_steps=4).train()
    torch.manual_seed(99)
    resumed = get_peft_model(tiny_llama(), _config(method))
    perturb(resumed)  # what it starts from must not matter, its frozen start and what a forward kept of it neither
    for name, buffer in resumed.named_buffers():
        if ".lora_" in name:
            buffer.mul_(1.5)
    logits(resumed)
    trainer = _trainer(resumed, tmp_path / "again", max_steps=8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8
    assert len([e for e in trainer.state.log_history if e.get("step", 0) > 4 and "loss" in e]) == 4
    _assert_same(_adapter_tensors(resumed), _adapter_tensors(straight))
    assert torch.equal(logits(resumed.eval()), logits(straight.eval()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_run(tmp_path, use_reentrant):
    plain = _wrapped(lora_dropout=0.2)
    without = _trainer(plain, tmp_path, max_steps=5)
    without.train()

    model = _wrapped(lora_dropout=0.2)
    model.enable_input_require_grads()  # reentrant checkpointing wants it of every PEFT model
    calls = []
    handle = next(iter(_layers(model).values())).register_forward_hook(lambda *_: calls.append(1))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    with_it = _trainer(model, tmp_path, max_steps=5, **options)
    with_it.train()
    handle.remove()
    assert len(calls) == 10  # every forward is run again for its backward
    assert _losses(with_it) == _losses(without)
    _assert_same(_trained(model), _trained(plain))


def test_gradient_accumulation_is_the_larger_batch(tmp_path):
    whole, parts = _wrapped(), _wrapped()
    one = _trainer(whole, tmp_path, max_steps=4, per_device_train_batch_size=8)
    two = _trainer(parts, tmp_path, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    one.train()
    two.train()
    assert _losses(two) == pytest.approx(_losses(one), abs=2e-4)  # the Trainer logs four digits
    # Adam takes the sign of gradients that are nearly nothing, so the weights are compared by what they do.
    torch.testing.assert_close(logits(parts.eval()), logits(whole.eval()), rtol=0, atol=2e-3)
    assert (logits(whole.eval()) - logits(tiny_llama())).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_trains_and_starts_at_the_base_model(tmp_path, method):
    base, model = tiny_llama().train(), _wrapped(method, lora_dropout=0.3).train()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = logits(base), logits(model)
    assert not torch.equal(want, logits(base))  # autocast does something
    assert torch.equal(got, want)
    trainer = _trainer(model, tmp_path, bf16=True)
    trainer.train()
    assert _losses(trainer)[-1] < _losses(trainer)[0] - 0.5
    assert all(p.dtype == torch.float32 for p in _trained(model).values())
    _assert_same(_base_tensors(model), _base_tensors(tiny_llama()))


# --- TRL ---


def _trl():
    return pytest.importorskip("trl", reason="install dude-peft[trl]")


def _pairs(count: int = 8):
    return datasets.Dataset.from_dict(
        {"prompt": [f"say {n} " for n in range(count)], "completion": [f"yes {n * n}" for n in range(count)]}
    )


def _trl_settings(folder: Path, **changes) -> dict:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        "max_length": 64,
    }
    return {**settings, **changes}


def _completion_loss(model: nn.Module, rows) -> float:
    """Mean over the completion's tokens of all rows, end token included, written out."""
    tokenizer = tiny_tokenizer()
    nll, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [EOS]
        logp = logits(model, torch.tensor([whole]))[0].double().log_softmax(-1)
        for position in range(len(prompt), len(whole)):
            nll -= float(logp[position - 1, whole[position]])
            count += 1
    return nll / count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["PeftModel", "peft_config"])
def test_sft_trainer(tmp_path, method, how):
    trl = _trl()
    base = tiny_llama()
    start = _completion_loss(base, _pairs())
    config = _config(method, lora_dropout=0.1)
    arguments = trl.SFTConfig(**_trl_settings(tmp_path, completion_only_loss=True))
    trainer = trl.SFTTrainer(
        model=get_peft_model(base, config) if how == "PeftModel" else base,
        args=arguments,
        train_dataset=_pairs(),
        processing_class=tiny_tokenizer(),
        peft_config=config if how == "peft_config" else None,
    )
    assert isinstance(trainer.model, PeftModel)
    assert len(_layers(trainer.model)) == 14
    trainer.train()
    losses = _losses(trainer)
    # The batch is the whole data set and dropout acts on the change only: step one sees the base model.
    assert losses[0] == pytest.approx(start, abs=1e-4)
    assert losses[-1] < losses[0] - 0.5
    assert _completion_loss(trainer.model.eval(), _pairs()) < start - 0.5
    _assert_same(_base_tensors(trainer.model), _base_tensors(tiny_llama()))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_adapter(tiny_llama(), tmp_path / "saved")
    assert torch.equal(logits(loaded.eval()), logits(trainer.model.eval()))


def _preferences(count: int = 6):
    return datasets.Dataset.from_dict(
        {
            "prompt": [f"say {n} " for n in range(count)],
            "chosen": [f"yes {n}" for n in range(count)],
            "rejected": [f"no, not {n}" for n in range(count)],
        }
    )


def _dpo(model: nn.Module, folder: Path, config: DudeConfig | None, reference: nn.Module | None = None):
    trl = _trl()
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(**_trl_settings(folder, max_steps=4)),
        train_dataset=_preferences(),
        processing_class=tiny_tokenizer(),
        peft_config=config,
    )


def _completion_logps(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of the completion of every row of a DPO batch, written out."""
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    logp = out[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (logp * batch["completion_mask"][:, 1:]).sum(1)


def _reference_logps(trainer, batch) -> torch.Tensor:
    given = (trainer.ref_model or trainer.model, batch)
    taken = len(inspect.signature(trainer.compute_ref_log_probs).parameters)  # early TRL knows its model
    return torch.cat(trainer.compute_ref_log_probs(*given[-taken:]))


@pytest.mark.parametrize("method", METHODS)
def test_dpo_reference_is_the_base_model_bit_by_bit(tmp_path, method):
    base = tiny_llama()
    trainer = _dpo(base, tmp_path, _config(method))
    assert list(trainer.model.peft_config) == ["default"]
    batch = next(iter(trainer.get_train_dataloader()))
    want = _completion_logps(tiny_llama(), batch)
    before = _reference_logps(trainer, batch)
    torch.testing.assert_close(before.double(), want, rtol=1e-6, atol=0)
    plain = _dpo(tiny_llama(), tmp_path / "plain", None, reference=tiny_llama())
    assert torch.equal(before, _reference_logps(plain, batch))
    trainer.train()
    losses = _losses(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are the same model at the start
    assert losses[-1] < losses[0] - 0.05
    perturb(trainer.model)
    assert torch.equal(_reference_logps(trainer, batch), before)
    assert (_completion_logps(trainer.model.eval(), batch) - want).abs().max() > 0.1
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(tiny_llama()))
    _assert_same(_base_tensors(trainer.model), _base_tensors(tiny_llama()))


def test_grpo_trainer_raises_the_reward(tmp_path):
    trl = _trl()
    settings = _trl_settings(tmp_path, max_steps=12, learning_rate=3e-2)
    settings.pop("max_length")
    trainer = trl.GRPOTrainer(
        model=tiny_llama(),
        reward_funcs=lambda completions, **_: [float(sum(c.isalpha() for c in text)) for text in completions],
        args=trl.GRPOConfig(**settings, num_generations=8, max_completion_length=12, beta=0.01),
        train_dataset=datasets.Dataset.from_dict({"prompt": [f"say {n} " for n in range(8)]}),
        processing_class=tiny_tokenizer(),
        peft_config=_config("dude"),
    )
    assert trainer.ref_model is None  # the reference is the disabled adapter: no second model in memory
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 1
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model.eval()), logits(tiny_llama()))
    _assert_same(_base_tensors(trainer.model), _base_tensors(tiny_llama()))


@pytest.mark.parametrize("method", METHODS)
def test_dpo_on_a_trained_adapter_takes_that_adapter_as_reference(tmp_path, method):
    # TRL copies the trained adapter into one named "ref": the reference of DPO after SFT is the SFT model.
    model = _wrapped(method)
    perturb(model, scale=0.05)
    trained = copy.deepcopy(model).eval()
    trainer = _dpo(model, tmp_path, None)
    assert sorted(trainer.model.peft_config) == ["default", "ref"]
    batch = next(iter(trainer.get_train_dataloader()))
    want = _completion_logps(trained, batch)
    assert (want - _completion_logps(tiny_llama(), batch)).abs().max() > 0.1
    torch.testing.assert_close(_reference_logps(trainer, batch).double(), want, rtol=1e-6, atol=0)
    trainer.train()
    assert _losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    torch.testing.assert_close(_reference_logps(trainer, batch).double(), want, rtol=1e-6, atol=0)


# --- what trainers do to a model ---


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
def test_torch_checkpoint_gives_the_same_outputs_and_gradients(use_reentrant, norm_gradient):
    model = _wrapped(norm_gradient=norm_gradient, lora_dropout=0.3).train()
    perturb(model)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(4)).requires_grad_()
    t = layer.tensors("default")
    parameters = [t.dA, t.dB, t.dm]

    def run(forward):
        torch.manual_seed(7)
        y = forward(x)
        y.square().sum().backward()
        gradients = [t.grad.clone() for t in (x, *parameters)]
        for t in (x, *parameters):
            t.grad = None
        return y.detach(), gradients

    want, want_gradients = run(layer)
    got, gradients = run(lambda t: checkpoint(layer, t, use_reentrant=use_reentrant))
    assert torch.equal(got, want)
    assert all(float(g.abs().max()) > 0 for g in want_gradients)
    assert all(torch.equal(a, b) for a, b in zip(gradients, want_gradients, strict=True))


def test_the_gain_is_the_same_under_autocast():
    model = _wrapped()
    perturb(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    want = layer.gain("default")
    assert (want - 1).abs().max() > 0.05
    with torch.autocast("cpu", torch.bfloat16):
        got = layer.gain("default")
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_after_wrapping_keeps_the_start_and_the_formula(dtype):
    base, model = tiny_llama().to(dtype).train(), _wrapped(lora_dropout=0.3)
    logits(model)  # whatever a forward keeps is cast with the model
    model = model.half() if dtype == torch.float16 else model.to(dtype)
    assert torch.equal(logits(model.train()), logits(base))
    model = model.eval()
    perturb(model)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    t, scaling = layer.tensors("default"), layer.scaling["default"]
    W0 = layer.get_base_layer().weight
    # The factors themselves are what the cast left of them.
    V = reference_direction(W0, t.A0.double() + t.dA.double(), t.B0.double() + t.dB.double(), scaling, t.A0, t.B0)
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        y = layer(x)
        change = layer(x).double() - layer.get_base_layer()(x).double()
    m = W0.double().norm(dim=1) + t.dm.double()
    want = reference_linear(x, W0, None, V, m)
    assert y.dtype == dtype
    error, eps = (y.double() - want).norm() / want.norm(), torch.finfo(dtype).eps
    assert error < 2 * eps
    assert change.norm() > 30 * eps * want.norm()


def test_a_cast_model_trains(tmp_path):
    model = _wrapped().to(torch.bfloat16)
    trainer = _trainer(model, tmp_path)
    trainer.train()
    assert _losses(trainer)[-1] < _losses(trainer)[0] - 0.5
    assert all(p.dtype == torch.bfloat16 for p in _trained(model).values())
    _assert_same(_base_tensors(model), _base_tensors(tiny_llama().to(torch.bfloat16)))


@pytest.mark.parametrize("method", METHODS)
def test_prepare_model_for_kbit_training_does_not_break(tmp_path, method):
    prepared = prepare_model_for_kbit_training(tiny_llama())
    model = get_peft_model(prepared, _config(method, lora_dropout=0.2)).train()
    assert torch.equal(logits(model), logits(tiny_llama().train()))
    trained = _trained(model)
    trainer = _trainer(model, tmp_path, max_steps=10)
    trainer.train()
    assert _losses(trainer)[-1] < _losses(trainer)[0] - 0.2
    assert all(".lora_" in name for name in trained)
    after = _trained(model)
    assert not [name for name, tensor in trained.items() if torch.equal(after[name], tensor)]
    _assert_same(_base_tensors(model), _base_tensors(tiny_llama()))


@pytest.mark.parametrize("method", ["dude", "dora", "pissa", "lora", "rslora"])
def test_trainable_parameters_are_counted_exactly(capsys, method):
    r = 3
    model = _wrapped(method, r=r, rank_pattern={"down_proj": 5})
    want = 0
    for name, module in tiny_llama().named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            rank = 5 if name.endswith("down_proj") else r
            out, in_ = module.weight.shape
            want += rank * (in_ + out) + (out if method in ("dude", "dora") else 0)
    trained, total = model.get_nb_trainable_parameters()
    assert trained == want
    assert total - trained == tiny_llama().num_parameters()
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"trainable params: {want:,}" in printed
