"""How far every export is from the live adapter after real training steps, beside PEFT's own conversions.

    python benchmarks/export.py --json benchmarks/results/DATE-export.json

Small random models of five architectures, trained on a text until the adapter matters. Each export is loaded as its
consumer does (stock transformers, stock PEFT) and compared on that text and another: largest difference of logits,
relative to the largest logit, and mean KL(live || export) in nats a token, also as a share of KL(live || base). PEFT's
rows are PEFT's pissa + use_dora, trained the same way and compared with their own live model: `save_pretrained` with
`path_initial_model_for_weight_conversion` as its documentation says, `save_as_lora`, and `merge_and_unload`.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import arguments, finish, set_threads, show
from peft import LoraConfig, PeftModel, get_peft_model, save_as_lora
from torch import Tensor

from dude_peft import DudeConfig
from dude_peft.exporting.check import compare
from dude_peft.exporting.run import export

RANKS = (8, 16, 32, 64)
COMMON = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}


def models() -> dict[str, Any]:
    """Name -> a function that makes the model."""
    hf = transformers
    return {
        "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, **HEADS)),
        "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**COMMON, **HEADS, head_dim=64)),
        "Gemma3, tied": lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**COMMON, **HEADS, head_dim=64, tie_word_embeddings=True)
        ),
        "GPT-2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=512, n_embd=256, n_layer=3, n_head=4, n_positions=256)
        ),
        "Qwen3-MoE, dense targets": lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **COMMON, **HEADS, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128
            )
        ),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    settings = parser.parse_args()
    set_threads(settings)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = {}
    for dtype in settings.dtypes.split(","):
        for name, make in models().items():
            title = f"{name}, {dtype}, r = {settings.r}, {settings.steps} steps"
            # PEFT's DoRA would take the experts' stacked tensors too, and fail.
            targets: Any = ["q_proj", "k_proj", "v_proj", "o_proj"] if "MoE" in name else "all-linear"
            rows = dict(measured(make, getattr(torch, dtype), targets, settings))
            show(title, rows, ["logits", "kl", "kl_worst", "share", "agreement"])
            results[title] = rows
    finish("export", settings, results)


def measured(make: Any, dtype: torch.dtype, targets: Any, settings: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Every export of one model."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make().to(dtype).save_pretrained(folder / "base")
        common = {"r": settings.r, "lora_alpha": settings.r, "target_modules": targets, "task_type": "CAUSAL_LM"}
        model = get_peft_model(load(folder / "base"), DudeConfig(**common))
        train(model, settings.steps)
        live = outputs(model)
        model.save_pretrained(folder / "adapter")
        for to in ("merged", "peft", *(f"lora:{rank}" for rank in RANKS)):
            out = folder / to.replace(":", "-")
            export(folder / "adapter", to, out, verify=False, quiet=True)
            loaded = load(out) if to == "merged" else PeftModel.from_pretrained(load(folder / "base"), str(out))
            yield f"DuDe, {to}", difference(live, loaded, folder)
        yield from pefts_own(folder, common, settings)


def pefts_own(folder: Path, common: dict[str, Any], settings: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """PEFT's conversions of its pissa + use_dora, against its own live model."""
    theirs = get_peft_model(load(folder / "base"), LoraConfig(**common, use_dora=True, init_lora_weights="pissa"))
    initial = folder / "initial"
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(initial)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    train(theirs, settings.steps)
    live = outputs(theirs)
    attempts = {
        "PEFT, converted to a LoRA": lambda out: theirs.save_pretrained(
            out, path_initial_model_for_weight_conversion=str(initial)
        ),
        "PEFT, save_as_lora 64": lambda out: save_as_lora(out, theirs, rank=64),
    }
    for name, save in attempts.items():
        out = folder / name.replace(" ", "-")
        try:
            save(out)
            loaded = PeftModel.from_pretrained(load(folder / "base"), str(out))
            yield name, difference(live, loaded, folder)
        except Exception as error:
            yield name, {"error": f"{type(error).__name__}: {error}"[:200]}  # type: ignore[dict-item]
    yield "PEFT, merge_and_unload", difference(live, copy.deepcopy(theirs).merge_and_unload(), folder)


def load(folder: Path) -> Any:
    """A saved model, in its own dtype."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def train(model: Any, steps: int) -> None:
    """Learn one text by heart."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = tokens(0)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def tokens(seed: int) -> Tensor:
    """(4, 64) token ids."""
    return torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(seed))


def outputs(model: Any) -> Tensor:
    """Logits on the text that was learnt and on another."""
    with torch.no_grad():
        return torch.cat([model(input_ids=tokens(seed)).logits.float().flatten(0, 1) for seed in (0, 1)])


def difference(live: Tensor, export: Any, folder: Path) -> dict[str, float]:
    """What `dude export` itself reports."""
    base = outputs(load(folder / "base"))
    found = compare({"live.0": live, "base.0": base}, {"out.0": outputs(export)}, 1)
    return {
        "logits": found.logits,
        "kl": found.kl_tuned_export,
        "kl_worst": found.kl_tuned_export_worst,
        "share": found.kl_tuned_export / found.kl_tuned_base,
        "agreement": found.agreement,
    }


if __name__ == "__main__":
    main()
