"""Several threads with single-threaded torch in each: how independent pieces of work share the cores.

Torch's own threads meet at the end of every small operation, and wait there for the slowest; on a machine that is busy
with other work they wait long. One piece a thread has no such meetings, and its bits do not depend on the number.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within: torch runs single-threaded in the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def single_threaded_pool(pieces: int, most: int = 16) -> Iterator[ThreadPoolExecutor]:
    """A pool as wide as torch's number of threads; work that has not begun when an error leaves the block is dropped.

    Args:
        pieces: how many there will be; no more threads than that are started.
        most: upper bound of the threads.
    """
    before = torch.get_num_threads()  # the limit is each thread's own, but new threads start with the latest one set
    count = max(1, min(before, pieces, most))
    pool = ThreadPoolExecutor(count, "dude", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
