"""`train.torch_compile`: graphs that depend on a batch's shape alone, so that a resumed run computes the same bits.

torch.compile makes graphs for the shapes that it has met, and code that fits the first of them best: which graph runs a
batch would depend on the batches before. Here every shape has a graph of its own, made from nothing else, and padding
keeps the shapes few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dude_peft.config.schema import TrainSection
from dude_peft.errors import ConfigError
from dude_peft.installing import install
from dude_peft.show import shown

_LENGTHS = 8
_MOST_GRAPHS = 8 * _LENGTHS  # each length with full and with short batches, and a margin


def padded(length: int, longest: int) -> int:
    """Tokens of a batch whose longest row has `length`: one of eight lengths, none above the `longest` of all rows."""
    step = math.ceil(longest / _LENGTHS)
    return min(math.ceil(length / step) * step, longest)


def check_compiler(section: TrainSection, *, gpu: bool) -> None:
    """Raises ConfigError where torch.compile's default backend has no compiler for this device."""
    backend = section.extra_arguments.get("torch_compile_backend", "inductor")
    if not section.torch_compile or backend != "inductor":
        return
    if gpu:
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(f"train.torch_compile: Triton is not installed or does not run here: {install('triton')}")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise ConfigError("train.torch_compile: no C++ compiler is here; install g++ or leave it out") from error


def one_graph_a_shape(trainer: Any) -> None:
    """Tells the compiler of a Trainer that no dimension is to be kept open."""
    trainer.accelerator.state.dynamo_plugin.dynamic = False


@contextmanager
def compiling() -> Iterator[None]:
    """Within: graphs are new and never of open shapes, and too many are an error, not a silent end of compiling.

    Raises:
        ConfigError: the compiler failed on this model or device.
    """
    from torch._dynamo import exc

    wanted = {
        "automatic_dynamic_shapes": False,
        "recompile_limit": _MOST_GRAPHS,
        "accumulated_recompile_limit": 16 * _MOST_GRAPHS,
        "fail_on_recompile_limit_hit": True,
    }
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(wanted):
            yield
    except exc.TorchDynamoException as error:
        told = shown(" ".join(str(error).split()), 200)
        raise ConfigError(
            f"train.torch_compile does not work on this model and device ({type(error).__name__}: {told}); leave it out"
        ) from error
    finally:
        torch._dynamo.reset()
