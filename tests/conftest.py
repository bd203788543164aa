"""Shared settings of the test suite."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "DUDE_CACHE" not in os.environ:  # tests shall neither fill nor find a user's own
    os.environ["DUDE_CACHE"] = tempfile.mkdtemp(prefix="dude-cache-")
    atexit.register(shutil.rmtree, os.environ["DUDE_CACHE"], ignore_errors=True)

import torch
from hypothesis import settings

# Without a GPU the kernels run in Triton's interpreter; Triton asks when it is imported, and transformers imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The models are tiny, a second thread would only wait; bit-for-bit comparisons hold for a fixed count.
torch.set_num_threads(1)

# A shell starts what is in its background deaf to Ctrl-C, and so would be the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# CI judges a change, not the luck of a draw; locally every run draws anew.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_finish() -> None:
    """The libraries' own million objects are not looked through at every collection: accelerate asks for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def assets() -> Path:
    """Folder of the real data and models (see CONTRIBUTING), or a skip that says so."""
    folder = os.environ.get("DUDE_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real data and models are not here: set DUDE_ASSETS to their folder")
    return Path(folder)
