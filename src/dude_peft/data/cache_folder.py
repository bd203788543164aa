"""Where caches are: the folder that DUDE_CACHE names, else the user's cache, else one that ends with the process.

A cache may be deleted at any time.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from dude_peft.errors import ResourceError
from dude_peft.show import shown


def cache_folder() -> Path:
    """The folder of all caches: DUDE_CACHE, else XDG_CACHE_HOME/dude, else ~/.cache/dude, else a temporary one.

    Raises ResourceError where DUDE_CACHE names a folder that cannot be written.
    """
    named = os.environ.get("DUDE_CACHE")
    if named:
        folder = Path(named).expanduser()
        if not _writable(folder):
            raise ResourceError(
                f"DUDE_CACHE: {shown(folder, 300)} is not writable; set it to another folder, or unset it"
            )
        return folder
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = usual.expanduser() / "dude"
    except RuntimeError:  # nobody's home
        return _temporary()
    return folder if folder.is_absolute() and _writable(folder) else _temporary()


def _writable(folder: Path) -> bool:
    """Whether a file can be made there: a read-only disk tells only when tried."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@functools.cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="dude-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
