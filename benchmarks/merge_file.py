"""`dude merge` of a sharded checkpoint of 3 GB: peak memory, and what is there after it was killed at random.

    python benchmarks/merge_file.py --kills 50
    python benchmarks/merge_file.py --layers 9,18,27,54 --kills 0       how both grow, and what that makes of 100 GB

The checkpoint is a Llama with random bfloat16 weights in shards of 512 MB; the adapter is a `dora` of rank 16 on all
its linear layers, B and magnitudes moved away from the start. The merge runs in a process of its own, whose peak
resident memory (VmHWM) is told. Then it is killed (SIGKILL) at times drawn evenly over its whole duration: the output
has to be absent, or equal to that of a run that nobody disturbed. Of several sizes a line is laid through the times.
With --folder on a disk in memory this takes minutes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch
import transformers
from measure import arguments, console, finish, numbers, set_threads, show

from dude_peft.artifact.manifest import WEIGHTS_FILE, read_manifest, stamp
from dude_peft.init.run import initialise

SHARD_BYTES = 512 << 20


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--layers", default="27", help="27 make 3 GB; several, comma-separated, show the growth")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints are made for the time")
    settings = parser.parse_args()
    set_threads(settings)
    rows: dict[str, dict[str, float]] = {}
    found: dict[str, int] = {}
    for layers in numbers(settings.layers):
        with tempfile.TemporaryDirectory(dir=settings.folder) as temporary:
            folder = Path(temporary)
            size = make_checkpoint(folder / "model", layers)
            make_adapter(folder / "model", folder / "adapter")
            console.print(f"checkpoint of {size / 1e9:.2f} GB made")
            runs = [run(folder) for _ in range(settings.rounds)]
            seconds, peak = (statistics.median(values) for values in zip(*runs, strict=True))
            rows[f"{layers} layers"] = {"bytes": size, "seconds": seconds, "peak_mib": peak / 2**20}
            if settings.kills:
                found = killed(folder, settings.kills, seconds)
    if len(rows) > 1:
        rows["100 GB, by the line"] = by_the_line(list(rows.values()), 100e9)
    show("dude merge", rows, ["bytes", "seconds", "peak_mib"])
    if found:
        show("killed at random", {"SIGKILL": found}, list(found))
    finish("merge a checkpoint", settings, {"merge": rows, "killed": found})


def by_the_line(rows: list[dict[str, float]], size: float) -> dict[str, float]:
    """What a line through the measured times says of another size; memory follows from the largest tensors alone."""
    line = statistics.linear_regression([row["bytes"] for row in rows], [row["seconds"] for row in rows])
    seconds = line.intercept + line.slope * size
    return {"bytes": size, "seconds": seconds, "peak_mib": max(row["peak_mib"] for row in rows)}


def make_checkpoint(folder: Path, layers: int) -> int:
    """A sharded checkpoint without ever building the model; returns its bytes."""
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    generator = torch.Generator().manual_seed(0)
    places: dict[str, int] = {}
    total = 0
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        if filled + tensor.nbytes > SHARD_BYTES and shards[-1]:
            write_shard(folder, len(shards), shards[-1])
            shards[-1] = {}
            shards.append({})
            filled = 0
        shards[-1][name], places[name] = tensor, len(shards)
        filled, total = filled + tensor.nbytes, total + tensor.nbytes
    write_shard(folder, len(shards), shards[-1])
    index = {"metadata": {"total_size": total}, "weight_map": {n: shard_name(i) for n, i in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"model-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    """One file."""
    safetensors.torch.save_file(tensors, folder / shard_name(number), {"format": "pt"})


def make_adapter(model: Path, adapter: Path) -> None:
    """A dora adapter of rank 16 with B and the magnitudes moved."""
    initialise(str(model), adapter, {"method": "dora", "r": 16, "lora_alpha": 16, "target_modules": "all-linear"})
    manifest = read_manifest(adapter)
    tensors = safetensors.torch.load_file(adapter / WEIGHTS_FILE)
    generator = torch.Generator().manual_seed(1)
    for name in manifest.base:
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_B.weight"].normal_(std=0.01, generator=generator)
        m0 = tensors[f"{key}.lora_m0"]
        tensors[f"{key}.lora_dm"] = m0 * 1e-3
        tensors[f"{key}.lora_magnitude_vector.weight"] = m0 + tensors[f"{key}.lora_dm"]
    safetensors.torch.save_file(tensors, adapter / WEIGHTS_FILE, {"format": "pt"})
    stamp(adapter, manifest.config, manifest.record)


def run(folder: Path) -> tuple[float, int]:
    """An undisturbed merge in a process of its own: seconds behind the imports, peak resident bytes with them."""
    program = (
        "import sys, time; from dude_peft.exporting import base, merge as _\n"
        "from dude_peft.exporting.run import merge\n"
        "start = time.perf_counter()\n"
        "merge([sys.argv[1]], sys.argv[2], base=sys.argv[3], verify=False, quiet=True)\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(time.perf_counter() - start, int(status['VmHWM'].split()[0]) * 1024)"
    )
    shutil.rmtree(folder / "merged", ignore_errors=True)
    command = [sys.executable, "-c", program, *(str(folder / name) for name in ("adapter", "merged", "model"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), int(peak)


# A process of its own: it has run nothing yet, so that what it forks has no threads of torch's missing.
_KILLER = """
import json, os, random, shutil, signal, sys, time
sys.path.insert(0, sys.argv[2])
from merge_file import Path, digests
from dude_peft.exporting import base, merge as _
from dude_peft.exporting.run import merge
import torch
torch.set_num_threads(1)
folder, count, seconds = Path(sys.argv[1]), int(sys.argv[3]), float(sys.argv[4])

def start():
    child = os.fork()
    if child == 0:
        code = 1
        try:
            merge([folder / "adapter"], folder / "merged", base=str(folder / "model"), verify=False, quiet=True)
            code = 0
        finally:
            os._exit(code)
    return child

whole = digests(folder / "merged")
random.seed(0)
found = {"kills": count, "absent": 0, "whole": 0, "torn": 0, "ended before": 0, "failed": 0}
for _ in range(count):
    shutil.rmtree(folder / "merged", ignore_errors=True)
    child = start()
    time.sleep(random.uniform(0, 1.1 * seconds))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        found["failed" if os.WEXITSTATUS(status) else "ended before"] += 1
    if not (folder / "merged").exists():
        found["absent"] += 1
    else:
        found["whole" if digests(folder / "merged") == whole else "torn"] += 1
shutil.rmtree(folder / "merged", ignore_errors=True)
found["merged at last"] = int(os.waitpid(start(), 0)[1] == 0 and digests(folder / "merged") == whole)
found["left beside"] = len(list(folder.glob(".dude-*")))
print(json.dumps(found))
"""


def killed(folder: Path, count: int, seconds: float) -> dict[str, int]:
    """A merge started and killed `count` times; the last one is left to end, over what the killed ones left."""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", _KILLER, str(folder), here, str(count), str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def digests(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
            found[path.name] = digest.hexdigest()
    return found


if __name__ == "__main__":
    main()
