"""The command `dude` as tests call it: a process that has imported everything forks a child for each call.

A start costs a tenth of a second instead of five. A child inherits imports alone: arguments, folder, environment and
standard streams are those of a process of its own, and it ends as one does. Tests of the start itself, of limits and of
what a library reads when it is imported (HF_HOME, PYTHON...) use `subprocess`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import nursery

_IMPORTS = (
    "torch", "transformers.trainer", "trl.trainer.sft_trainer", "peft", "lm_eval.evaluator", "matplotlib.pyplot",
    "dude_peft.training.fit", "dude_peft.training.picture", "dude_peft.training.model_checks",
    "dude_peft.training.data_check",
    "dude_peft.model.probe", "dude_peft.exporting.run", "dude_peft.exporting.run_card", "dude_peft.exporting.verify",
    "dude_peft.evaluation.run", "dude_peft.evaluation.in_training", "dude_peft.chat.generate", "dude_peft.chat.talk",
    "dude_peft.init.run", "dude_peft.planning.run", "dude_peft.doctor.run", "dude_peft.comparison.by_hand",
    "dude_peft.reporting.of_run", "dude_peft.reporting.of_evaluation", "dude_peft.reporting.html",
    "dude_peft.reporting.markdown", "matplotlib.backends.backend_svg",
)  # fmt: skip
_READ_AT_IMPORT = ("PYTHON", "HF_HOME", "LC_", "LANG", "LD_", "TRITON_INTERPRET")


def dude(
    *arguments: object, cwd: Path | None = None, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`dude ARGUMENTS`, with more of an environment."""
    return _call(["dude", *map(str, arguments)], None, cwd, timeout, environment)


def fresh(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`dude ARGUMENTS` in a process that has imported nothing, for tests of the start itself."""
    return subprocess.run(
        [sys.executable, "-m", "dude_peft", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def children_seconds() -> float:
    """CPU time of the processes that have ended so far: how long a start takes, however busy the machine is."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def script(
    path: Path, *arguments: object, cwd: Path | None = None, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python PATH ARGUMENTS`, with more of an environment."""
    return _call([str(path), *map(str, arguments)], str(path), cwd, timeout, environment)


def _call(
    argv: list[str], path: str | None, cwd: Path | None, timeout: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    assert not [name for name in environment if name.startswith(_READ_AT_IMPORT)], "needs a process of its own"
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        request = {
            "argv": argv, "script": path, "cwd": str(cwd or Path.cwd()), "out": str(out), "err": str(err),
            "env": {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}, "timeout": timeout,
        }  # fmt: skip
        code = _Server.asked(request)
        done = subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())
    if code is None:
        raise subprocess.TimeoutExpired(argv, timeout, done.stdout, done.stderr)
    return done


class _Server:
    process: subprocess.Popen[str] | None = None

    @classmethod
    def asked(cls, request: dict[str, Any]) -> int | None:
        """The exit code, negative for a signal; None where the time ran out."""
        if cls.process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__]
            cls.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            atexit.register(cls.process.kill)
        assert cls.process.stdin is not None
        assert cls.process.stdout is not None
        cls.process.stdin.write(json.dumps(request) + "\n")
        cls.process.stdin.flush()
        return json.loads(cls.process.stdout.readline())["code"]


def _serve() -> None:
    """Answers requests until standard input ends."""
    from dude_peft.terminal.quiet import quiet_imports

    answers = os.dup(1)
    os.dup2(2, 1)
    with quiet_imports():
        for name in _IMPORTS:
            try:
                importlib.import_module(name)
            except ImportError:  # an extra that is not installed
                if name.startswith("dude_peft"):
                    raise
    gc.collect()
    gc.freeze()  # a child's collections leave what it inherits alone
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            _become(request)
            return
        os.write(answers, (json.dumps({"code": _ended(pid, request["timeout"])}) + "\n").encode())


def _ended(pid: int, timeout: float) -> int | None:
    import select
    import signal

    child = os.pidfd_open(pid)
    ready, _, _ = select.select([child], [], [], timeout)
    os.close(child)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ready else None


def _become(request: dict[str, Any]) -> None:
    """The process that was asked for, from its arguments on."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for target, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, target)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if request["argv"][1:2] == ["compare"]:
        nursery.found(_become)
    sys.argv = request["argv"]
    try:
        _perform(request["script"])
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise
        _leave(end.code or 0)
    _leave(0)


def _perform(script: str | None) -> None:
    sys.path[0] = str(Path(sys.executable if script is None else script).parent)
    if script is not None:
        runpy.run_path(script, run_name="__main__")
        return
    from dude_peft.cli import main

    main()


def _leave(code: int) -> None:
    """The end of a process without its longest part, half a second for taking apart what it inherited."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
