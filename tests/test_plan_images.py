"""`dude plan` of rows with images: its bill against real steps that read the same images, and what it tells of them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from night import some_by_day
from test_plan import adapted, run_of
from tiny_vision import COLOURS, FAMILIES, picture, row, save_seeing, write_seen

from dude_peft.config.schema import DataSection, ModelSection, RunConfig
from dude_peft.data.batches import pad_right
from dude_peft.data.encode import encode
from dude_peft.data.rows import load_rows
from dude_peft.data.template import Template
from dude_peft.model.load import load_model, load_settings, load_tokenizer
from dude_peft.model.processor import sight_of
from dude_peft.planning.bill import Cost, cost
from dude_peft.planning.live_bytes import LiveBytes
from dude_peft.planning.run import plan
from dude_peft.planning.seen import seen_batch

LANGUAGE = r".*(language_model|text_model)\.layers.*(q_proj|down_proj)"
EYES = r".*(encoder|visual|multi_modal|connector).*(q_proj|fc1|linear_1|linear_fc1|qkv)"


class Places:
    """A model of a family, rows that show pictures of two sizes, and the examples that they become."""

    def __init__(self, folder: Path, family: str) -> None:
        self.model = save_seeing(folder / "model", family)
        section = ModelSection(name_or_path=str(self.model))
        tokenizer = load_tokenizer(section, str(self.model))
        picture(folder / "data/large.png", "red", (100, 120))
        picture(folder / "data/small.png", "blue", (30, 30))
        rows = [
            row("red", "large.png", question="Which colour?" + "x" * (20 - number % 2)) for number in range(32)
        ]  # three steps of twelve
        self.rows = write_seen(folder / "data/rows.jsonl", rows)
        sight = sight_of(section, str(self.model), tokenizer)
        self.examples = encode(load_rows(self.rows), Template(tokenizer), tokenizer, 512, sight=sight).examples

    @property
    def longest(self) -> int:
        return max(len(example["input_ids"]) for example in self.examples)

    def cost(self, config: RunConfig, *, whole: bool = False) -> Cost:
        where, widest = str(self.model), self.examples[0]
        settings = load_settings(config.model, where)
        return cost(config, settings, where, self.longest, gpu=False, whole=whole, example=widest)

    def real_step(self, model: Any, config: RunConfig, folder: Path) -> int:
        """Peak of what lives while Trainer takes two steps over the rows."""
        train = config.train
        options: dict[str, Any] = {}
        if train.gradient_checkpointing:
            options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        arguments = transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=2,
            per_device_train_batch_size=train.per_device_train_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            bf16=train.bf16,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        )
        collate: Callable[..., Any] = functools.partial(_counted, pad_id=0)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=self.examples, data_collator=collate)
        model.config.use_cache = False
        gc.collect()
        with LiveBytes([]) as live:
            trainer.train()
        return live.peak


def _counted(examples: Any, pad_id: int) -> dict[str, torch.Tensor]:
    """A batch whose bytes are seen: processors make theirs from arrays, which torch's modes do not see."""
    return {name: tensor.clone() for name, tensor in pad_right(examples, pad_id).items()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "language": (LANGUAGE, {}),
    "eyes": (EYES, {}),
    "checkpointing": (EYES, {"gradient_checkpointing": True}),
    "one row": (EYES, {"per_device_train_batch_size": 1}),
    "autocast": (LANGUAGE, {"bf16": True}),
    "accumulation": (LANGUAGE, {"gradient_accumulation_steps": 3}),
}


@pytest.mark.parametrize("case", some_by_day(CASES, ["eyes"]))
@pytest.mark.parametrize("family", some_by_day(FAMILIES, ["Qwen2-VL"]))
def test_the_peak_is_that_of_a_real_step(family, case, tmp_path):
    """Within 5 %; the buffers of our layers are filled in a first step, before bytes are counted."""
    targets, train = CASES[case]
    places = Places(tmp_path, family)
    config = run_of(places.model, {"target_modules": targets}, **train)
    found = places.cost(config)
    assert not found.uncounted
    bill, section = found.bill, config.model
    real = adapted(load_model(section, str(places.model)), config)
    fixed = bill.weights + bill.adapter_frozen + bill.trained
    assert fixed == sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers()))
    places.real_step(adapted(load_model(section, str(places.model)), config), config, tmp_path / "first")
    peak = places.real_step(real, config, tmp_path)
    assert bill.total - bill.runtime - fixed == pytest.approx(peak, rel=0.05, abs=0)


@pytest.mark.parametrize("family", some_by_day(FAMILIES, ["LLaVA"]))
def test_a_batch_of_the_plan_has_the_tensors_of_the_run(family, tmp_path):
    places = Places(tmp_path, family)
    example = places.examples[0]
    ours, real = seen_batch(example, 3, len(example["input_ids"])), pad_right([example] * 3, 0)
    real["attention_mask"][-1, -1] = 0
    assert ours.keys() == real.keys()
    for name, tensor in real.items():
        assert torch.equal(ours[name], tensor), name


def test_more_pixels_need_more_memory_and_more_time(tmp_path):
    """The widest row decides the memory, the mean of all rows the time."""
    places = Places(tmp_path, "Qwen2-VL")

    def planned(name: str, rows: list[Any]) -> Any:
        data = DataSection(train=str(write_seen(tmp_path / f"data/{name}.jsonl", rows)), max_length=512)
        return plan(run_of(places.model, {"target_modules": EYES}).model_copy(update={"data": data}), quiet=True)

    small = planned("small", [row("blue", "small.png")] * 8)
    mixed = planned("mixed", [row("blue", "small.png")] * 7 + [row("red", "large.png")])
    large = planned("large", [row("red", "large.png")] * 8)
    text = planned("text", [row("none")] * 8)
    assert not any("image" in warning for warning in mixed.warnings)
    assert text.memory < small.memory < mixed.memory == large.memory
    assert text.flops_per_step < small.flops_per_step < mixed.flops_per_step < large.flops_per_step
    assert mixed.as_dict()["data"]["image_tokens"] > small.as_dict()["data"]["image_tokens"] > 0
    assert "widest" not in mixed.as_dict()["data"]


@pytest.mark.parametrize("family", some_by_day(FAMILIES, ["LLaVA"]))
def test_the_work_before_the_layers_is_known_apart(family, tmp_path):
    places = Places(tmp_path, family)
    config = run_of(places.model, {"target_modules": EYES})
    found, whole = places.cost(config), places.cost(config, whole=True)
    assert 0 < found.flops_before < found.flops == whole.flops


def test_rows_that_were_not_looked_at_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("dude_peft.planning.rows._MOST_WITH_IMAGES", 4)
    places = Places(tmp_path, "LLaVA")
    rows = [row(colour, "small.png") for colour in COLOURS] * 3
    data = DataSection(train=str(write_seen(tmp_path / "data/many.jsonl", rows)), max_length=128)
    made = plan(run_of(places.model, {"target_modules": LANGUAGE}).model_copy(update={"data": data}), quiet=True)
    assert any("4 of 12 rows were looked at" in warning for warning in made.warnings)
