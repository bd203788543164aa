"""How the next token is chosen: the options of the commands, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dude_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig

_LARGEST_COUNT = 10**9
# Beyond these, logits over the temperature leave float32; long before, drawing is taking the likeliest, or any token.
_COLDEST, _HOTTEST = 1e-6, 1e6
_STEP = 2654435769  # odd, so that no two of 2**32 batches share a seed


@dataclass(frozen=True)
class Decoding:
    """Greedy, or drawn from a part of the distribution."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Drawn from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the drawing."""

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot work."""
        if not 1 <= self.max_new_tokens <= _LARGEST_COUNT:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: give a whole number of tokens from 1")
        if self.temperature != 0 and not _COLDEST <= self.temperature <= _HOTTEST:
            raise ConfigError(
                f"--temperature {self.temperature}: give 0 (the likeliest token) or a number from {_COLDEST:g} to "
                f"{_HOTTEST:g}, often 0.7"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: give a probability above 0, up to 1")
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigError("--top-p needs sampling; set --temperature above 0")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: give a whole number from 0 to 2**32 - 1")

    def start(self, batch: int = 0) -> None:
        """Seed the drawing: what follows is the same each time, on the same machine and in the same batches.

        Each batch draws its own numbers, so that it draws the same ones where those before it are there already.
        """
        from transformers import set_seed

        set_seed((self.seed + _STEP * batch) % 2**32)

    def settings(self, max_new_tokens: int) -> GenerationConfig:
        """As transformers takes it."""
        from transformers import GenerationConfig

        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            # transformers' own default would cut to 50 tokens.
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(max_new_tokens=max_new_tokens, use_cache=True, **sampling)  # type: ignore[no-untyped-call]
