"""How what a model card describes is loaded: Python that runs as it stands, and commands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dude_peft.exporting.adapter import SavedAdapter
from dude_peft.task_types import SCORES
from dude_peft.terminal.next_steps import word

_PACKAGE = "package:"
_AUTOMATIC = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
_BITSANDBYTES = (
    "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant",
)  # fmt: skip
_CAUSAL = "AutoModelForCausalLM"
_SEES = "AutoModelForImageTextToText"


def usage(
    adapter: SavedAdapter,
    place: str,
    model: Mapping[str, Any],
    export: Mapping[str, Any] | None,
    architecture: str = "",
) -> tuple[str, list[str]]:
    """Lines of Python that load it, and of a shell that talk to it; empty where there are none.

    Args:
        adapter: what the card is about, or what was exported.
        place: folder or hub id where readers find it.
        model: section `model` of the run's configuration, as far as it is known.
        export: what was exported, as in dude_export.json; None for the adapter itself.
        architecture: class of the base model, as far as it is known.
    """
    kind = str(export.get("to", "")) if export is not None else ""
    automatic = _AUTOMATIC.get(str(adapter.config.task_type), _seeing(architecture) or _CAUSAL)
    speaks = automatic in (_CAUSAL, _SEES)
    code = bool(model.get("trust_remote_code"))
    if kind.startswith("gguf"):
        return "", []
    if kind == "merged":
        lines = [f"from transformers import {automatic}", "", f"model = {automatic}.from_pretrained({place!a})"]
        return "\n".join(lines), _commands(place, []) if speaks else []
    imports = [f"from transformers import {automatic}"]
    name = adapter.config.base_model_name_or_path or "BASE_MODEL"
    where = ascii(name)
    if name.startswith(_PACKAGE):
        # Without an import of the package: only its files are needed, and what it needs itself may be missing.
        imports.insert(0, "from importlib.util import find_spec\n")
        where = f"find_spec({name.removeprefix(_PACKAGE)!a}).submodule_search_locations[0]"
    gguf = model.get("gguf_file")
    scores = adapter.config.task_type == SCORES and automatic == _AUTOMATIC[SCORES]
    options: dict[str, Any] = {
        "num_labels": adapter.labels("score", "classifier") if scores else None,
        "pad_token_id": adapter.padding if scores else None,
        "gguf_file": gguf,
        "revision": adapter.config.revision,
        "trust_remote_code": code or None,
    }
    quantised = _quantised(adapter, model)
    if adapter.quantization is None:
        options["dtype"] = adapter.record.dtype or "auto"
    elif quantised:
        options["dtype"] = str(adapter.quantization["dtype"])
        imports += quantised[0]
    given = "".join(f", {key}={value!a}" for key, value in options.items() if value is not None)
    given += f", quantization_config={quantised[1]}" if quantised else ""
    base = f"base = {automatic}.from_pretrained({where}{given})"
    stock = f"peft.PeftModel.from_pretrained(base, {place!a})"
    if export is not None:
        return "\n".join(["import peft", *imports, "", base, f"model = {stock}"]), []
    without = f"# Without DuDe, in place of the last line: import peft; model = {stock}"
    lines = [
        *imports,
        "",
        "from dude_peft import load_adapter",
        "",
        base,
        f"model = load_adapter(base, {place!a})",
        *([without] if adapter.config.is_stock else []),
    ]
    commands = [] if code or not speaks else _commands(place, ["--gguf-file", str(gguf)] if gguf else [])
    return "\n".join(lines), commands


def _seeing(architecture: str) -> str | None:
    """The automatic class of a model that reads images beside text, and that no other class of text makes."""
    from transformers.models.auto import modeling_auto as known

    causal = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return (
        _SEES
        if architecture in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() and (architecture not in causal)
        else None
    )


def _quantised(adapter: SavedAdapter, model: Mapping[str, Any]) -> tuple[list[str], str] | None:
    """Imports, and the quantisation that the run asked for; None where the checkpoint is loaded as it is stored."""
    asked = model.get("quantization")
    if adapter.quantization is None or not isinstance(asked, Mapping) or asked.get("method") == "none":
        return None
    config = adapter.quantization["config"]
    if config.get("quant_method") == "torchao":
        # A name, and nothing else that a file may say there.
        named = re.search(r'"_type": "([A-Za-z0-9]+Config)"', json.dumps(config.get("quant_type")))
        if named is None:
            return None
        kind = named[1]
        imports = ["from transformers import TorchAoConfig", f"from torchao.quantization import {kind}"]
        return imports, f"TorchAoConfig({kind}())"
    given = ", ".join(f"{name}={config[name]!a}" for name in _BITSANDBYTES if config.get(name))
    return ["from transformers import BitsAndBytesConfig"], f"BitsAndBytesConfig({given})"


def _commands(place: str, options: list[str]) -> list[str]:
    named = " ".join(map(word, [place, *options]))
    return [f"dude chat {named}", f"dude generate {named} 'Who are you?'"]
