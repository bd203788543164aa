"""A plan as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ResourceError
from dude_peft.planning.bill import Cost, rows_of_batch
from dude_peft.planning.device import Device
from dude_peft.planning.disk import Disk
from dude_peft.planning.placed import Placed
from dude_peft.planning.remedies import Remedy
from dude_peft.planning.rows import Rows, optimizer_steps
from dude_peft.planning.speed import products_per_second
from dude_peft.planning.spread import ALONE, Spread
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.facts import show_facts
from dude_peft.terminal.html import table
from dude_peft.training.budget import Spent
from dude_peft.training.progress import rank_table

_PARTS = {
    "weights": "frozen weights",
    "adapter_frozen": "adapter: frozen start and caches",
    "trained": "adapter: trained",
    "optimizer": "optimizer's states",
    "gradients": "gradients",
    "activations": "activations kept for the backward pass",
    "logits_and_loss": "logits and loss",
    "working": "one layer's or the optimizer's work",
    "runtime": "libraries and device (assumed)",
    "exchanged": "gathered blocks, or gradients as they are sent",
    "reward_models": "reward models, without what they compute",
}


@dataclass(repr=False)
class Plan:
    """What is known of a run before it starts."""

    config: RunConfig
    device: Device
    cost: Cost
    rows: Rows | None
    length: int
    """Tokens of the longest row."""
    disk: Disk
    remedies: list[Remedy] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    spread: Spread = ALONE
    """The processes that train together; the bill is of one of them."""
    budget: Spent | None = None
    """adapter.budget as ranks, which `config` has too."""
    placed: Placed | None = None
    """Where model.device_map puts the frozen weights."""
    speed: float | None = None
    """Floating-point operations a second of this device's products."""
    shares: bool = False
    """Whether the processes have one base model in memory; the bill of each has its part of it."""

    def measure_speed(self) -> None:
        """Times products on this device, in the dtype that the run computes in."""
        wide = self.cost.static.dtype == torch.float32 and not self.config.train.autocasts
        self.speed = products_per_second(torch.float32 if wide else torch.bfloat16)

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where they depend on rows that were not counted."""
        train = self.config.train
        if self.rows is None:
            return train.max_steps
        return optimizer_steps(train, self.rows.rows, self.spread.processes)

    @property
    def flops_per_step(self) -> float:
        """Of one optimizer step in all processes, with rows of the mean length."""
        sides = self.config.train.sides
        mean = self.rows.tokens_per_row / (self.length * sides) if self.rows else 1.0
        before = self.cost.flops_before
        seen = self.rows.image_tokens_per_row / self.rows.image_tokens if self.rows and self.rows.image_tokens else mean
        flops = (self.cost.flops - before) * mean + before * seen
        return flops * self.config.train.gradient_accumulation_steps * self.spread.processes

    @property
    def least_seconds(self) -> float | None:
        """Seconds of training if all of it ran at the speed of the products; real runs take longer."""
        if self.speed is None or self.steps is None:
            return None
        devices = self.spread.processes if self.device.gpu else 1
        return self.steps * self.flops_per_step / (self.speed * devices)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of one optimizer step, padding not counted."""
        train = self.config.train
        rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * self.spread.processes
        sides = train.sides
        return rows * (self.rows.tokens_per_row if self.rows else self.length * sides)

    @property
    def drawn_answers(self) -> int | None:
        """Answers that the base model gives before training, for pass rates; None where none, or rows not counted."""
        wanted = self.config.train.curriculum
        if wanted is None or wanted.samples is None or self.rows is None:
            return None
        return self.rows.rows * wanted.samples

    @property
    def memory(self) -> int:
        """Bytes that the run needs of the device: of a GPU for one process, of a machine for all of them."""
        return self.cost.bill.total * (1 if self.device.gpu else self.spread.processes)

    @property
    def host_memory(self) -> int | None:
        """Bytes of the machine at most, while the model is read; None where the machine itself trains."""
        if not self.device.gpu:
            return None
        readers = 1 if self.spread.cuts else self.spread.processes
        return readers * self.cost.exchange.whole + self.spread.processes * self.cost.bill.runtime

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return self.memory <= self.device.memory and self.disk.adapter <= self.disk.free

    def check(self) -> None:
        """Raises ResourceError where memory or disk does not suffice, with what would fit."""
        need, have = self.memory, self.device.memory
        if need > have:
            changes = " or ".join(f"{remedy} ({size(remedy.total)})" for remedy in self.remedies)
            fewer = "fewer processes, " if self.spread.processes > 1 and not self.device.gpu else ""
            todo = f"fits with {changes}" if changes else f"{fewer}a smaller model or a larger device is needed"
            raise ResourceError(
                f"training needs {size(need)} of memory{self._of_whom()}, but {self.device.name} has {size(have)}; "
                f"{todo}"
            )
        if self.disk.adapter > self.disk.free:
            raise ResourceError(
                f"output_dir {shown(self.config.output_dir, 300)}: the adapter takes {size(self.disk.adapter)}, but "
                f"the disk has {size(self.disk.free)} free; free some space"
            )

    def as_dict(self) -> dict[str, Any]:
        """Everything, in bytes, seconds and plain numbers."""
        cost, config = self.cost, self.config
        return {
            "model": config.model.name_or_path,
            "method": config.adapter.method,
            "parameters": {
                "trainable": cost.static.trainable_parameters,
                "total": cost.static.total_parameters,
            },
            "budget": None
            if self.budget is None
            else {"by": self.budget.by, "allowed": self.budget.allowed, "ranks": self.budget.ranks},
            "batch": {"rows": rows_of_batch(config.train), "longest_row": self.length},
            "memory": {
                **asdict(cost.bill),
                "total": cost.bill.total,
                "available": self.device.memory,
                "device": self.device.name,
                "fits": self.memory <= self.device.memory,
                "peak_in": cost.peak_in,
            },
            "processes": {
                "number": self.spread.processes,
                "strategy": None if self.spread.processes == 1 else self.spread.strategy,
                "memory": self.memory,
                "share_base": self.shares,
                "host_memory": self.host_memory,
                "sent_per_step": cost.exchange.sent,
            },
            "placement": None if self.placed is None else self.placed.weights,
            "remedies": [{"set": remedy.settings, "total": remedy.total} for remedy in self.remedies],
            "disk": asdict(self.disk),
            "data": self.rows.as_dict() if self.rows else None,
            "steps": self.steps,
            "pass_rates": self._pass_rates(),
            "tokens_per_step": round(self.tokens_per_step, 1),
            "flops_per_step": self.flops_per_step,
            "flops_per_second_of_products": self.speed,
            "least_seconds": self.least_seconds,
            "warnings": self.warnings,
        }

    def show(self, display: Display) -> None:
        """Prints the bill, then the rest."""
        for title, facts in self._tables():
            show_facts(display, title, facts)
        if self.budget is not None:
            display.console.print(rank_table(self.budget))
        for text in self.warnings:
            display.warn(text)

    def _of_whom(self) -> str:
        if self.spread.processes == 1:
            return ""
        return " in each process" if self.device.gpu else f" in {self.spread.processes} processes"

    def __repr__(self) -> str:
        need, fits = size(self.memory), "fits" if self.fits else "does not fit"
        return f"Plan({self.config.adapter.method}, {self.steps} steps, {need} of memory: {fits})"

    def _repr_html_(self) -> str:
        notes = [("warning", text) for text in self.warnings]
        ranks = "" if self.budget is None else self.budget._repr_html_()
        found = "".join(table(title, facts) for title, facts in self._tables())
        return found + ranks + (table("", notes) if notes else "")

    def _tables(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        cost, bill = self.cost, asdict(self.cost.bill)
        batch = rows_of_batch(self.config.train)
        parts = [(words, size(bill[part])) for part, words in _PARTS.items() if bill[part]]
        whole = [("total", size(cost.bill.total))]
        if self.memory != cost.bill.total:
            whole.append((f"of all {self.spread.processes} processes", size(self.memory)))
        whole.append((f"available, {self.device.name}", size(self.device.memory)))
        step = "a step" if self.spread.processes == 1 else "a step in each process"
        rows = "answers" if self.config.train.rewarded else "rows"
        if self.config.train.sides == 2:
            rows = "conversations, two of each pair,"
        title = f"peak memory of {step}, {batch} {rows} of {self.length} tokens; the peak is in {cost.peak_in}"
        yield title, parts + whole
        yield "the run", self._facts()
        if self.remedies:
            yield "changes that would fit", [(str(each), size(each.total)) for each in self.remedies]

    def _facts(self) -> list[tuple[str, str]]:
        static, train = self.cost.static, self.config.train
        share = 100 * static.trainable_parameters / static.total_parameters
        facts = [
            ("trained parameters", f"{static.trainable_parameters:,} of {static.total_parameters:,} ({share:.2f} %)")
        ]
        if self.placed is not None:
            parts = ", ".join(f"{size(each)} on {_device(name)}" for name, each in self.placed.weights.items())
            facts.append(("frozen weights between steps", parts))
        if self.rows is None:
            facts.append(("rows", "not on this machine, so not counted; rows of data.max_length are assumed"))
        else:
            counted = "" if self.rows.counted >= self.rows.rows else f", {self.rows.counted:,} of them counted"
            told = f"{self.rows.rows:,}, of {self.rows.tokens_per_row:,.0f} tokens on average{counted}"
            if self.rows.left_out:
                told += f"; {self.rows.left_out:,} longer ones are left out, by data.max_length"
            facts.append(("rows" if train.sides == 1 else "pairs", told))
        if self.steps is not None:
            facts.append(("optimizer steps", f"{self.steps:,} of {self.tokens_per_step:,.0f} tokens"))
        if self.rows is not None and self.steps is not None:
            seen: float = self.steps * train.per_device_train_batch_size * train.gradient_accumulation_steps
            if train.rewarded is not None:
                seen /= train.rewarded.num_generations * train.rewarded.num_iterations
            facts.append(("epochs", f"{train.num_train_epochs or seen / self.rows.rows:.2g}"))
        if (drawn := self._pass_rates()) is not None:
            told = f"{drawn['answers']:,} answers of the base model, {drawn['most_tokens']:,} tokens at most"
            facts.append(("pass rates, measured once", f"{told}; not counted in the time"))
        if self.spread.processes > 1:
            sent = size(self.cost.exchange.sent)
            told = f"{self.spread.processes}, {self.spread.strategy}; each sends {sent} a step"
            told += "; the base model is in memory once, a part in each bill" if self.shares else ""
            facts.append(("processes", told))
        if self.host_memory is not None:
            facts.append(("host memory at the start", f"at most {size(self.host_memory)}"))
        disk = self.disk
        facts.append(("adapter on disk", f"{size(disk.adapter)}, with optimizer {size(disk.checkpoint)}"))
        facts.append(("free there", size(disk.free)))
        if self.least_seconds is not None and self.speed is not None:
            basis = f"{self.flops_per_step:.2g} FLOP a step at the {self.speed:.2g} FLOP/s measured on this machine"
            facts.append(
                ("training takes at least", f"{duration(self.least_seconds)}; {basis}, evaluation not counted")
            )
        return facts

    def _pass_rates(self) -> dict[str, int] | None:
        """What the pass rates of a curriculum cost, if nobody has measured them yet."""
        wanted, answers = self.config.train.curriculum, self.drawn_answers
        if wanted is None or wanted.max_new_tokens is None or answers is None:
            return None
        return {"answers": answers, "most_tokens": answers * wanted.max_new_tokens}


def _device(name: str) -> str:
    return f"GPU {name}" if name.isdecimal() else shown(name)


def size(number: float) -> str:
    """Bytes as people read them."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.2f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
