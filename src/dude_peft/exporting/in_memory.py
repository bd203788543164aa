"""Merging in memory, for adapters of experts: most checkpoints keep these one by one, and the model in one tensor.

transformers makes one of the other when it loads and saves a model, so that the folder looks as its own checkpoints do.
It needs the memory of the whole model.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dude_peft.artifact.companions import companions, copy_files
from dude_peft.core.finite import first_not_finite
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.exporting.base import Base
from dude_peft.exporting.merge import Weighted
from dude_peft.model.load import load_model
from dude_peft.show import shown
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.load import load_adapter
from dude_peft.tuner.same_base import with_remedy


@torch.no_grad()
def write_in_memory(base: Base, adapters: Sequence[Weighted], folder: Path, *, allow_base_mismatch: bool) -> None:
    """Write the merged model into an empty folder.

    Args:
        base: the base model.
        adapters: at least one.
        folder: where it goes.
        allow_base_mismatch: take a base with other weights.

    Raises:
        ArtifactError: the base is another one.
        ConfigError: a module that was trained in full, and several adapters.
        NumericsError: a merged weight overflows its dtype.
    """
    source = base.source.model_copy(update={"name_or_path": str(base.folder), "gguf_file": None, "revision": None})
    model: Any = load_model(source, str(base.folder), task_type=base.task_type)
    # The dense equal of a quantised base has been compared before it was written.
    allowed = allow_base_mismatch or base.quantization is not None
    with with_remedy("give the base model it was trained on with --base"):
        for number, weighted in enumerate(adapters):
            model = load_adapter(model, weighted.adapter.folder, f"a{number}", allow_base_mismatch=allowed)
    if len(adapters) == 1 and adapters[0].weight == 1:
        plain = model.merge_and_unload()
    else:
        _check_no_whole(adapters)
        weights = {f"a{number}": weighted.weight for number, weighted in enumerate(adapters)}
        for layer in model.modules():
            if isinstance(layer, DudeLinear):
                layer.put_sum(weights)
        plain = model.unload()
    lost = first_not_finite(plain.named_parameters())
    if lost is not None:
        raise NumericsError(f"the merged weight of '{shown(lost)}' overflows {plain.dtype}; choose a base in float32")
    into, out = plain.get_input_embeddings(), plain.get_output_embeddings()
    if out is not None and out.weight.data_ptr() != into.weight.data_ptr():
        plain.config.get_text_config().tie_word_embeddings = plain.config.tie_word_embeddings = False
    with contextlib.redirect_stderr(io.StringIO()):  # its bar
        plain.save_pretrained(folder)
    copy_files(base.folder, folder, companions(base.folder))
    own = adapters[0].adapter
    if len(adapters) == 1 and (own.folder / "tokenizer_config.json").is_file():
        copy_files(own.folder, folder, own.tokenizer())


def _check_no_whole(adapters: Sequence[Weighted]) -> None:
    for weighted in adapters:
        if name := next((name for name, _ in weighted.adapter.whole()), None):
            raise ConfigError(
                f"adapter {shown(weighted.adapter.folder, 300)} has '{shown(name)}', trained in full, which cannot be "
                "combined; merge this adapter on its own"
            )
