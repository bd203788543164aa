"""The best LoRA of a given rank: the top K singular triplets of every layer's whole change W' - W0.

    W' - W0 = U S V^T,     lora_B = U_K sqrt(S_K),  lora_A = sqrt(S_K) V_K^T,     alpha = K, so the scaling is 1

No magnitude and no rsLoRA flag are left, which some servers ignore in silence. No other rank-K matrix is nearer to the
change (Eckart-Young); what it misses is the energy of the other triplets, told per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.effective import effective_weight
from dude_peft.artifact.header import DTYPES
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE
from dude_peft.core.svd import top_svd
from dude_peft.core.threads import single_threaded_pool
from dude_peft.errors import ConfigError
from dude_peft.exporting.adapter import SavedAdapter
from dude_peft.exporting.base import Base
from dude_peft.exporting.merge import Layer
from dude_peft.exporting.serving import SERVED_RANKS
from dude_peft.model.stream import Piece, write_pieces
from dude_peft.model.weights import read_weight
from dude_peft.show import shown


@dataclass(frozen=True)
class LayerFit:
    """How well a rank serves one layer."""

    layer: str
    captured: float
    """Share of the energy ||W' - W0||_F^2 that the rank keeps; 1 where nothing changed."""


def check_rank(rank: int, layers: dict[str, Layer], adapter: SavedAdapter) -> None:
    """Refuse a rank that no server takes, that a layer cannot have, or tensors that a LoRA cannot carry.

    Raises:
        ConfigError: one of these.
    """
    if rank not in SERVED_RANKS:
        raise ConfigError(
            f"--to lora:{rank}: servers support the ranks {', '.join(map(str, SERVED_RANKS))}; choose one"
        )
    name, layer = min(layers.items(), key=lambda one: min(one[1].shape))
    if rank > min(layer.shape):
        raise ConfigError(
            f"--to lora:{rank}: layer '{shown(name)}' (out {layer.shape[0]}, in {layer.shape[1]}) has rank "
            f"{min(layer.shape)} at most; choose a smaller rank"
        )
    if whole := next((name for name, _ in adapter.whole()), None):
        raise ConfigError(
            f"--to lora:{rank}: '{shown(whole)}' was trained in full, which a LoRA cannot store; use --to merged"
        )


def write_lora(
    adapter: SavedAdapter, base: Base, layers: dict[str, Layer], rank: int, folder: Path, done: Callable[[], None]
) -> list[LayerFit]:
    """Write the rank-K adapter; one base weight a thread is in memory.

    Args:
        adapter: what is exported.
        base: the model it belongs to.
        layers: its layers, found in the base's checkpoint.
        rank: K.
        folder: where it goes.
        done: called behind every layer.

    Returns:
        The captured energy of every layer.
    """
    parts = folder / "parts"
    parts.mkdir()
    pieces: list[Piece] = []
    fits: list[LayerFit] = []
    with single_threaded_pool(len(layers), most=4) as pool:
        made = pool.map(lambda one: _layer(adapter, one[0], one[1], rank), layers.items())
        for number, (name, (tensors, captured)) in enumerate(zip(layers, made, strict=True)):
            for key, tensor in tensors.items():
                path = parts / f"{number}.{key}"
                path.write_bytes(tensor.view(torch.uint8).numpy().data)
                shape = tuple(tensor.shape)
                pieces.append(Piece(f"base_model.model.{name}.{key}.weight", "F32", shape, _reader(path)))
            fits.append(LayerFit(name, captured))
            done()
    write_pieces(folder / WEIGHTS_FILE, {"format": "pt"}, pieces)
    for path in parts.iterdir():
        path.unlink()
    parts.rmdir()
    stock = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(layers),
        base_model_name_or_path=base.source.name_or_path,
        revision=adapter.config.revision,
        task_type=adapter.config.task_type,
        inference_mode=True,
    )
    config: dict[str, Any] = stock.to_dict()  # type: ignore[no-untyped-call]
    config["target_modules"] = _short_names(layers, base.model)
    text = json_text(config, indent=2, sort_keys=True, default=str)
    replace_file(folder / CONFIG_FILE, (text + "\n").encode())
    return fits


def _layer(adapter: SavedAdapter, name: str, layer: Layer, rank: int) -> tuple[dict[str, torch.Tensor], float]:
    stored, _ = read_weight(layer.stored, DTYPES[layer.stored.dtype])
    W0 = stored.T.contiguous() if layer.transposed else stored
    change = effective_weight(W0, adapter.layer(name, layer.shape), adapter.scaling(name)).sub_(W0)
    del W0, stored
    if not bool(change.any()):
        out, in_ = layer.shape
        return {"lora_A": torch.zeros(rank, in_), "lora_B": torch.zeros(out, rank)}, 1.0
    top = top_svd(change, rank, overwrite=True)
    root = top.S.sqrt()
    tensors = {"lora_A": root[:, None] * top.Vh, "lora_B": top.U * root}
    return {key: tensor.float().contiguous() for key, tensor in tensors.items()}, top.captured


def _short_names(layers: dict[str, Layer], model: nn.Module) -> list[str]:
    """Ends of names, as servers want them, where these mean the same layers; else the full names."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return ends if meant == set(layers) else sorted(layers)


def _reader(path: Path) -> Callable[[], Iterator[bytes]]:
    def read() -> Iterator[bytes]:
        yield path.read_bytes()

    return read
