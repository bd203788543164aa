"""A limit on the memory of the process of rewards, and room to tell that it was reached."""

from __future__ import annotations

import sys

IS_LIMITED = sys.platform == "linux"
"""Whether this system ends what takes more; others have the call and ignore it, or count mapped files."""
_SPARE_BYTES = 64 << 20
"""Left behind the limit: whoever met it may have kept all of it, and still has to be told of."""


def limit_memory(gib: float) -> None:
    """Lets this process have so many GiB of memory of its own, and each process that it starts as many.

    Linux counts what a process may write and shares with nobody, not the addresses that libraries reserve, of which
    CUDA takes more than any machine has.
    """
    if not IS_LIMITED:
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    soft = int(gib * 2**30)
    hard = soft + _SPARE_BYTES
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def spare_memory() -> None:
    """Lets this process have what `limit_memory` has left for it to tell of its end."""
    if not IS_LIMITED:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
