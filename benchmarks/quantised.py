"""Quantisation error of `dude init --quantize` against quantising the weights themselves, on SmolLM2-135M.

    python benchmarks/quantised.py --json benchmarks/results/DATE-quantised.json

Errors of the weights are ||what is applied - W0|| / ||W0||, KL is from the full-precision model to the start, nats a
token, over the prompts of `exporting/check.py`. "m = ||W0||" is the same start with its rows rescaled to the norms of
W0, the other choice there is. int8 also rounds the activations (LLM.int8), which no choice of weights undoes: kl_dense
is from the quantised model to the dense model with the same weights, as `dude merge` writes it.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import add_model, arguments, console, finish, numbers, set_threads, show
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from dude_peft import load_adapter
from dude_peft.config.schema import ModelSection
from dude_peft.core.magnitude import row_norm
from dude_peft.exporting.check import PROMPTS
from dude_peft.exporting.dense import densify_
from dude_peft.init.fold import fold
from dude_peft.model.load import load_model, load_tokenizer, locate
from dude_peft.tuner import DudeLinear

COLUMNS = ["residual", "residual_worst", "plain", "plain_worst", "kl", "kl_plain", "kl_norm_of_W0", "kl_dense"]
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=1)
    add_model(parser)
    parser.add_argument("--layers", type=int, default=None, help="decoder layers to keep; default: all")
    parser.add_argument("--ranks", type=numbers, default=[16, 64, 128])
    parser.add_argument("--formats", default="nf4,int8")
    settings = parser.parse_args()
    set_threads(settings)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="dude-quantised-") as scratch:
        results = measured(settings, Path(scratch))
    notes = [
        f"bitsandbytes {version('bitsandbytes')}; the weights are a 4-bit GGUF file's (Q4_1), dequantised to float32; "
        "one model, no seeds are involved."
    ]
    show("Quantised residual against quantised weight", results, COLUMNS)
    console.print(notes[0])
    finish("quantised", settings, results, notes)


def measured(settings: Any, scratch: Path) -> dict[str, dict[str, float]]:
    """One row for each format and rank."""
    source = ModelSection(name_or_path=settings.model, gguf_file=settings.gguf_file or None)
    model: Any = load_model(source, locate(source))
    if settings.layers is not None:
        model.model.layers = model.model.layers[: settings.layers]
        model.config.num_hidden_layers = settings.layers
    folder = scratch / "model"
    model.save_pretrained(folder)
    load_tokenizer(source, locate(source)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    exact = outputs(AutoModelForCausalLM.from_pretrained(folder), ids)
    norms = {name: row_norm(weight) for name, weight in model.named_parameters() if weight.ndim == 2}
    rows = {}
    for form in settings.formats.split(","):
        quantised = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**CONFIGS[form])
        )
        plain_outputs = outputs(quantised, ids)
        densify_(quantised)
        kl_plain, kl_dense = kl(exact, plain_outputs), kl(plain_outputs, outputs(quantised, ids))
        for r in settings.ranks:
            place = scratch / f"{form}-{r}"
            options = {"method": "dude", "r": r, "lora_alpha": r, "target_modules": "all-linear"}
            errors = fold(str(folder), place / "adapter", place / "base", options, form, quiet=True)
            start = load_adapter(AutoModelForCausalLM.from_pretrained(place / "base"), place / "adapter")
            residual, plain = [e.residual for e in errors], [e.plain for e in errors]
            rows[f"{form}, r = {r}"] = row = {
                "residual": statistics.mean(residual),
                "residual_worst": max(residual),
                "plain": statistics.mean(plain),
                "plain_worst": max(plain),
                "kl": kl(exact, outputs(start, ids)),
                "kl_plain": kl_plain,
                "kl_dense": kl_dense,
            }
            for layer in start.modules():
                if isinstance(layer, DudeLinear):
                    t = layer.tensors("default")
                    with torch.no_grad():
                        t.dm.copy_(norms[f"{layer.layer_name}.weight"] - t.m0.double())  # type: ignore[union-attr]
            row["kl_norm_of_W0"] = kl(exact, outputs(start, ids))
            console.print(f"{form}, r = {r}: {row}")
    return rows


def outputs(model: Any, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probabilities of every prompt's next tokens."""
    model.eval()
    with torch.no_grad():
        return [model(input_ids=row).logits[0].double().log_softmax(-1) for row in ids]


def kl(p: list[torch.Tensor], q: list[torch.Tensor]) -> float:
    """Mean KL(p || q) over all tokens."""
    each = [(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]
    return float(torch.cat(each).mean())


if __name__ == "__main__":
    main()
