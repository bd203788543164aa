"""The norm once per optimizer step, and W0 A0^T once ever, whoever drives the model: counted under real trainers.

Whatever a trainer does between two steps (modes, micro-batches, checkpointing, evaluation, generation, a reference
model), the trained tensors are the same, and so is the norm.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from tiny import tiny_llama, tiny_tokenizer

from dude_peft import DudeConfig
from dude_peft.tuner import DudeLinear

datasets = pytest.importorskip("datasets", reason="the trainers read datasets; install dude-peft[train]")

STEPS, ACCUMULATION = 2, 3
LAYERS = 4


@pytest.fixture
def counts(monkeypatch):
    """Norms, products with W0 and forward passes of all layers."""
    found = dict.fromkeys(("change", "_product", "forward"), 0)

    def counted(name):
        original = getattr(DudeLinear, name)

        def call(self, *args, **kwargs):
            found[name] += 1
            return original(self, *args, **kwargs)

        return call

    for name in found:
        monkeypatch.setattr(DudeLinear, name, counted(name))
    return found


def config():
    return DudeConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def model():
    return get_peft_model(tiny_llama(), config())


def settings(folder, **changes):
    common = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    return {**common, **changes}


def rows(count=12):
    ids = torch.randint(0, 256, (count, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 8] * count})


def prompts(count=12, **columns):
    return datasets.Dataset.from_dict({name: [f"{text} {n}" for n in range(count)] for name, text in columns.items()})


def trainer(folder):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    arguments = hf.TrainingArguments(**settings(folder, **evaluated))
    hf.Trainer(model(), arguments, train_dataset=rows(), eval_dataset=rows(4)).train()


def sft(folder):
    import trl

    arguments = trl.SFTConfig(**settings(folder, eval_strategy="steps", eval_steps=1))
    data = prompts(prompt="say", completion="yes")
    trl.SFTTrainer(model(), arguments, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer()).train()


def dpo(folder):
    import trl

    arguments = trl.DPOConfig(**settings(folder, eval_strategy="steps", eval_steps=1))
    data = prompts(prompt="say", chosen="yes", rejected="no")
    options = {"train_dataset": data, "eval_dataset": data, "processing_class": tiny_tokenizer()}
    trl.DPOTrainer(tiny_llama(), args=arguments, peft_config=config(), **options).train()


def grpo(folder):
    import trl

    generation = {"num_generations": 2, "max_completion_length": 4, "beta": 0.01}
    arguments = trl.GRPOConfig(**settings(folder, **generation))
    trl.GRPOTrainer(
        tiny_llama(),
        args=arguments,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        train_dataset=prompts(prompt="say"),
        processing_class=tiny_tokenizer(),
        peft_config=config(),
    ).train()


def accelerate(_):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    adapted = model()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(rows().with_format("torch"), batch_size=2)
    adapted, optimizer, loader = accelerator.prepare(adapted, optimizer, loader)
    for batch in loader:  # 6 micro-batches
        with accelerator.accumulate(adapted):
            adapted.train()
            accelerator.backward(adapted(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        adapted.eval()
        with torch.no_grad():
            adapted(**batch)


def by_hand(_):
    adapted = model()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        for _ in range(ACCUMULATION):
            adapted.train()
            adapted(input_ids=ids, labels=ids).loss.backward()
            adapted.eval()
            adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        for parameter in trained:  # no optimizer that could be counted, past torch's count of changes
            parameter.data -= 0.01 * parameter.grad
            parameter.grad = None
    with torch.no_grad():
        adapted(input_ids=ids)


# With an evaluation behind the last step there is one set of trained tensors more to see.
@pytest.mark.parametrize(
    ("drive", "seen"),
    [(trainer, STEPS + 1), (sft, STEPS + 1), (dpo, STEPS + 1), (grpo, STEPS), (accelerate, STEPS + 1), (by_hand, 3)],
)
def test_a_norm_for_every_set_of_trained_tensors_and_no_more(drive, seen, tmp_path, counts):
    if drive in (sft, dpo, grpo):
        pytest.importorskip("trl", reason="install dude-peft[trl]")
    drive(tmp_path)
    assert counts["forward"] >= 2 * STEPS * ACCUMULATION * LAYERS
    assert counts["change"] == seen * LAYERS
    assert counts["_product"] == (seen + 1) * LAYERS  # W0 dA^T for every norm, W0 A0^T once
