"""`dude merge` of an adapter that stock PEFT made: PEFT's own merge, proved as any other export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from dude_peft.artifact.companions import companions, copy_files
from dude_peft.artifact.durable import disk_errors, replace_file, whole_folder
from dude_peft.artifact.json_text import json_text
from dude_peft.core.finite import first_not_finite
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.exporting.base import source_of
from dude_peft.exporting.check import Difference, beyond_rounding, record, run_consumer, run_live, summary
from dude_peft.exporting.foreign import ForeignAdapter
from dude_peft.model.architecture import fetch_checkpoint
from dude_peft.model.load import load_model, locate
from dude_peft.model.processor import own_processor
from dude_peft.show import reason_of, shown
from dude_peft.terminal.display import Display
from dude_peft.tuner.foreign import load_foreign
from dude_peft.tuner.same_base import with_remedy
from dude_peft.version import __version__


def merge_foreign(
    adapter: ForeignAdapter, output: Path, base: str | None, *, verify: bool, display: Display
) -> dict[str, Any]:
    """Write the base model with the adapter in it, a plain model, and compare it with the live adapter.

    Args:
        adapter: what is merged.
        output: folder that is made; nothing is there unless everything went well.
        base: base model; None takes the adapter's own.
        verify: load the merged model in a fresh process, run prompts and compare.
        display: where progress is shown.

    Returns:
        What its dude_export.json says.

    Raises:
        ConfigError: PEFT cannot merge such an adapter.
        ArtifactError: another base model.
        NumericsError: the merged model is not what the adapter is.
    """
    source = source_of(adapter, base, None)
    where = locate(source)
    if source.gguf_file is not None:
        raise ConfigError(f"{adapter.method} on a GGUF file cannot be merged; give a checkpoint with --base")
    original = Path(where) if Path(where).is_dir() else fetch_checkpoint(where, source.revision)
    with disk_errors(output), whole_folder(output) as folder:
        scratch = folder / ".work"
        scratch.mkdir()
        with display.waiting(f"merging {adapter.method}"):
            dtype = _write(adapter, source, where, original, folder)
        made: dict[str, Any] = {"verified": False}
        if verify:
            tokenizer = next((str(at) for at in (adapter.folder, original) if (at / _TOKENIZER).is_file()), None)
            parts = [{"path": str(adapter.folder.absolute()), "weight": 1.0}]
            with display.waiting("running the live adapter and the merged model"):
                processor = own_processor(adapter.folder)
                live = run_live(source.model_dump(), parts, tokenizer, False, scratch, processor=processor)
                found = run_consumer("merged", folder, live, {}, scratch)
            display.say(summary(found))
            assert isinstance(found, Difference), "a model that writes"
            if live.blind:
                display.warn(f"compared on text alone: {shown(live.blind, 300)}")
            if fault := beyond_rounding(found, {dtype}):
                raise NumericsError(f"PEFT's merge of {adapter.method} is not what the adapter does: its {fault}")
            made = {"verified": True, "difference": record(found)}
        else:
            display.warn("not verified: --no-verify")
        content = {
            "dude_version": __version__,
            "to": "merged",
            "base": source.name_or_path,
            "adapters": [{"method": adapter.method, "r": None, "weight": 1.0}],
            **made,
        }
        replace_file(folder / "dude_export.json", (json_text(content, indent=1) + "\n").encode())
        shutil.rmtree(scratch)
    return content


_TOKENIZER = "tokenizer_config.json"


def _write(adapter: ForeignAdapter, source: Any, where: str, original: Path, folder: Path) -> torch.dtype:
    model: Any = load_model(source, where)
    with with_remedy("give the base model it was trained on with --base"):
        adapted: Any = load_foreign(model, adapter.folder)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # each tuner has its own way to say that it cannot
        reason = reason_of(error, 200)
        raise ConfigError(
            f"PEFT does not merge {adapter.method} into this model ({reason}); use it as it is"
        ) from error
    if lost := first_not_finite(merged.named_parameters()):
        raise NumericsError(f"the merged weight {shown(lost, 200)} is not finite; choose another adapter")
    merged.save_pretrained(folder)
    copy_files(original, folder, companions(original))
    dtype: torch.dtype = merged.dtype
    return dtype
