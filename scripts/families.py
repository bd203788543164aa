#!/usr/bin/env python
"""Writes docs/families.md: what works for every model family, tried on tiny random models.

python scripts/families.py [FAMILY ...]     # some families: prints their rows and writes nothing
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from families import FAMILIES  # noqa: E402
from family_table import cells_or_fault, markdown  # noqa: E402

_PAGE = """\
# Model families

Each family of transformers is a tiny model with random weights, tested with everything that DuDe does
(`python scripts/families.py` writes this page; `tests/test_families.py` repeats the tests). "yes" means that the result
matches the live adapter. A number refers to a note below, with the error or warning.

- train: `get_peft_model` with `target_modules="all-linear"` starts as the base model bit by bit; two steps move every
  layer that the batch depends on, and nothing of the base.
- save, load: `save_pretrained` and `dude verify`; `load_adapter` and stock `peft.PeftModel` give the same logits.
- merge: `merge_and_unload`, and `dude merge` on the checkpoint, whose tensors keep their names.
- export: `dude export --to lora:8` in stock PEFT is closer to the adapter than the base model is.
- plan: `dude plan` counts the trained parameters and the memory. init: `dude init` gives the bits of `get_peft_model`.

"""


def main() -> None:
    """Take the families through, and write the page."""
    names = sys.argv[1:] or list(FAMILIES)
    rows = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = cells_or_fault(name, Path(folder))
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    table = markdown(rows)
    if sys.argv[1:]:
        print(table)
        return
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, on a CPU."
    page = ROOT / "docs" / "families.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(f"{_PAGE}{table}\nWith {versions}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
