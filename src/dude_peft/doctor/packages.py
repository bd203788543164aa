"""The packages that matter: which version is there, which the project wants, what installs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from dude_peft.installing import PROJECT, install

_EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")
# Not requirements of ours, but what some runs use.
_OTHERS = ("triton", "deepspeed", "flash-attn")


@dataclass(frozen=True)
class Package:
    """One package beside what is wanted of it."""

    name: str
    version: str | None
    """None where it is not installed."""
    wanted: str
    """As ">=2.10"; empty where any will do."""
    extra: str | None
    """Name of the extra that brings it; None for a requirement, and for what no extra brings."""
    required: bool

    @property
    def state(self) -> str:
        """ok, missing, too old or too new."""
        if self.version is None:
            return "missing"
        bounds = Requirement(f"x{self.wanted}").specifier
        if bounds.contains(self.version, prereleases=True):
            return "ok"
        floors = [bound for bound in bounds if bound.operator == ">="]
        return "too new" if all(bound.contains(self.version, prereleases=True) for bound in floors) else "too old"

    @property
    def remedy(self) -> str:
        """The command that puts it right; empty where nothing is wrong, or nothing has to be done."""
        if self.state == "ok":
            return ""
        if self.extra is not None:
            return install(f"{PROJECT}[{self.extra}]", option="-U")
        return install(f"{self.name}{self.wanted}", option="-U") if self.required else ""


def packages() -> list[Package]:
    """What the installed project itself says that it wants, in its order, then what it can use."""
    found: dict[str, Package] = {}
    for text in metadata.requires(PROJECT) or ():
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        extra = _EXTRA.search(text)
        if wanted.name not in found:
            version = installed(wanted.name)
            name = extra[1] if extra else None
            found[wanted.name] = Package(wanted.name, version, str(wanted.specifier), name, required=extra is None)
    others = [Package(name, installed(name), "", None, required=False) for name in _OTHERS if name not in found]
    return [*found.values(), *others]


def installed(name: str) -> str | None:
    """Version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
