"""The process that computes layers: it knows torch and this package, not transformers, to stay small.

Started by `workers.py`, with one JSON object a line in both directions. When the parent dies, however it dies, the
input ends, and so does this process after the part it is writing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from dude_peft.artifact.header import StoredTensor
from dude_peft.errors import DudeError, ResourceError
from dude_peft.init.layer import LayerTask, compute
from dude_peft.init.parts import Parts
from dude_peft.methods import METHODS, SplitOptions


def main() -> None:
    """Compute layers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers, contextlib.suppress(BrokenPipeError):
        os.dup2(2, 1)  # whatever a library prints must not get between the answers
        settings = json.loads(sys.stdin.readline())
        options = SplitOptions(settings["svd_tol"], settings["svd_seed"], overwrite=True)
        parts = Parts(Path(settings["output"]), settings["settings"])
        for line in sys.stdin:
            message = json.loads(line)
            answer = _answer(message, parts, settings["method"], options)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _answer(message: dict[str, Any], parts: Parts, method: str, options: SplitOptions) -> dict[str, Any]:
    fields = message["task"]
    stored = StoredTensor(**{**fields["stored"], "shape": tuple(fields["stored"]["shape"])})
    task = LayerTask(**{**fields, "stored": stored})
    try:
        start = compute(task, METHODS[method], options)
        parts.write(message["index"], task.name, start)
        return {"index": message["index"], "captured": start.captured}
    except DudeError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        return {
            "error": ResourceError.__name__,
            "message": f"out of memory at layer '{task.name}'; use fewer --workers",
        }
    except OSError as error:
        traceback.print_exc()
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the disk and permissions"
        return {"error": ResourceError.__name__, "message": f"layer '{task.name}': {error}; {hint}"}
    except Exception as error:
        traceback.print_exc()
        return {"error": DudeError.__name__, "message": f"layer '{task.name}': {type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
