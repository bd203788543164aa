"""README.md of the adapter that a run has just saved: what `dude train` hands to the run, and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def card_of_run(adapter: Path, report: Mapping[str, Any]) -> str:
    """The model card of an adapter.

    Args:
        adapter: its folder.
        report: what will be in the run's report.json.

    Raises:
        ArtifactError: the adapter is damaged.
    """
    from dude_peft.exporting.adapter import open_adapter
    from dude_peft.exporting.card import model_card

    return model_card(open_adapter(adapter), report)
