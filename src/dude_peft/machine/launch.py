"""Several processes of one run on this machine: started together, signalled together, ended together.

torch's own launcher ends with its own exit code and sends a terminal's Ctrl-C twice; a run of ours promises a
checkpoint and exit 130. So the processes are started here, with the environment that torch's launcher gives, which is
also why `torchrun ... -m dude_peft.cli train CONFIG --launch ddp` works, on several machines too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

from dude_peft.errors import ConfigError, ResourceError
from dude_peft.installing import install
from dude_peft.machine.processes import LAUNCHED, LOST, count, is_launched
from dude_peft.machine.stop import handled_by
from dude_peft.show import shown

_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_PROGRAM_BYTES = 2**29
"""What a process takes without a model, Python and the libraries (docs/training.md: 508 to 586 MB measured)."""

STRATEGIES = ("ddp", "fsdp2", "zero3")


def launch_if_first(strategy: str, processes: int | None) -> None:
    """Starts this command in several processes and ends with their exit code; returns where this is one of them.

    Args:
        strategy: one of STRATEGIES.
        processes: how many; None is one a GPU.

    Raises:
        ConfigError: an unknown strategy, a missing package, a number that makes no sense, or an environment that does
            not (`is_launched`).
        ResourceError: more processes than the memory holds.
    """
    check_known(strategy)
    if strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"--launch zero3 needs DeepSpeed: {install('deepspeed')}")
    if is_launched():
        if processes is not None and processes != count():
            raise ConfigError(
                f"--processes {processes}: the launcher has started {count()}; leave --processes out, or unset RANK, "
                "WORLD_SIZE and LOCAL_RANK"
            )
        return
    number = number_of(strategy, processes)
    _check_memory(number)
    sys.exit(launch(sys.argv[1:], number))


def _check_memory(processes: int) -> None:
    """Refuses processes whose programs alone do not fit: the system would end them, or others, in their midst."""
    import psutil

    free = psutil.virtual_memory().available
    if processes * _PROGRAM_BYTES > free:
        raise ResourceError(
            f"--processes {processes}: without any model, they need {processes * _PROGRAM_BYTES / 2**30:.0f} GiB of "
            f"memory, and {free / 2**30:.1f} GiB are free; give at most {max(free // _PROGRAM_BYTES, 1)}, or one for "
            "each GPU"
        )


def check_known(strategy: str) -> None:
    """Raises ConfigError where `strategy` is none of STRATEGIES."""
    if strategy not in STRATEGIES:
        raise ConfigError(f"--launch {shown(strategy)}: choose {', '.join(STRATEGIES)}")


def number_of(strategy: str | None, processes: int | None) -> int:
    """How many processes `--launch STRATEGY --processes N` means; without `--launch` one.

    Raises:
        ConfigError: an unknown strategy, a number that makes no sense or goes with none, no GPU to count.
    """
    if strategy is None:
        if processes is not None:
            raise ConfigError("--processes goes with --launch; add --launch ddp")
        return 1
    check_known(strategy)
    if processes is None:
        import torch

        processes = torch.cuda.device_count()
        if processes < 1:
            raise ConfigError("--launch: no GPU found; give --processes N to use the CPU")
    if processes < 1:
        raise ConfigError(f"--processes {processes}: give at least 1")
    return processes


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs `dude ARGUMENTS` in several processes and waits for them.

    The first one shows and writes; where another one fails first, what it had to say is shown.

    Args:
        arguments: of the command, as typed.
        processes: how many.

    Returns:
        The exit code of the run: 0, or the first failing process's.
    """
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(processes))),
        LAUNCHED: "1",
    }
    children: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        for rank in range(processes):
            silent = {} if rank == 0 else {"stdout": subprocess.DEVNULL, "stderr": said[rank]}
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dude_peft.cli", *arguments],
                    env={**os.environ, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on
                    preexec_fn=die_with_parent,
                    **silent,  # type: ignore[call-overload]
                )
            )
        with handled_by(functools.partial(_pass_on, children)):
            rank, code = _wait(children)
        if code == LOST:
            sys.stderr.write("dude: error[internal]: the processes of this run lost each other; run it again\n")
            return 1
        if code == -signal.SIGKILL:
            sys.stderr.write(
                f"dude: error[resource]: process {rank} was killed, as the system does where memory is out; use fewer "
                "processes, a smaller model or another machine\n"
            )
        elif code != 0 and rank != 0:
            said[rank].seek(0)
            sys.stderr.write(said[rank].read().decode("utf-8", "replace"))
        return code if code >= 0 else 128 - code


def _wait(children: list[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """(number, exit code) of the process that tells best why they failed, or (0, 0); none of them is left behind."""
    end = float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        if end == float("inf") and any(child.returncode for child in children):
            end = time.monotonic() + _PATIENCE_SECONDS  # the others often fail of the same, and say so better
        time.sleep(_POLL_SECONDS)
    failed = [(rank, child.returncode) for rank, child in enumerate(children) if child.returncode]
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
    causes = [(rank, code) for rank, code in failed if code != LOST]
    told = [(rank, code) for rank, code in causes if code > 0]
    return (told or causes or failed or [(0, 0)])[0]


def _pass_on(children: list[subprocess.Popen[bytes]], number: int, frame: FrameType | None) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def die_with_parent() -> None:
    """On Linux a child ends with its parent, however that ends; elsewhere only a killed parent leaves children."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _threads(processes: int) -> int:
    return max(1, (os.cpu_count() or 1) // processes)
