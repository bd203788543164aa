"""The command that installs what is missing, in one form: errors, notes and `dude doctor` take it from here."""

from __future__ import annotations

import shlex

PROJECT = "dude-peft"
# What our own extras bring, so that a version comes that fits; the first one that does, as pyproject.toml has them.
_EXTRA_OF = {
    "datasets": "train",
    "pyarrow": "train",
    "matplotlib": "train",
    "scipy": "train",
    "gguf": "gguf",
    "pillow": "vision",
    "trl": "trl",
    "lm-eval": "eval",
    "math-verify": "math",
    "llama-cpp-python": "llama",
    "sentencepiece": "llama",
    "bitsandbytes": "quant",
    "torchao": "quant",
    "liger-kernel": "liger",
    "ray": "ray",
}


def install(*packages: str, option: str | None = None) -> str:
    """The command for a shell: `pip install 'dude-peft[quant]'`.

    Args:
        packages: names on PyPI, with bounds where they need some; one that an extra of ours brings is asked for by it.
        option: of pip, as `-U`.
    """
    asked = dict.fromkeys(f"{PROJECT}[{_EXTRA_OF[name]}]" if name in _EXTRA_OF else name for name in packages)
    return " ".join(["pip install", *([] if option is None else [option]), *map(shlex.quote, asked)])
