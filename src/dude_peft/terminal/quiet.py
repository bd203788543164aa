"""Keeps other libraries' chatter off the terminal, and puts real warnings where the run keeps them."""

from __future__ import annotations

import contextlib
import io
import logging
import mmap
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_TALKATIVE = ("transformers", "accelerate", "peft", "torchao", "datasets", "lm_eval", "math_verify")


# Less than what torch, transformers and PEFT take before they do anything.
_LEAST_BYTES = 1 << 30


def require_room() -> None:
    """Refuse a limit on memory (`ulimit -v`) under which the libraries themselves do not fit.

    Some of them end the process where they get none, with lines and exit codes of their own.

    Raises:
        MemoryError: there is less than 1 GiB of it.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY and "torch" not in sys.modules:
        try:
            mmap.mmap(-1, _LEAST_BYTES).close()
        except OSError as error:
            raise MemoryError(str(error)) from error


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Within: imports may write what they like, it is not shown. After: these libraries only report errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # handlers that were made before keep the real stderr
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)


@contextlib.contextmanager
def gathered_warnings(tell: Callable[[str], None]) -> Iterator[None]:
    """Within: each warning goes to `tell` once; notes between libraries about their next versions are dropped."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        tell(" ".join(str(message).split()))

    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show
        yield
