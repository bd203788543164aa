"""A process that has imported everything and forks a child for each run: a start costs a tenth of a second, not five.

Reads one JSON request a line from standard input, answers with one line of JSON:
{"settings": {...}, "kill_after": seconds or null, "signal_after": ..., "signals": [15, ...], "limit": bytes or null,
 "kill_call": k or null}
-> {"code": exit code (negative: killed by that signal), "message": text, "calls": filesystem calls seen}
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate")


def child(request: dict[str, Any], report: int) -> None:
    """Runs one training and leaves with the code that the command would give."""
    from dude_peft.config.schema import RunConfig
    from dude_peft.errors import DudeError
    from dude_peft.training.run import run

    if request.get("limit") is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    calls = count_calls(request.get("kill_call"))
    code, message = 0, ""
    try:
        run(RunConfig(**request["settings"]), quiet=True, **request.get("options", {}))
    except DudeError as error:
        code, message = error.exit_code, str(error)
    except KeyboardInterrupt:  # a second Ctrl-C, while the first one's error is on its way out
        code = 130
    except BaseException as error:
        code, message = 1, f"{type(error).__name__}: {error}"
    os.write(report, json.dumps({"message": message, "calls": calls()}).encode())
    os._exit(code)


def count_calls(kill_at: int | None) -> Callable[[], int]:
    """Counts the calls that change the disk, and kills the process right before number `kill_at`."""
    seen = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return lambda: seen


def serve() -> None:
    """Answers requests until standard input ends."""
    import torch
    import transformers.trainer  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    import dude_peft.training.fit
    import dude_peft.training.model_checks  # noqa: F401
    from dude_peft.training import run

    run.loss_curve = lambda *_: bytes(20_000)  # its file is written as ever; matplotlib takes longer than the training
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                child(request, writer)
            except KeyboardInterrupt:
                os._exit(130)
            finally:
                os._exit(70)
        os.close(writer)
        if request.get("kill_after") is not None:
            time.sleep(request["kill_after"])
            os.kill(pid, signal.SIGKILL)
        for number in request.get("signals", ()):
            time.sleep(request["signal_after"])
            os.kill(pid, number)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        answer = json.loads(text) if text else {"message": "", "calls": 0}
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **answer}), flush=True)


if __name__ == "__main__":
    serve()
