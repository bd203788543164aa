"""The process that says what the adapter really does: the base model with the live adapter, run on prompts.

Started by `check.py` with one JSON object on standard input; writes token ids and logits of every prompt to a
safetensors file: `ids.N`, `live.N` under the adapter, `base.N` without it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from dude_peft.terminal.quiet import quiet_imports


def main() -> None:
    """Run the prompts."""
    request = json.loads(sys.stdin.read())
    with quiet_imports():
        from dude_peft.config.schema import ModelSection
        from dude_peft.model.load import load_model, locate
    source = ModelSection(**request["source"])
    model: Any = load_model(source, locate(source), request["quantization"], task_type=request["task_type"])
    ids = _token_ids(request["tokenizer"], request["prompts"], model.config.get_text_config())
    tensors = {f"ids.{i}": torch.tensor(row) for i, row in enumerate(ids)}
    tensors |= {f"base.{i}": _logits(model, row) for i, row in enumerate(ids)}
    model = _under(model, request["adapters"], request["allow_base_mismatch"])
    tensors |= {f"live.{i}": _logits(model, row) for i, row in enumerate(ids)}
    safetensors.torch.save_file(tensors, request["output"])


def _token_ids(tokenizer: str | None, prompts: list[str], config: Any) -> list[list[int]]:
    """The prompts as the model's tokenizer reads them; without one, as many arbitrary tokens."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(config.vocab_size, (32,), generator=generator).tolist() for _ in prompts]
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    limit = getattr(config, "max_position_embeddings", None)
    return [reader(prompt)["input_ids"][:limit] for prompt in prompts]


def _logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) float32; of a model that scores, (1,)."""
    model.eval()
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0].float()
    return found.contiguous()


def _under(model: Any, adapters: list[dict[str, Any]], mismatch: bool) -> nn.Module:
    from dude_peft.artifact.manifest import is_foreign_adapter
    from dude_peft.exporting.dense import dense_layer
    from dude_peft.tuner import frozen, load_adapter
    from dude_peft.tuner.foreign import load_foreign
    from dude_peft.tuner.layer import DudeLinear

    adapted: Any = model
    if len(adapters) == 1 and is_foreign_adapter(Path(adapters[0]["path"])):
        return load_foreign(adapted, adapters[0]["path"]).eval()
    for number, adapter in enumerate(adapters):
        adapted = load_adapter(adapted, adapter["path"], adapter_name=f"a{number}", allow_base_mismatch=mismatch)
    if not adapters:
        return adapted  # type: ignore[no-any-return]
    if len(adapters) == 1 and adapters[0]["weight"] == 1:
        return adapted.eval()  # type: ignore[no-any-return]
    # Several adapters, or a share of one: the sum of the changes, taken in memory.
    for module in adapted.modules():
        if isinstance(module, DudeLinear):
            base: Any = module.target()
            W0 = module.effective_weight([])
            changes = [
                adapter["weight"] * (module.effective_weight([f"a{number}"]) - W0)
                for number, adapter in enumerate(adapters)
                if f"a{number}" in module.r
            ]
            total = sum(changes, W0)
            if frozen.plain_weight(base) is None:
                module.base_layer = dense_layer(base, total.to(model.dtype))
                continue
            stored = frozen.as_stored(base, total.to(base.weight.dtype))
            module.give(nn.Parameter(stored, requires_grad=False))
    return adapted.unload().eval()  # type: ignore[no-any-return]


if __name__ == "__main__":
    from dude_peft.errors import DudeError

    try:
        main()
    except DudeError as error:  # `check.py` raises it again
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
