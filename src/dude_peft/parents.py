"""What we take over from other libraries' classes, compared with the releases that are installed.

A trainer, a tuner and a harness are subclassed through names that any release may change. A method that is never called
again would be silent, and a parameter more would end a run at its first checkpoint. So every method that replaces a
parent's is marked `typing_extensions.override`, and `fits` compares names and parameters when the class is made. Only
code objects are looked at: it takes well under a millisecond a class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from types import CodeType, FunctionType
from typing import Any, TypeVar

from dude_peft.errors import ConfigError
from dude_peft.installing import PROJECT, install
from dude_peft.version import __version__

TESTED = {
    "torch": "2.14.1",
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "trl": "1.16.0",
    "lm-eval": "0.4.13",
    "rich": "15.0.0",
}
"""The newest releases with which `scripts/test_versions.sh newest` has passed."""

_Class = TypeVar("_Class", bound=type)
_Method = TypeVar("_Method", bound=Callable[..., Any])


def fits(*, uses: Iterable[str] = ()) -> Callable[[_Class], _Class]:
    """Class decorator: refuse a parent that lost, gained or changed what the class replaces.

    Args:
        uses: names of the parents that the class calls, reads or sets without replacing them.

    Raises:
        ConfigError: a marked method is gone or takes other parameters, a used name is gone, or a method that is not
            marked would replace one of the parent's.
    """

    def checked(cls: _Class) -> _Class:
        own = [kind for kind in cls.__mro__ if _package(kind) == _package(cls)]
        parents = [kind for kind in cls.__mro__ if kind not in own and kind is not object]
        for kind in own:
            for name, member in vars(kind).items():
                if (ours := _function(member)) is not None:
                    _compare(cls, name, ours, parents)
        for name in uses:
            if not any(_knows(parent, name) for parent in parents):
                raise _gone(parents, name)
        return cls

    return checked


def newer(method: _Method) -> _Method:
    """Beside `override`: older releases within our bounds lack the method; what needs it has to `require` it."""
    method.__newer__ = True  # type: ignore[attr-defined]
    return method


def require(parent: type, *names: str) -> None:
    """Refuse a class that has lost one of the names that we set, read or answer to; raises ConfigError."""
    for name in names:
        if not _knows(parent, name):
            raise _gone([parent], name)


def refusal_of(error: ImportError) -> ConfigError | None:
    """The line for a name or module that an installed library no longer has; None where an import failed otherwise."""
    package, _, module = (error.name or "").partition(".")
    absent = isinstance(error, ModuleNotFoundError) and not module  # the library itself
    package = _distribution(package)
    if package not in TESTED or absent:
        return None
    return _refusal(package, " ".join(str(error).partition(" (")[0].split()))


def _compare(cls: type, name: str, ours: FunctionType, parents: list[type]) -> None:
    replaced = next((parent for parent in parents if name in vars(parent)), None)
    if not getattr(ours, "__override__", False):
        # nn.Module's public methods are made to be replaced; elsewhere two methods share a name by accident.
        if replaced is not None and _package(replaced) != "torch" and not name.startswith("__"):
            raise _misfit(replaced, f"{replaced.__name__} has a {name} of its own, and {cls.__name__} another one")
        return
    if replaced is None:
        if getattr(ours, "__newer__", False):
            return
        raise _gone(parents, name)
    theirs = _function(vars(replaced)[name])
    if theirs is not None and not (its := _Parameters(theirs)).match(own := _Parameters(ours)):
        raise _misfit(replaced, f"{replaced.__name__}.{name} takes {its}, not {own}")


class _Parameters:
    """Of a method, without self."""

    def __init__(self, function: FunctionType) -> None:
        code = function.__code__
        names, ends = code.co_varnames, (code.co_argcount, code.co_argcount + code.co_kwonlyargcount)
        self.positional, self.keyword = list(names[1 : ends[0]]), list(names[ends[0] : ends[1]])
        self.starred = bool(code.co_flags & inspect.CO_VARARGS), bool(code.co_flags & inspect.CO_VARKEYWORDS)

    def match(self, other: _Parameters) -> bool:
        """Whether either method can be called as the other one is."""
        same_place = all(a == b for a, b in zip(self.positional, other.positional, strict=False))
        return same_place and self._takes_all_of(other) and other._takes_all_of(self)

    def _takes_all_of(self, other: _Parameters) -> bool:
        named, (more, more_named) = {*self.positional, *self.keyword}, self.starred
        rest = [name for name in other.positional if name not in named and not more and not more_named]
        return not rest and (more_named or named.issuperset(other.keyword))

    def __str__(self) -> str:
        stars = ["*args"] * self.starred[0], ["**kwargs"] * self.starred[1]
        return f"({', '.join([*self.positional, *stars[0], *self.keyword, *stars[1]])})"


def _function(member: Any) -> FunctionType | None:
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, (classmethod, staticmethod)):
        member = member.__func__
    plain = inspect.unwrap(member) if callable(member) else None
    return plain if isinstance(plain, FunctionType) else None


def _knows(parent: type, name: str) -> bool:
    """Whether the class has the name, or a method of it does: attributes of instances stand nowhere else."""
    functions = (_function(member) for kind in parent.__mro__ for member in vars(kind).values())
    return hasattr(parent, name) or any(name in _words(f.__code__) for f in functions if f is not None)


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant  # getattr(self, "name")
        elif isinstance(constant, CodeType):
            yield from _words(constant)


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _distribution(package: str) -> str:
    return package.replace("_", "-")


def _gone(parents: list[type], name: str) -> ConfigError:
    # Beside another parent, torch's is the one that keeps its names.
    parent = min(parents, key=lambda kind: _package(kind) == "torch")
    return _misfit(parent, f"{parent.__name__} has no {name}")


def _misfit(parent: type, what: str) -> ConfigError:
    return _refusal(_distribution(_package(parent)), what)


def _refusal(package: str, what: str) -> ConfigError:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        version = "(of unknown version)"
    newest = f"<={TESTED[package]}" if package in TESTED else ""
    return ConfigError(
        f"{package} {version} does not fit dude-peft {__version__}: {what}; "
        f"run: {install(PROJECT, f'{package}{newest}', option='-U')}"
    )
