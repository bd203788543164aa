"""What is compared: one frozen model or layer under every adapter, all with the same base weights, rank and alpha.

PEFT's own adapters are made exactly as its users make them (adapters in float32 whatever the base). Every adapter is
moved a little away from its start, so that no case profits from zeros.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft.mapping
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dude_peft import DudeConfig

BASELINE = "PEFT LoRA"
GROWTH = {
    "rank": (8, 16, 32, 64, 128),
    "tokens": (128, 256, 512, 1024),
    "width": (256, 512, 768, 1024),
    "depth": (2, 4, 8, 12),
}


def common_settings(r: int) -> dict[str, Any]:
    """What all adapters have in common."""
    return {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}


def configurations(r: int) -> dict[str, Callable[[], Any]]:
    """Name of a case -> its adapter's configuration; None is the frozen base."""
    common = common_settings(r)
    return {
        BASELINE: lambda: LoraConfig(**common),
        "DuDe": lambda: DudeConfig(**common),
        "frozen base": lambda: None,
        "PEFT DoRA": lambda: LoraConfig(**common, use_dora=True),
        # niter_4: the same step as the full SVD's, without its minutes
        "PEFT PiSSA + DoRA": lambda: LoraConfig(**common, use_dora=True, init_lora_weights="pissa_niter_4"),
        "our lora": lambda: DudeConfig(**common, method="lora"),
        "our dora": lambda: DudeConfig(**common, method="dora"),
        "our pissa": lambda: DudeConfig(**common, method="pissa"),
    }


@contextmanager
def other_version(source: Path) -> Iterator[Any]:
    """Within: PEFT's DuDe, and the `DudeConfig` that is given, are those of another source tree (`git worktree add`).

    Models that are made within go on to work with its code, beside ours in the same process.
    """
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "dude_peft"}
    tables = (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    kept = [dict(table) for table in tables]
    sys.path.insert(0, str(source))
    try:
        yield importlib.import_module("dude_peft").DudeConfig
    finally:
        sys.path.remove(str(source))
        for name in [name for name in sys.modules if name.partition(".")[0] == "dude_peft"]:
            del sys.modules[name]
        sys.modules.update(ours)
        for table, before in zip(tables, kept, strict=True):
            table.update(before)


def llama(
    dtype: torch.dtype, hidden: int = 768, layers: int = 12, intermediate: int = 2048, vocabulary: int = 8192
) -> nn.Module:
    """A Llama with random weights; the default has 97.5 million parameters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


class OneLinear(nn.Module):
    """A single linear layer, as a model that PEFT can adapt."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out)."""
        return self.linear(x)


def adapt(base: nn.Module, configuration: Any) -> nn.Module:
    """A copy of the base under an adapter; the frozen base itself where there is none."""
    model = copy.deepcopy(base)
    model.requires_grad_(False)
    if configuration is None:
        return model
    if isinstance(base, OneLinear):
        configuration.target_modules = {"linear"}
    torch.manual_seed(1)
    adapted = get_peft_model(model, configuration)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * parameter.std() + 1e-4 * torch.randn_like(parameter))
    return adapted


def growth(measure: Callable[[nn.Module, Tensor, int], dict[str, Any]], dtype: torch.dtype, device: str) -> Any:
    """Something measured on small Llamas that grow along one axis at a time.

    Args:
        measure: (base model, token ids (1, tokens), rank) -> a row.
        dtype: of the base.
        device: of both.

    Yields:
        (axis, {value on the axis: row}).
    """
    for axis, values in GROWTH.items():
        rows = {}
        for value in values:
            setup = {"rank": 16, "tokens": 256, "width": 512, "depth": 4, axis: value}
            base = llama(dtype, setup["width"], setup["depth"], 8 * setup["width"] // 3 // 64 * 64, 2048).to(device)
            ids = torch.randint(2048, (1, setup["tokens"]), device=device)
            rows[str(value)] = measure(base, ids, setup["rank"])
        yield axis, rows


def model_step(model: nn.Module, ids: Tensor, optimize: bool = True, accumulation: int = 1) -> Callable[[], None]:
    """One training step of a language model, with the calls of transformers' Trainer: before every micro-batch it sets
    the mode, and only behind the last one the optimizer steps.
    """
    if hasattr(model, "enable_input_require_grads"):
        # With nothing to train the gradient still flows to the embeddings, as it does under adapters.
        model.enable_input_require_grads()
    optimizer = adam(model) if optimize else None

    def step() -> None:
        for _ in range(accumulation):
            model.train()
            model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return step


def layer_step(model: nn.Module, x: Tensor, dy: Tensor, accumulation: int = 1) -> Callable[[], None]:
    """One training step, as `model_step`, of one layer in the middle of a model: its input wants a gradient."""
    optimizer = adam(model)
    x = x.clone().requires_grad_()

    def step() -> None:
        for _ in range(accumulation):
            model.train()
            x.grad = None
            model(x).backward(dy)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def adam(model: nn.Module) -> torch.optim.Optimizer | None:
    """AdamW over what trains, fused as the Trainer's default is; None where nothing trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
