"""A merged model folder as one GGUF file, made by llama.cpp's own converter and quantiser, a process each."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from dude_peft.artifact.durable import refuse_existing, staging, sync
from dude_peft.doors import open_file, read_json
from dude_peft.errors import ConfigError, DudeError, ResourceError
from dude_peft.exporting.llama_tools import find_converter, find_quantiser
from dude_peft.installing import install
from dude_peft.show import shown
from dude_peft.tuner.config import closest

_CONVERTED = ("F32", "F16", "BF16", "Q8_0")
"""What the converter writes by itself."""
QUANTISATIONS = (
    *_CONVERTED, "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "Q2_K",
)  # fmt: skip
"""llama.cpp's names, without those that mean nothing without an importance matrix, and the ternary ones."""

_REASONS = {
    "pre-tokenizer was not recognized": (
        "llama.cpp's converter does not know this model's tokenizer; use a newer llama.cpp, "
        "or serve the merged model folder itself"
    ),
    "is not supported": (
        "llama.cpp's converter does not know this model's architecture; use a newer llama.cpp, "
        "or serve the merged model folder itself"
    ),
}
_MAGIC = b"GGUF"


def convert(model: Path, output: Path, quantisation: str = "F16", llama_cpp: Path | None = None) -> None:
    """Write a merged model as a GGUF file, whole or not at all.

    Args:
        model: folder of config.json, *.safetensors and the tokenizer's files.
        output: the file, which must not exist; twice the model's size is needed beside it while it is quantised.
        quantisation: one of `QUANTISATIONS`, in capitals or not.
        llama_cpp: folder of llama.cpp; None for what `llama_tools` finds.

    Raises:
        ConfigError: an unknown name, a program that is missing, or a model or tokenizer that llama.cpp does not know.
        ResourceError: the disk is full.
        BusyError: another process is making the same file.
    """
    name = quantisation_named(quantisation)
    if not (model / "config.json").is_file():
        raise ConfigError(f"{shown(model, 300)} has no config.json; give the folder of a merged model")
    _check_tokenizer(model)
    converter, quantiser = _programs(name, llama_cpp)
    with staging(output) as folder:
        made = folder / "converted.gguf"
        outtype = (_stored_type(model) if quantiser else name).lower()
        _run("converter", [*converter, str(model.absolute()), "--outfile", str(made), "--outtype", outtype], made)
        if quantiser:
            made, plain = folder / "quantised.gguf", made
            _run("quantiser", [*quantiser, str(plain), str(made), name], made)
        sync(made)
        refuse_existing(output)
        made.rename(output)
    sync(output.parent)


def check_gguf(quantisation: str) -> str:
    """Make sure, before any work, that a GGUF file of this kind can be made here.

    Returns:
        The kind in llama.cpp's spelling.

    Raises:
        ConfigError: an unknown name, or a program that is missing.
    """
    name = quantisation_named(quantisation)
    _programs(name, None)
    return name


def quantisation_named(name: str) -> str:
    """llama.cpp's spelling of a quantisation's name.

    Raises:
        ConfigError: there is none of this name.
    """
    found = name.strip().upper().replace("-", "_")
    if found not in QUANTISATIONS:
        raise ConfigError(f"quantisation '{shown(name)}' is unknown; {closest(found, QUANTISATIONS)}")
    return found


def _programs(name: str, llama_cpp: Path | None) -> tuple[list[str], list[str] | None]:
    return find_converter(llama_cpp), None if name in _CONVERTED else find_quantiser(llama_cpp)


def _stored_type(model: Path) -> str:
    """The narrowest type that keeps every weight as it is stored, for the file that is quantised afterwards."""
    config = read_json(model / "config.json")
    return {"bfloat16": "BF16", "float16": "F16"}.get(config.get("dtype", config.get("torch_dtype")), "F32")


def _check_tokenizer(model: Path) -> None:
    """Refuse what the converter takes and llama.cpp then reads wrong, without a word.

    Llama 2's kind of tokenizer (BPE with a token a byte) needs the scores that only tokenizer.model has. Without them
    the converter writes the same score for every token, and texts are split into other tokens than in training.
    """
    path = model / "tokenizer.json"
    if (model / "tokenizer.model").is_file() or not path.is_file():
        return
    inner = read_json(path, 1 << 29).get("model") or {}
    if inner.get("type") == "BPE" and inner.get("byte_fallback") and inner.get("merges"):
        raise ConfigError(
            "llama.cpp would tokenize differently from this model, because tokenizer scores are missing; put the "
            f"base model's tokenizer.model into {shown(model, 300)}"
        )


def _run(what: str, command: list[str], made: Path) -> None:
    # Nothing is fetched: all that is needed lies in the model's folder.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise ConfigError(f"llama.cpp's {what} {shown(command[0], 300)} cannot start: {error.strerror}") from error
    if done.returncode or not _is_gguf(made):
        raise _failure(what, done)


def _is_gguf(path: Path) -> bool:
    try:
        with open_file(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except FileNotFoundError:
        return False


def _failure(what: str, done: subprocess.CompletedProcess[str]) -> DudeError:
    """One line out of what a program printed before it ended."""
    said = f"{done.stdout}\n{done.stderr}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = shown(lines[-1], 300) if lines else f"it ended with code {done.returncode} and no message"
    if "No space left on device" in said:
        return ResourceError(f"no space left on the disk for the GGUF file (llama.cpp's {what}: {last})")
    if "ModuleNotFoundError: No module named" in last:
        module = last.rpartition("named ")[2].strip("'")
        return ConfigError(f"llama.cpp's {what} needs {module} where it runs: {install(module)}")
    for sign, reason in _REASONS.items():
        if sign in said:
            return ConfigError(f"{reason} ({last})")
    return ConfigError(f"llama.cpp's {what} failed: {last}")
