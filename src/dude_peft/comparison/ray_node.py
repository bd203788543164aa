"""What a node of a Ray cluster does for `dude compare`: looks whether it fits, and runs one `dude train`.

Nothing here imports Ray, but for the name of the node.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from dude_peft.comparison.local import last_words, spawn
from dude_peft.errors import BusyError, ResourceError
from dude_peft.folder.lock import is_locked, lock_text
from dude_peft.machine.environment import versions
from dude_peft.show import shown

# How long a run of a lost node may keep its folder. Ray ends what runs on a node a minute after it has lost its
# cluster, and NFS frees the locks of a lost machine after a minute and a half.
_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.1
_LOCK_SECONDS = 1.0

Result = tuple[str, int | None, str]
"""The node's id, the exit code, and the last words; without a code, why the node does not fit."""


def unfit(facts: dict[str, Any]) -> str | None:
    """Why no run may compute here; None where all is as `dude compare` has it.

    Args:
        facts: `folder`, its `lock` as text, which `dude compare` has, its `cwd`, and its `versions`.
    """
    folder = Path(facts["folder"])
    name = shown(folder, 300)
    if lock_text(folder) != facts["lock"]:
        return f"does not see output_dir {name}; choose a folder that all nodes share"
    try:
        if not is_locked(folder):
            return f"sees output_dir {name}, but not its lock; choose a file system whose locks reach all nodes"
    except OSError as error:
        return f"cannot write in output_dir {name} ({error.strerror}); choose another folder"
    if not os.path.isdir(facts["cwd"]):
        return f"has no folder {shown(facts['cwd'], 300)}; start the command in a folder that all nodes share"
    here = versions()
    if told := [f"{key} {shown(here.get(key))}, not {value}" for key, value in facts["versions"].items()
                if here.get(key) != value]:  # fmt: skip
        return f"has {'; '.join(told)}; install the same versions there"
    return None


def run_cell(
    facts: dict[str, Any], environment: dict[str, str], name: str, config: str, log: str, threads: int
) -> Result:
    """`dude train CONFIG` to its end, once nobody else has its folder.

    A run that was lost may still compute on a machine that the cluster has lost sight of. Whoever has the folder's lock
    runs; the other waits, and then finds the run finished, or goes on from its last checkpoint.
    """
    node = _node()
    if (line := unfit(facts)) is not None:
        return node, None, line
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": str(threads)}
    end = time.monotonic() + _PATIENCE_SECONDS
    try:
        while True:
            while is_locked(Path(config).parent / name) and time.monotonic() < end:
                time.sleep(_LOCK_SECONDS)
            code = _run(config, Path(log), environment, facts["cwd"])
            if code != BusyError.exit_code or time.monotonic() > end:
                return node, code, last_words(Path(log))
    except OSError as error:
        return node, ResourceError.exit_code, f"{shown(log, 300)} cannot be written ({error.strerror})"


def _run(config: str, log: Path, environment: dict[str, str], folder: str) -> int:
    process = None
    try:
        process = spawn(["train", config, "--no-page"], log, environment, folder)
        # Not wait(): Ray's KeyboardInterrupt comes between two instructions of Python.
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:  # cancelled: the run saves a checkpoint
        if process is None:
            raise
        process.send_signal(signal.SIGINT)
        process.wait()
    return int(process.returncode)


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
