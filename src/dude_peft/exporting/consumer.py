"""The process that loads an export as its users will: stock transformers or stock PEFT without our package; llama.cpp.

Run as a script, by its path, with one JSON object on standard input; writes logits `out.N` of every prompt to a
safetensors file. The last prompt may have an image, whose pixels are those that the live adapter read.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


class _Absent:
    """Our package is not here, as it will not be where the export goes."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name.partition(".")[0] == "dude_peft":
            raise ModuleNotFoundError(f"{name} cannot be used to load an export", name=name)


def main() -> None:
    """Load the export and run it."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [
        entry for entry in sys.path if os.path.abspath(entry) != here
    ]  # our modules' names are not packages'
    import safetensors.torch
    import torch

    request = json.loads(sys.stdin.read())
    if request["kind"] != "gguf":
        sys.meta_path.insert(0, _Absent())
    prompts = safetensors.torch.load_file(request["ids"])
    ids = [prompts[f"ids.{i}"].tolist() for i in range(request["count"])]
    kind = request["kind"]
    if kind == "gguf":
        outputs = _gguf(request, ids)
    else:
        if kind == "merged":
            model: Any = _automatic(request["export"], scores=request["scores"]).from_pretrained(
                request["export"], trust_remote_code=False, dtype="auto"
            )
            own = _own_ids(request, model.config.get_text_config())
            ids = own + ids[len(own) :]  # what has an image was written by a processor
        else:
            import peft

            model = peft.PeftModel.from_pretrained(_base(request["base"], request["scores"]), request["export"])
        model.eval()
        for module in model.modules():
            # As dense.py has it: what bitsandbytes rounds in evaluation on CPUs is not in the export.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
            if hasattr(module, "init_8bit_state"):
                module.training = True
                _keep_scales(module)
        with torch.inference_mode():
            asked: list[dict[str, Any]] = [{"input_ids": torch.tensor([row])} for row in ids]
            asked[-1] |= {
                name.removeprefix("seen."): each for name, each in prompts.items() if name.startswith("seen.")
            }
            outputs = [model(**prompt).logits[0].float() for prompt in asked]
    tensors = {f"out.{i}": output.contiguous() for i, output in enumerate(outputs)}
    safetensors.torch.save_file(tensors, request["output"])


def _keep_scales(layer: Any) -> None:
    """On CPUs stock PEFT's DoRA loses the scales of 8-bit weights in its first forward, on GPUs it does not."""
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB

    def give_back(module: Any, inputs: Any) -> None:
        module.weight.SCB = scales

    layer.register_forward_pre_hook(give_back)


def _own_ids(request: dict[str, Any], config: Any) -> list[list[int]]:
    """The prompts through the export's own tokenizer, which has to read them as the base's does."""
    if not request["has_tokenizer"]:
        return []
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(request["export"], trust_remote_code=False)
    limit = getattr(config, "max_position_embeddings", None)
    return [reader(prompt)["input_ids"][:limit] for prompt in request["prompts"]]


def _base(base: dict[str, Any], scores: bool) -> Any:
    import torch
    import transformers

    source = {key: base[key] for key in ("gguf_file", "revision") if base[key] is not None}
    options: dict[str, Any] = dict(source)
    options["dtype"] = "auto" if base["dtype"] is None else getattr(torch, base["dtype"])
    if base["gguf_file"] is not None and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    quantization = base["quantization"]
    if quantization is not None:
        options["device_map"] = {"": "cpu"}
        from transformers.quantizers.auto import AutoQuantizationConfig

        stored = transformers.AutoConfig.from_pretrained(
            base["where"], revision=base["revision"], trust_remote_code=False
        )
        if getattr(stored, "quantization_config", None) is None:
            options["quantization_config"] = AutoQuantizationConfig.from_dict(quantization["config"])
    if scores:
        options |= {"num_labels": 1, "pad_token_id": base["pad_token_id"]}
    return _automatic(base["where"], scores=scores, **source).from_pretrained(
        base["where"], trust_remote_code=False, **options
    )


def _automatic(where: str, *, scores: bool = False, **options: Any) -> Any:
    """As `init.architecture.automatic_class` has it, which is not for us to import."""
    import transformers

    if scores:
        return transformers.AutoModelForSequenceClassification
    kind = type(transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **options))
    sees = kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if sees and kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _gguf(request: dict[str, Any], ids: list[list[int]]) -> list[Any]:
    """llama.cpp's logits; where its own tokenizer reads a prompt otherwise, of what it reads."""
    from pathlib import Path

    import torch

    from dude_peft.exporting import llama_library

    path = Path(request["export"])
    if request["has_tokenizer"]:
        own = llama_library.tokens(path, request["prompts"])
        # A first token that begins every text is the only thing that may come before.
        ids = [row if read[: len(row)] in (row, row[1:]) else read for row, read in zip(ids, own, strict=True)]
    return [torch.from_numpy(found) for found in llama_library.logits(path, ids)]


if __name__ == "__main__":
    main()
