"""The process that loads an export as its users will: stock transformers, stock PEFT, llama.cpp; never our package.

Run as a script, by its path, with one JSON object on standard input; writes logits `out.N` of every prompt to a
safetensors file.
"""

from __future__ import annotations

import json
import sys
from typing import Any


class _Absent:
    """Our package is not here, as it will not be where the export goes."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name.partition(".")[0] == "dude_peft":
            raise ModuleNotFoundError(f"{name} is not for the consumer of an export", name=name)


def main() -> None:
    """Load the export and run it."""
    sys.path[:] = [entry for entry in sys.path if not entry.rstrip("/\\").endswith("export")]  # this script's folder
    sys.meta_path.insert(0, _Absent())
    import safetensors.torch
    import torch
    import transformers

    request = json.loads(sys.stdin.read())
    prompts = safetensors.torch.load_file(request["ids"])
    ids = [prompts[f"ids.{i}"].tolist() for i in range(request["count"])]
    kind = request["kind"]
    if kind == "gguf":
        tensors = _gguf(request["export"], ids)
    else:
        if kind == "merged":
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(request["export"], dtype="auto")
            ids = _own_ids(request, model.config.get_text_config()) or ids
        else:
            import peft

            model = peft.PeftModel.from_pretrained(_base(request["base"]), request["export"])
        model.eval()
        with torch.inference_mode():
            outputs = [model(input_ids=torch.tensor([row])).logits[0].float().contiguous() for row in ids]
        tensors = {f"out.{i}": output for i, output in enumerate(outputs)}
    safetensors.torch.save_file(tensors, request["output"])


def _own_ids(request: dict[str, Any], config: Any) -> list[list[int]]:
    """The prompts through the export's own tokenizer, which has to read them as the base's does."""
    if not request["has_tokenizer"]:
        return []
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(request["export"])
    limit = getattr(config, "max_position_embeddings", None)
    return [reader(prompt)["input_ids"][:limit] for prompt in request["prompts"]]


def _base(base: dict[str, Any]) -> Any:
    import torch
    import transformers

    options: dict[str, Any] = {key: base[key] for key in ("gguf_file", "revision") if base[key] is not None}
    options["dtype"] = "auto" if base["dtype"] is None else getattr(torch, base["dtype"])
    if base["gguf_file"] is not None and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(base["where"], **options)


def _gguf(path: str, ids: list[list[int]]) -> dict[str, Any]:
    import contextlib
    import os

    import llama_cpp
    import torch

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        model = llama_cpp.Llama(path, n_ctx=max(map(len, ids)), logits_all=True, verbose=False)
    outputs = {}
    for number, row in enumerate(ids):
        model.reset()
        model.eval(row)
        outputs[f"out.{number}"] = torch.from_numpy(model.scores[: len(row)]).float().clone()
    return outputs


if __name__ == "__main__":
    main()
