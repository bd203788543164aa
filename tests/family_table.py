"""Takes a model family through everything, from training to exports, and writes the table of all."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers
from families import FAMILIES, make
from models import perturb
from tiny import tiny_tokenizer, write_rows
from torch import Tensor

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.manifest import WEIGHTS_FILE, read_manifest
from dude_peft.config.reading import load_config
from dude_peft.errors import DudeError
from dude_peft.exporting.run import export, merge
from dude_peft.exporting.verify import verify
from dude_peft.init.layer import compute
from dude_peft.init.plan import make_plan
from dude_peft.model.weights import open_weights
from dude_peft.planning.run import plan
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.stock_loading import stock_refusal

COLUMNS = ("train", "save", "load in ours", "load in stock PEFT", "merge", "export", "plan", "init")
SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
YES = "yes"
_TOLERANCE = 1e-5  # of the largest logit; what the adapter changes is thousands of times more


class Journey:
    """One family on its way through all columns, in their order.

    Args:
        name: of the family.
        folder: an empty one.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.family, self.folder = FAMILIES[name], folder
        self.base, self.adapter = folder / "base", folder / "adapter"
        model = make(name)
        self.kind: Any = type(model)
        model.save_pretrained(self.base)
        tiny_tokenizer().save_pretrained(self.base)
        self.before = self.logits(self.load())

    def load(self, path: Path | None = None) -> Any:
        model = self.kind.from_pretrained(path or self.base).eval()
        model.requires_grad_(False)  # torch folds other products, with other last bits, where a weight wants a gradient
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            return model.eval()(**self.family.batch()).logits

    def near(self, model: Any, what: str) -> None:
        found = self.logits(model)
        error, size = float((found - self.after).abs().max()), float(self.after.abs().max())
        assert error <= _TOLERANCE * size, f"{what}: off by {error:.1e} of {size:.1e}"

    def train(self) -> str:
        """Steps that move every layer which the batch depends on, and nothing of the base."""
        model = peft.get_peft_model(self.load(), self.config())
        assert torch.equal(self.logits(model), self.before), "the start is not the base model"
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            loss = model(**self.family.batch()).loss
            assert bool(torch.isfinite(loss)), "the loss is not finite"
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, p in model.named_parameters():
            assert p.requires_grad or torch.equal(p, frozen[name]), f"'{name}' of the base moved"
        for layer in model.modules():
            if isinstance(layer, DudeLinear) and not bool(layer.lora_dB["default"].weight.any()):
                assert not self.matters(model, layer.get_base_layer()), f"'{layer.layer_name}' is used and not trained"
        perturb(model)
        self.model, self.after = model, self.logits(model)
        assert float((self.after - self.before).abs().max()) > 1e-3 * float(self.before.abs().max()), "no change"
        return YES

    def matters(self, model: Any, base: Any) -> bool:
        """Whether the batch depends on a weight of the base model: a projector of images does nothing to text."""
        kept, expected = base.weight.detach().clone(), self.logits(model)
        with torch.no_grad():
            base.weight.add_(0.1)
            changed = not torch.equal(self.logits(model), expected)
            base.weight.copy_(kept)
        return changed

    def save(self) -> str:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.model.save_pretrained(self.adapter)
        self.warned = [str(w.message) for w in said if "stock PEFT" in str(w.message)]
        if self.family.kind in ("text", "masked"):
            verify(self.adapter, base=str(self.base), quiet=True)
        return YES

    def load_in_ours(self) -> str:
        self.near(load_adapter(self.load(), self.adapter), "load_adapter")
        return YES

    def load_in_stock_peft(self) -> str:
        """Either the same function, or a refusal that was foretold when the adapter was saved."""
        stock = peft.LoraConfig.from_pretrained(str(self.adapter))
        refusal = stock_refusal(self.load(), stock, read_manifest(self.adapter).base)
        assert bool(refusal) == bool(self.warned)
        if not refusal:
            self.near(peft.PeftModel.from_pretrained(self.load(), str(self.adapter)), "stock PEFT")
            return YES
        try:
            loaded = self.logits(peft.PeftModel.from_pretrained(self.load(), str(self.adapter)))
        except ValueError:
            return refusal
        assert not torch.allclose(loaded, self.after), "stock PEFT was said to refuse it, and loads it"
        return refusal

    def merge(self) -> str:
        self.near(load_adapter(self.load(), self.adapter).merge_and_unload(), "merge_and_unload")
        output = self.folder / "merged"
        merge([self.adapter], output, verify=False, quiet=True)
        self.near(self.load(output), "dude merge")
        assert set(open_weights(output).tensors) == set(open_weights(self.base).tensors)
        return YES

    def export(self) -> str:
        output = self.folder / "lora"
        export(self.adapter, "lora:8", output, verify=False, quiet=True)
        lora = self.logits(peft.PeftModel.from_pretrained(self.load(), str(output)))
        error, change = (float((x - self.after).abs().mean()) for x in (lora, self.before))
        assert error < 0.9 * change, f"lora:8 misses {error:.1e} of {change:.1e}"
        return YES

    def plan(self) -> str:
        rows = write_rows(self.folder / "rows.jsonl", 8)
        content = {
            "model": {"name_or_path": str(self.base), "dtype": "float32"},
            "adapter": SETTINGS,
            "data": {"train": str(rows), "max_length": 64},
            "train": {"max_steps": 2},
            "evaluation": {"enabled": False},
            "output_dir": str(self.folder / "run"),
        }
        file = self.folder / "run.yaml"
        file.write_text(json.dumps(content))
        made = plan(load_config(file), quiet=True)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        assert made.cost.static.trainable_parameters == trained
        if made.cost.uncounted:
            return "without activations: float32 experts cannot be traced"
        assert made.cost.bill.activations > 0
        return YES

    def init(self) -> str:
        """The bits that `get_peft_model` starts from, and its fingerprints."""
        config = self.config()
        made = make_plan(str(self.base), self.base, open_weights(self.base), config, "auto", seed=0)
        adapted = peft.get_peft_model(self.load(), self.config())
        adapted.save_pretrained(self.folder / "start")
        expected = safetensors.torch.load_file(self.folder / "start" / WEIGHTS_FILE)
        base = read_manifest(self.folder / "start").base
        assert {task.name for task in made.layers} == set(base)
        for task in made.layers:
            start = compute(task, config.spec, config.split_options)
            assert start.base == base[task.name], f"fingerprint of '{task.name}'"
            for key, tensor in start.tensors.items():
                assert torch.equal(tensor, expected.pop(f"base_model.model.{task.name}.{key}")), f"{task.name}.{key}"
        assert not expected
        return YES

    def config(self) -> DudeConfig:
        return DudeConfig(**SETTINGS, task_type="CAUSAL_LM" if self.family.kind == "text" else None)


