"""`dude doctor`: what is installed, what this machine has, what works here; and whether training does."""

from __future__ import annotations

import importlib.util
import platform
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dude_peft.artifact.json_text import json_text
from dude_peft.doctor.packages import Package, packages
from dude_peft.errors import ConfigError, DudeError, ResourceError
from dude_peft.installing import install
from dude_peft.parents import refusal_of
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.facts import show_facts
from dude_peft.terminal.next_steps import tell_next
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports
from dude_peft.version import __version__

if TYPE_CHECKING:
    from dude_peft.doctor.devices import Seen
    from dude_peft.doctor.hub import Hub

_LEAST_MEMORY = 1 << 30


def doctor(*, as_json: bool = False) -> None:
    """Looks at everything, shows it, and ends well where training works.

    Raises:
        ConfigError: a required package is missing, too old or broken.
        NumericsError: the self test failed.
        ResourceError: too little memory is free, or the hub's cache cannot be written.
    """
    display = Display(quiet=as_json)
    found: dict[str, Any] = {
        "dude_peft": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    show_facts(
        display,
        f"DuDe {__version__}",
        [("Python", f"{found['python']}, {sys.executable}"), ("system", found["system"])],
    )
    installed = packages()
    found["packages"] = [{**asdict(package), "state": package.state, "remedy": package.remedy} for package in installed]
    show_facts(display, "packages", [(package.name, _package(package)) for package in installed])
    problem = _first_problem(installed)
    if problem is None:
        try:
            with gathered_warnings(lambda text: None):
                problem = _machine(display, found)
        except ConfigError as error:
            problem = error  # a release that does not fit (parents.py)
        except ImportError as error:
            absent = ConfigError(f"a required package cannot be imported ({shown(error)}); install it again")
            problem = refusal_of(error) or absent
    found["training_works"] = problem is None
    found["problem"] = None if problem is None else str(problem)
    if as_json:
        print(json_text(found, indent=2))
    if problem is not None:
        raise problem
    display.say("training works on this machine")
    look = ["data", "check", "ROWS.jsonl", "--model", "MODEL"]
    new = ["config", "new", "ROWS.jsonl", "--model", "MODEL", "-o", "run.yaml"]
    tell_next(display, look, new, ["train", "run.yaml"])


def _first_problem(installed: list[Package]) -> DudeError | None:
    bad = [package for package in installed if package.required and package.state != "ok"]
    if not bad:
        return None
    states = ", ".join(f"{package.name} is {package.state}" for package in bad)
    wanted = [f"{package.name}{package.wanted}" for package in bad]
    return ConfigError(f"{states}; {install(*wanted, option='-U')}")


def _machine(display: Display, found: dict[str, Any]) -> DudeError | None:
    """Looks at what torch and the hub's client are needed for; the problem that keeps a run from working, if any."""
    with quiet_imports():
        from dude_peft.doctor.abilities import abilities
        from dude_peft.doctor.devices import devices
        from dude_peft.doctor.hub import hub
        from dude_peft.doctor.self_test import self_test
    seen = devices()
    found["devices"] = [asdict(device) for device in seen]
    show_facts(display, "devices", [(device.kind, _device(device)) for device in seen])
    state = hub()
    found["hub"] = asdict(state)
    show_facts(display, "Hugging Face hub", _hub(state))
    able = abilities(seen)
    found["abilities"] = [asdict(ability) for ability in able]
    notes = [(each.name, f"{_yes(each.works)}; {each.note}") for each in able]
    show_facts(display, "what works on this machine", notes)
    start = time.perf_counter()
    try:
        self_test()
    except DudeError as error:
        return error
    except RuntimeError as error:  # the device's own
        return ResourceError(
            f"the self test cannot run on this device ({shown(error)}); see torch's installation guide"
        )
    found["self_test_seconds"] = round(time.perf_counter() - start, 2)
    display.say(
        "self test: a new adapter does not change the layer's output, and gradients are finite "
        f"({found['self_test_seconds']} s)"
    )
    if (seen[0].memory or _LEAST_MEMORY) < _LEAST_MEMORY:
        return ResourceError("less than 1 GiB of memory is free; close other programs")
    if not state.writable and not state.offline:
        return ResourceError(
            f"the hub's cache {shown(state.cache, 300)} is not writable; set HF_HOME to another folder"
        )
    return None


def _package(package: Package) -> str:
    version = package.version or "-"
    wanted = f" (needs {package.wanted})" if package.wanted else ""
    remedy = f": {package.remedy}" if package.remedy else ""
    state = "optional, not installed" if package.version is None and not package.required else package.state
    return f"{version}{wanted} {state}{remedy}"


def _device(device: Seen) -> str:
    memory = f", {device.memory / 2**30:.1f} GiB" + (" free" if device.kind == "cpu" else "") if device.memory else ""
    if device.kernels:
        kernels = "Triton kernels run here"
    elif importlib.util.find_spec("triton") is None:
        kernels = "Triton is not installed: torch's own operations are used"
    else:
        kernels = "no device for Triton kernels: torch's own operations are used"
    return f"{device.name}{memory}, bfloat16 {_yes(device.bfloat16)}, {kernels}"


def _hub(state: Hub) -> list[tuple[str, str]]:
    reachable = "not checked, because HF_HUB_OFFLINE is set" if state.offline else _yes(state.reachable)
    return [("cache", f"{shown(state.cache, 300)}, writable: {_yes(state.writable)}"), ("reachable", reachable)]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
