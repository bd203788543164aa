"""benchmarks/gpu.sh cannot rot while no GPU is there: its parts run at sizes that say nothing."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="install dude-peft[train]")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
# The suite runs the kernels' tests anyway; compiling takes minutes.
NIGHTLY = ("kernels-correct", "step-7b-compiled")


def parts(folder):
    """Name -> the arguments that the script gives to Python."""
    echo = folder / "echo"
    echo.write_text("#!/bin/bash\nprintf '%q ' \"$@\"\n")
    echo.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(echo)}
    subprocess.run(["bash", str(SCRIPT), str(folder), "--small"], check=True, env=environment, capture_output=True)
    return {log.stem: shlex.split(log.read_text()) for log in folder.glob("*.log")}


def test_every_part_that_a_cpu_can_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = parts(tmp_path)
    assert len(found) > len(NIGHTLY) + 5
    for name, arguments in found.items():
        if name in NIGHTLY:
            continue
        program, *rest = arguments
        monkeypatch.setattr(sys, "argv", [program, *rest])
        runpy.run_path(str(ROOT / program), run_name="__main__")
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["results"]


@pytest.mark.slow
def test_the_script_as_it_stands(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT), str(tmp_path), "--small"], env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, (tmp_path / "parts.txt").read_text()
