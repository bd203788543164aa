"""The process in which rewards run: answers in, numbers out, as JSON lines.

It imports no torch. What a reward prints goes nowhere, and standard input is not its own: both belong to the parent.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from importlib.abc import ExecutionLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

from typing_extensions import override

from dude_peft.artifact.sealed import file_sha256
from dude_peft.machine.out_of_memory import comes_of_memory
from dude_peft.parents import fits
from dude_peft.rewards.builtin import Reward, builtin
from dude_peft.rewards.imports import mentioned
from dude_peft.rewards.memory import limit_memory, spare_memory

_SPARE_SECONDS = 10
_INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib")
_OURS = Path(__file__).parent.parent


def main() -> None:
    """Answers requests from standard input until it ends.

    The first line is {"rewards", "longest", "seconds", "gib"}; it is answered by {"beside"} (`_beside`), or by
    {"fault", "reward", "memory"}.
    Each one that follows is {"reward": its number, "of": {"prompts", "completions", "completion_ids", "answer"}},
    answered by {"scores"} or {"fault", "memory"}: whether the fault is that memory is out.
    """
    requests, answers = os.fdopen(os.dup(0), encoding="ascii"), os.fdopen(os.dup(1), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    first = json.loads(requests.readline())
    limit_memory(first["gib"])
    rewards: list[Reward] = []
    fault: dict[str, Any] = {}
    for settings in first["rewards"]:
        try:
            own = settings["kind"] == "function"
            rewards.append(_own(settings) if own else builtin(settings, first["longest"]))
        except BaseException as error:  # code of the user's, which may raise anything
            fault = _fault(error, settings.get("file")) | {"reward": len(rewards)}
            break
    files, own_number = [settings.get("file") for settings in first["rewards"]], os.getpid()
    print(json.dumps(fault or {"beside": _beside(files)}), file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        # Where the parent is gone, nobody else ends a reward that hangs; this needs no turn of the interpreter.
        faulthandler.dump_traceback_later(first["seconds"] + _SPARE_SECONDS, exit=True)
        found = _scores(rewards[request["reward"]], request["of"], files[request["reward"]])
        faulthandler.cancel_dump_traceback_later()
        if os.getpid() != own_number:  # a copy that the reward has made, and that came back as well
            os._exit(1)
        print(found, file=answers, flush=True)


def _scores(reward: Reward, of: dict[str, Any], file: str | None) -> str:
    try:
        found = reward(**_wanted(reward, of))
        if isinstance(found, (str, bytes)) or not (isinstance(found, Sequence) or hasattr(found, "tolist")):
            return json.dumps({"fault": f"it returned {type(found).__name__}, not a list of numbers"})
        values = [None if each is None else float(each) for each in found]
        return json.dumps({"scores": values})
    except BaseException as error:
        return json.dumps(_fault(error, file))


@fits()
class _Checked(ExecutionLoader):
    """Runs a module from the text that the parent has checked, whatever its file says by now."""

    def __init__(self, path: str, source: str) -> None:
        self._path, self._source = path, source

    @override
    def get_filename(self, fullname: str) -> str:
        return self._path

    @override
    def get_source(self, fullname: str) -> str:
        return self._source


def _own(settings: dict[str, Any]) -> Reward:
    """The function of a file."""
    path = Path(settings["file"]).absolute()
    sys.path.insert(0, str(path.parent))  # it may import what lies beside it, as a script does
    loader = _Checked(str(path), settings["source"])
    spec = spec_from_loader(path.stem, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    found = getattr(module, settings["function"])
    if not callable(found):
        raise TypeError(f"{settings['function']} is {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def _beside(files: Sequence[str | None]) -> dict[str, str]:
    """sha256 of each Python file of the user's that lies beside these, or below, and was imported, or may be.

    Names begin with the folder as `files` have it, so that they stay when a project is moved. Packages are told by
    their versions, also where they are installed below.
    """
    installed = (*(f"{sysconfig.get_path(name)}{os.sep}" for name in _INSTALLED), f"{_OURS}{os.sep}")
    paths = {str(path) for module in [*sys.modules.values()] if (path := getattr(module, "__file__", None))}
    imported = {path for path in paths if not path.startswith(installed)}
    found = {}
    own = [file for file in files if file is not None]
    for folder in sorted({os.path.dirname(file) for file in own}):
        root = f"{Path(folder).absolute()}{os.sep}"
        beside = {path for path in imported if path.startswith(root) and os.path.isfile(path)}
        for file in (file for file in own if os.path.dirname(file) == folder):
            later = mentioned(Path(file).absolute(), Path(folder).absolute())
            beside |= {path for path in later if path.startswith(root) and not path.startswith(installed)}
        for path in sorted(beside):
            found[os.path.join(folder, path.removeprefix(root))] = file_sha256(Path(path))
    return found


def _wanted(reward: Reward, of: dict[str, Any]) -> dict[str, Any]:
    """Those of the lists that the function names; all of them where it takes any."""
    parameters = inspect.signature(reward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return of
    return {name: value for name, value in of.items() if name in parameters}


def _fault(error: BaseException, file: str | None) -> dict[str, Any]:
    if not comes_of_memory(error):
        return {"fault": _told(error, file)}
    spare_memory()
    return {"fault": _told(error, file), "memory": True}


def _told(error: BaseException, file: str | None) -> str:
    """The error in a line, with the last line of the user's file that it passed."""
    text = f"{type(error).__name__}: {str(error).strip()[:300]}"
    if file is None:
        return text
    path = str(Path(file).absolute())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f"line {lines[-1]}: {text}" if lines else text