STEPS: tuple[Callable[[Journey], str], ...] = (
    Journey.train, Journey.save, Journey.load_in_ours, Journey.load_in_stock_peft, Journey.merge, Journey.export,
    Journey.plan, Journey.init,
)  # fmt: skip


def cells(name: str, folder: Path) -> list[str]:
    """What each column gives: yes, or the one line that refuses it; an error where it is wrong."""
    with _quiet():
        journey = Journey(name, folder)
        return [_cell(step, journey) for step in STEPS]


def cells_or_fault(name: str, folder: Path) -> list[str]:
    """The same for the page, with the first fault in its column, and the others not reached."""
    with _quiet():
        journey = Journey(name, folder)
        found: list[str] = []
        for step in STEPS:
            try:
                found.append(_cell(step, journey))
            except Exception as error:
                fault = f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                return [*found, fault, *["not reached"] * (len(STEPS) - len(found) - 1)]
        return found


def _cell(step: Callable[[Journey], str], journey: Journey) -> str:
    try:
        return step(journey)
    except DudeError as error:
        refusal = error
    line = str(refusal)
    assert type(refusal) is not DudeError, f"internal: {line}"
    assert "\n" not in line
    for path, what in ((journey.base, "MODEL"), (journey.adapter, "ADAPTER")):
        line = line.replace(str(path), what)
    return line


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def read_markdown(text: str) -> dict[str, list[str]]:
    """The rows of a table that `markdown` wrote."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {name: [notes.get(cell.strip("[]"), cell) for cell in answers] for name, *answers in rows[1:]}


def markdown(rows: dict[str, list[str]]) -> str:
    """The table of all families, refusals as notes below it."""
    notes: list[str] = []
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for name, answers in rows.items():
        shown = []
        for answer in answers:
            if answer != YES and answer not in notes:
                notes.append(answer)
            shown.append(YES if answer == YES else f"[{notes.index(answer) + 1}]")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, start=1)), ""])
