"""Prints the lowest versions that the installed dude-peft declares, as constraints for pip: torch==2.10 and others."""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.version import Version


def lowest(requirements: list[str]) -> list[str]:
    """NAME==LOWER of every requirement, those of extras too; one that is declared twice needs the higher bound.

    Raises:
        ValueError: a requirement without a lower bound, of which pip would take any version.
    """
    found: dict[str, Version] = {}
    for requirement in map(Requirement, requirements):
        name = requirement.name
        bounds = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        if not bounds:
            raise ValueError(f"pyproject.toml: {name} has no lower bound; write {name}>=VERSION")
        found[name] = max(*bounds, found.get(name, bounds[0]))
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    print("\n".join(lowest(requires("dude-peft") or [])))
