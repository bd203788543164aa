"""What the parts of a run share: what it is, where it shows and stops, and what it notes for its report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dude_peft.config.schema import AdapterSection, RunConfig
from dude_peft.folder.run_folder import RunFolder

if TYPE_CHECKING:
    from dude_peft.machine.stop import Stop
    from dude_peft.training.progress import Display


@dataclass
class RunContext:
    """Handed to every part of one run."""

    config: RunConfig
    """Resolved; its adapter section changes once, where a budget becomes ranks (`settle`)."""
    folder: RunFolder
    strategy: str
    """Of several processes: ddp, fsdp2 or zero3."""
    display: Display
    stop: Stop
    seconds: dict[str, float] = field(default_factory=dict)
    """Of every phase."""
    warnings: list[str] = field(default_factory=list)
    held: ExitStack = field(default_factory=ExitStack)
    """What the run has until its end: the lock of its offload folder, its moment, Liger's kernels in transformers."""

    def settle(self, adapter: AdapterSection) -> None:
        """From here on the run has this adapter."""
        self.config = self.config.model_copy(update={"adapter": adapter})

    def warn(self, text: str) -> None:
        """Shows a warning and keeps it for the report."""
        self.warnings.append(text)
        self.display.warn(text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes how long the block takes."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
