"""The process that says what the adapter really does: the base model with the live adapter, run on prompts.

Started by `check.py` with one JSON object on standard input; writes token ids and logits of every prompt to a
safetensors file: `ids.N`, `live.N` under the adapter, `base.N` without it. Where the model reads images, the last
prompt has one, and what is read of it beside the ids is there as `seen.NAME`; where the model cannot be shown one, the
file's metadata say why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from dude_peft.errors import ConfigError, DataError
from dude_peft.task_types import CAUSAL
from dude_peft.terminal.quiet import quiet_imports


def main() -> None:
    """Run the prompts."""
    request = json.loads(sys.stdin.read())
    with quiet_imports():
        from dude_peft.config.schema import ModelSection
        from dude_peft.exporting.picture_prompt import picture_prompt
        from dude_peft.model.load import load_model, locate
    source = ModelSection(**request["source"])
    model: Any = load_model(source, locate(source), request["quantization"], task_type=request["task_type"])
    reader = _tokenizer(request["tokenizer"])
    ids = _token_ids(reader, request["prompts"], model.config.get_text_config())
    prompts = [{"input_ids": torch.tensor([row])} for row in ids]
    blind = ""
    if request["task_type"] == CAUSAL:
        files_at = None if request["processor"] is None else Path(request["processor"])
        try:
            seen = picture_prompt(source, locate(source), model, reader, files_at)
        except (ConfigError, DataError) as error:
            seen, blind = {}, str(error)
        prompts += [seen] if seen else []
    tensors = {f"ids.{i}": prompt["input_ids"][0].contiguous() for i, prompt in enumerate(prompts)}
    for name, tensor in prompts[-1].items():
        tensors |= {f"seen.{name}": tensor.contiguous()} if name != "input_ids" else {}
    tensors |= {f"base.{i}": _logits(model, prompt) for i, prompt in enumerate(prompts)}
    model = _under(model, request["adapters"], request["allow_base_mismatch"])
    tensors |= {f"live.{i}": _logits(model, prompt) for i, prompt in enumerate(prompts)}
    safetensors.torch.save_file(tensors, request["output"], {"blind": blind})


def _tokenizer(folder: str | None) -> Any:
    if folder is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _token_ids(reader: Any, prompts: list[str], config: Any) -> list[list[int]]:
    """The prompts as the model's tokenizer reads them; without one, as many arbitrary tokens."""
    if reader is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(config.vocab_size, (32,), generator=generator).tolist() for _ in prompts]
    limit = getattr(config, "max_position_embeddings", None)
    return [reader(prompt)["input_ids"][:limit] for prompt in prompts]


def _logits(model: nn.Module, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """(tokens, vocabulary) float32; of a model that scores, (1,)."""
    model.eval()
    with torch.inference_mode():
        found: torch.Tensor = model(**prompt).logits[0].float()
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
