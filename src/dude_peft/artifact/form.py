"""In which form a file has the factors of embeddings and convolutions, so that stock PEFT reads them.

    embedding      lora_embedding_A (k, num_embeddings)       lora_embedding_B (embedding_dim, k)
    convolution    lora_A.weight (k, in_channels, *kernel)    lora_B.weight (out_channels, k, 1, ...)
                   lora_magnitude_vector.weight (1, out_channels, 1, ...)

The numbers are those of `stock.py` in the same order; what stock PEFT does not read is as it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dude_peft.artifact.stock import STOCK_A, STOCK_B, STOCK_M

# Behind the name of an nn.MultiheadAttention, whose input projection has the module's own: its output projection.
OUT_PROJECTION = ".base_layer.out_proj"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_OF_EMBEDDINGS = {STOCK_A: EMBEDDING_A, STOCK_B: EMBEDDING_B}


@dataclass(frozen=True)
class Form:
    """The form of one layer's tensors in a file."""

    embedding: bool = False
    kernel: tuple[int, ...] | None = None
    """(in_channels, *kernel) of a convolution that stock PEFT adapts in the same way."""

    def name(self, stock_name: str) -> str:
        """The name in the file of a tensor that `stock.py` calls so."""
        return _OF_EMBEDDINGS.get(stock_name, stock_name) if self.embedding else stock_name

    def written(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of `stock.to_stock` as a file has them."""
        made = {self.name(name): tensor for name, tensor in tensors.items()}
        if self.kernel is not None:
            ones = [1] * (len(self.kernel) - 1)
            made[STOCK_A] = made[STOCK_A].view(-1, *self.kernel)
            made[STOCK_B] = made[STOCK_B].view(*made[STOCK_B].shape, *ones)
            if STOCK_M in made:
                made[STOCK_M] = made[STOCK_M].view(1, -1, *ones)
        return made

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse, for tensors by their names in `stock.py`; one of another shape stays as it is."""
        made = dict(tensors)
        if self.kernel is not None and made[STOCK_A].shape[1:] == self.kernel:
            made[STOCK_A], made[STOCK_B] = made[STOCK_A].flatten(1), made[STOCK_B].flatten(1)
            if STOCK_M in made:
                made[STOCK_M] = made[STOCK_M].flatten()
        return made


MATRIX = Form()
