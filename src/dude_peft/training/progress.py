"""What a run shows beyond its progress: tables of its result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from dude_peft.folder.record import Answer, Score
from dude_peft.show import shown
from dude_peft.terminal import display

if TYPE_CHECKING:
    from dude_peft.training.budget import Spent

_LONGEST_ANSWER = 700
_OF_PAIRS = {
    "kl": "KL to the base model, estimated",
    "rewards/accuracies": "pairs ranked right, by reward",
    "rewards/margins": "margin of the rewards",
    "logps/accuracies": "pairs whose chosen answer is likelier",
}


class Display(display.Display):
    """The display of a training run."""

    def before_after(self, before: Score, after: Score) -> None:
        """The run's result as a table."""
        table = Table(title="Held-out rows", title_justify="left")
        table.add_column("")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        loss = f"{after.loss - before.loss:+.3f}"
        table.add_row(f"loss ({after.unit})", f"{before.loss:.3f}", f"{after.loss:.3f}", loss)
        if before.preference and after.preference:
            labelled = {"rewards/accuracies": "answers judged right, by reward"}
            titles = _OF_PAIRS | (labelled if "answers" in after.preference else {})
            for name, title in titles.items():
                if name not in before.preference or name not in after.preference:
                    continue
                old, new = before.preference[name], after.preference[name]
                table.add_row(title, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
        for name, new in (after.rewards or {}).items():
            title = "mean reward" if name == "reward" else f"  {name.split('/')[1]}"
            old = (before.rewards or {}).get(name, math.nan)
            table.add_row(title, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
        if after.rows:
            change = 100 * (after.right - before.right) / after.rows
            table.add_row("exact match", _share(before), _share(after), f"{change:+.1f} points")
            table.add_row("  95 % interval", _interval(before), _interval(after), "")
        self.console.print(table)

    def general(self, before: dict[str, float], after: dict[str, float]) -> None:
        """What training did to general rows, as `GeneralTest.measured` has it."""
        table = Table(title="Held-out general rows", title_justify="left")
        table.add_column("")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        change = f"{after['loss'] - before['loss']:+.3f}"
        table.add_row("loss (nats a token)", f"{before['loss']:.3f}", f"{after['loss']:.3f}", change)
        for title, name in (("KL(base || tuned)", "kl_base_tuned"), ("KL(tuned || base)", "kl_tuned_base")):
            table.add_row(title, f"{before[name]:.4f}", f"{after[name]:.4f}", "")
        self.console.print(table)

    def ranks(self, spent: Spent) -> None:
        """What a budget was spent on."""
        self.console.print(rank_table(spent))

    def samples(self, before: tuple[Answer, ...], after: tuple[Answer, ...]) -> None:
        """Answers of the model before and after, side by side."""
        for number, (old, new) in enumerate(zip(before, after, strict=True), start=1):
            table = Table(
                title=Text(f"{number}. {_lines(new.question)}\nexpected: {_lines(new.expected)}"),
                title_justify="left",
                title_style="",
                expand=True,
            )
            for title, answer in (("before", old), ("after", new)):
                table.add_column(f"{title}: {'right' if answer.right else 'wrong'}", ratio=1)
            table.add_row(Text(_lines(old.text)), Text(_lines(new.text)))
            self.console.print(table)


def rank_table(spent: Spent) -> Table:
    """The rank of every layer that a budget was spent on: a row a block, a column a module."""
    blocks, parts, ranks = spent.grid()
    common = {block.rpartition(".")[0] for block in blocks}
    shared = common.pop() if len(common) == 1 else ""
    # Narrow: the seven linears of a Llama block fit into 80 columns.
    table = Table(
        title=Text(shown(spent.line(), None)),
        title_justify="left",
        title_style="",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column(Text(shown(shared, 60)), no_wrap=True)
    for part in parts:
        table.add_column(Text(shown(part.rpartition(".")[2], 40)), justify="right", overflow="fold")
    for block, row in zip(blocks, ranks, strict=True):
        label = block.removeprefix(f"{shared}.") if shared else block
        table.add_row(Text(shown(label, 60)), *("" if r is None else str(r) for r in row))
    return table


def _share(score: Score) -> str:
    return f"{score.right}/{score.rows} = {100 * score.right / score.rows:.1f} %"


def _interval(score: Score) -> str:
    low, high = score.interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _lines(text: str) -> str:
    """Foreign text for a terminal: line breaks stay, other control characters are escaped."""
    cut = text if len(text) <= _LONGEST_ANSWER else text[:_LONGEST_ANSWER] + " …"
    return "\n".join(shown(line, None) for line in cut.splitlines())
