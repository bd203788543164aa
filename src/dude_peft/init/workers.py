"""Runs the layers in worker processes, one layer a process at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from dude_peft import errors
from dude_peft.errors import ResourceError
from dude_peft.init.layer import LayerTask
from dude_peft.tuner import DudeConfig

_SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
_USUAL_MOST = 4


def usual_count() -> int:
    """Workers where none are asked for: a core each, but a few at most, since each holds a weight in float32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _USUAL_MOST)


def run_layers(
    tasks: Sequence[tuple[int, LayerTask]], config: DudeConfig, output: Path, settings: str, count: int, debug: bool
) -> Iterator[float | None]:
    """Compute and write the part of every task; yields the captured energy of each as it is done.

    Args:
        tasks: index of the part, and the layer.
        config: the method and its SVD's settings.
        output: the adapter's folder, with its parts inside.
        settings: hash that the parts carry.
        count: processes.
        debug: show the processes' standard error.

    Raises:
        DudeError: the first error of a worker, or a worker that died.
    """
    waiting = deque(tasks)
    first = json.dumps(
        {
            "method": config.method,
            "svd_tol": config.svd_tol,
            "svd_seed": config.svd_seed,
            "output": str(output.absolute()),
            "settings": settings,
        }
    )
    workers = [_start(first, debug) for _ in range(min(count, len(tasks)))]
    try:
        with DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.stdout, EVENT_READ, worker)  # type: ignore[arg-type]
                _send(worker, waiting.popleft())
            left = len(tasks)
            while left:
                for key, _ in selector.select():
                    yield _captured(key.data)
                    left -= 1
                    if waiting:
                        _send(key.data, waiting.popleft())
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _start(first: str, debug: bool) -> subprocess.Popen[str]:
    worker = subprocess.Popen(
        [sys.executable, "-m", "dude_peft.init.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if debug else subprocess.DEVNULL,
        text=True,
        env={**os.environ, **_SINGLE_THREAD},
        start_new_session=True,
    )
    assert worker.stdin is not None
    worker.stdin.write(first + "\n")
    return worker


def _send(worker: subprocess.Popen[str], task: tuple[int, LayerTask]) -> None:
    index, layer = task
    assert worker.stdin is not None
    try:
        worker.stdin.write(json.dumps({"index": index, "task": asdict(layer)}) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it died: reading its answer says how


def _captured(worker: subprocess.Popen[str]) -> float | None:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        code = worker.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        raise ResourceError(
            f"a worker process {how}, most often because memory ran out; use fewer --workers (the finished layers are "
            "kept)"
        )
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    captured: float | None = answer["captured"]
    return captured
