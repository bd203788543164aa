"""llama.cpp as a library, through the package llama-cpp-python: logits, greedy answers, tokens, quantisation.

llama.cpp ends the process when it meets what it did not expect, so whoever must live on calls this from another one;
`python -m dude_peft.exporting.llama_library SOURCE TARGET NAME` quantises.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.installing import install
from dude_peft.show import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]


def logits(gguf: Path, ids: Sequence[Sequence[int]]) -> list[Logits]:
    """What a GGUF file answers, on the CPU, its cache in float32 so that only the file's own rounding shows.

    Args:
        gguf: the file.
        ids: token ids of each text.

    Returns:
        For each text (tokens, vocabulary).

    Raises:
        ConfigError: llama-cpp-python is not installed.
        ArtifactError: llama.cpp does not load the file.
    """
    with _loaded(gguf, max(map(len, ids))) as model:
        return [_read(model, text).copy() for text in ids]


def greedy(gguf: Path, ids: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The likeliest continuation of each text, token by token, past the end of the answer if it ends earlier.

    Args:
        gguf: the file.
        ids: token ids of each text.
        new_tokens: how many ids to add.

    Returns:
        The new ids of each text.

    Raises:
        ConfigError: llama-cpp-python is not installed.
        ArtifactError: llama.cpp does not load the file.
    """
    with _loaded(gguf, max(map(len, ids)) + new_tokens) as model:
        return [_continue(model, text, new_tokens) for text in ids]


def tokens(gguf: Path, texts: Sequence[str]) -> list[list[int]]:
    """How a GGUF file's own tokenizer reads texts, special tokens read as such, none added.

    Raises:
        ConfigError: llama-cpp-python is not installed.
        ArtifactError: llama.cpp does not load the file.
    """
    with _loaded(gguf, 8) as model:
        return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def quantise(source: Path, target: Path, name: str) -> bool:
    """Write a GGUF file again, quantised.

    Args:
        source: a file of F32, F16 or BF16.
        target: the new file.
        name: of the quantisation, as llama.cpp spells it.

    Returns:
        Whether llama.cpp did it; it tells why not on stderr.
    """
    library = _library()
    options = library.llama_model_quantize_default_params()
    options.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{name}")
    failed: int = library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    return failed == 0


def _library() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise ConfigError(f"reading GGUF files needs llama-cpp-python: {install('llama-cpp-python')}") from error
    return llama_cpp


@contextmanager
def _loaded(gguf: Path, length: int) -> Iterator[Any]:
    library = _library()
    try:
        model = library.Llama(
            str(gguf),
            n_gpu_layers=0,
            n_ctx=length,
            logits_all=True,
            type_k=library.GGML_TYPE_F32,
            type_v=library.GGML_TYPE_F32,
            verbose=False,
        )
    except ValueError as error:
        raise ArtifactError(f"{shown(gguf, 300)}: llama.cpp cannot load it ({shown(error, 200)})") from error
    with closing(model):
        yield model


def _read(model: Any, text: Sequence[int]) -> Logits:
    model.reset()
    model.eval(list(text))
    found: Logits = model.scores[: model.n_tokens]
    return found


def _continue(model: Any, text: Sequence[int], new_tokens: int) -> list[int]:
    new: list[int] = []
    last = _read(model, text)[-1]
    while len(new) < new_tokens:
        new.append(int(last.argmax()))
        if len(new) < new_tokens:
            model.eval(new[-1:])
            last = model.scores[model.n_tokens - 1]
    return new


if __name__ == "__main__":
    sys.exit(0 if quantise(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]) else 1)
