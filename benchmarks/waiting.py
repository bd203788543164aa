"""What a user waits for before anything happens: the first import, and `dude train` from Enter to its first step.

    python benchmarks/waiting.py --before ../before/src --json benchmarks/results/DATE-waiting.json

SmolLM2-135M comes from its GGUF file. Every case is a process of its own. A run is watched until it says that its first
step is made, and then killed: that step is a part of the time, in both versions.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import add_model, arguments, console, finish, interleaved, show

_SOURCE = Path(__file__).parents[1] / "src"
COLUMNS = ["median_seconds", "ratio", "ratio_low", "ratio_high"]


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--before", type=Path, help="source tree of another version, timed beside this one")
    add_model(parser)
    settings = parser.parse_args()
    sources = {"": _SOURCE} if settings.before is None else {", before": settings.before.resolve(), "": _SOURCE}
    with tempfile.TemporaryDirectory(prefix="dude-waiting-") as scratch:
        path = _write_yaml(settings, Path(scratch))
        imports: dict[str, Callable[[], None]] = {"python alone": lambda: _python("pass", _SOURCE)}
        starts: dict[str, Callable[[], None]] = {}
        for name, source in sources.items():
            imports[f"import dude_peft{name}"] = lambda source=source: _python("import dude_peft", source)
            starts[f"to the first step{name}"] = lambda source=source: _to_first_step(path, source)
        results = {
            "import": interleaved(imports, settings.rounds),
            "train": interleaved(starts, settings.rounds),
        }
    for title, rows in results.items():
        show(title, rows, COLUMNS)
    more = results["import"]["import dude_peft"]["median_seconds"] - results["import"]["python alone"]["median_seconds"]
    console.print(f"import dude_peft: {1000 * more:.0f} ms more than Python alone")
    finish("waiting", settings, results)


def _write_yaml(settings: argparse.Namespace, folder: Path) -> Path:
    config = {
        "model": {"name_or_path": settings.model, "gguf_file": settings.gguf_file or None, "dtype": "float32"},
        "data": {"train": "builtin:word-problems", "train_rows": 8},
        "train": {"learning_rate": 3e-4, "max_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1},
        "evaluation": {"enabled": False},
        "output_dir": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def _python(code: str, source: Path) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment(source))


def _to_first_step(config: Path, source: Path) -> None:
    shutil.rmtree(config.parent / "run", ignore_errors=True)
    command = [sys.executable, "-m", "dude_peft.cli", "train", str(config)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment(source)
    ) as run:
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            said.append(line)
            if line.startswith("step 1/"):
                run.kill()
                return
    raise RuntimeError("the run ended before its first step:\n" + "".join(said)[-2000:])


def _environment(source: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(source), "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    main()
