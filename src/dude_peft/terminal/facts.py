"""Facts, each a name and a value: a table at a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from dude_peft.show import shown
from dude_peft.terminal.display import Display


def show_facts(display: Display, title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Prints the facts under their title."""
    title = shown(title, None)
    facts = [(shown(name, None), shown(value, None)) for name, value in facts]
    if not display.live:
        display.say(title)
        for name, value in facts:
            display.say(f"  {name}: {value}")
        return
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    display.console.print(table)
