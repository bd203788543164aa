"""Time and memory of the start: the SVD, a model in memory, and `dude init` on a checkpoint.

    python benchmarks/init.py --json benchmarks/results/DATE-init.json
    python benchmarks/init.py --parts checkpoint --layers 32          # a whole 7B checkpoint: 13 GiB of disk

svd         the top 16 triplets of a 4096 x 4096 matrix against a full SVD: time, and the energy that is missed
model       `get_peft_model` on a Llama of about 100 M parameters, against PEFT's ways to start
threads     layers one after the other with all of torch's threads, several layers at a time, and batched by shape
checkpoint  `dude init` on a checkpoint with every shape of a Llama 7B (or 70B, `--shapes`) in bfloat16, random weights
            with a spectrum that falls as 1/sqrt(i); `--layers` of all, the rest by extrapolation
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
import transformers
from measure import arguments, console, finish, interleaved, set_threads, show
from peft import LoraConfig, get_peft_model
from subjects import llama

from dude_peft import DudeConfig
from dude_peft.core.svd import top_svd

PARTS = ("svd", "model", "threads", "checkpoint")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "7B": (dict(zip(_SIZES, (4096, 11008, 32, 32), strict=True)), 32),
    "70B": (dict(zip(_SIZES, (8192, 28672, 64, 8), strict=True)), 80),
}
"""Of one layer, and how many layers there are."""
TIMES = ["median_seconds", "ratio", "ratio_low", "ratio_high"]


def main() -> None:
    """Measure the parts that are asked for, and print."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--side", type=int, default=4096, help="svd: of the square matrix")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=768, help="model: hidden size")
    parser.add_argument("--model-layers", type=int, default=12)
    parser.add_argument("--slow", action="store_true", help="model: PEFT's full-SVD pissa too")
    parser.add_argument("--shapes", choices=[*SHAPES], default="7B", help="checkpoint: whose")
    parser.add_argument("--layers", type=int, default=2, help="checkpoint: how many of its layers are made")
    parser.add_argument("--workers", type=int, default=None, help="checkpoint: of dude init")
    parser.add_argument("--folder", type=Path, default=None, help="checkpoint: where it is made for the time")
    settings = parser.parse_args()
    set_threads(settings)
    results, notes = {}, []
    for part in settings.parts:
        results[part] = globals()[f"{part}_part"](settings, notes)
    for note in notes:
        console.print(note)
    finish("init", settings, results, notes)


def decaying(out: int, in_: int, generator: torch.Generator) -> torch.Tensor:
    """Random (out, in) whose column scales fall as 1 / sqrt(i), which its singular values follow; quick to make."""
    return 0.02 * torch.randn(out, in_, generator=generator) * torch.arange(1, in_ + 1) ** -0.5


def svd_part(settings, notes):
    """Top r against a full SVD of the same matrix."""
    W = decaying(settings.side, settings.side, torch.Generator().manual_seed(0)).to(settings.device)
    found = {}

    def full() -> None:
        found["full"] = torch.linalg.svdvals(W.double())[: settings.r] if "full" not in found else found["full"]
        torch.linalg.svd(W, full_matrices=False)

    def top() -> None:
        found["top"] = top_svd(W, settings.r).S

    rounds = min(settings.rounds, 3)  # a full SVD takes half a minute
    rows = interleaved({"full SVD": full, f"top {settings.r}": top}, rounds, settings.device)
    exact = found["full"].square().sum()
    missed = float((exact - found["top"].double().square().sum()) / exact)
    show(f"SVD of {settings.side} x {settings.side}", rows, TIMES)
    notes.append(f"top {settings.r} misses {missed:.1e} of the energy of the {settings.r} largest singular values")
    return {**rows, "missed_energy": missed}


def _llama(settings):
    intermediate = 8 * settings.hidden // 3 // 64 * 64
    model = llama(torch.float32, settings.hidden, settings.model_layers, intermediate)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(decaying(*module.weight.shape, generator))
    return model.to(settings.device)


def model_part(settings, notes):
    """`get_peft_model`, the adapter taken off again each time."""
    model = _llama(settings)
    common = {"r": settings.r, "target_modules": "all-linear"}
    configs = {
        "PEFT LoRA": lambda: LoraConfig(**common),
        "PEFT pissa_niter_4 + use_dora": lambda: LoraConfig(**common, init_lora_weights="pissa_niter_4", use_dora=True),
        "DuDe": lambda: DudeConfig(**common),
    }
    if settings.slow:
        configs["PEFT pissa"] = lambda: LoraConfig(**common, init_lora_weights="pissa")

    def case(config):
        def timed() -> None:
            get_peft_model(model, config()).unload()

        return timed

    def frozen() -> None:
        model.requires_grad_(False)

    cases = {name: case(config) for name, config in configs.items()}
    rows = interleaved({"DuDe": cases.pop("DuDe"), **cases, "frozen": frozen}, settings.rounds, settings.device)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    show(f"get_peft_model on {count:.0f} M parameters (ratio to DuDe)", rows, TIMES)
    return rows


def threads_part(settings, notes):
    """Ways to share the cores among the layers of one model."""
    model = _llama(settings)
    weights = [m.weight.detach() for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    threads = torch.get_num_threads()

    def in_turn() -> None:
        for weight in weights:
            top_svd(weight, settings.r)

    def one_thread() -> None:
        torch.set_num_threads(1)
        in_turn()
        torch.set_num_threads(threads)

    def pool() -> None:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            list(executor.map(lambda weight: top_svd(weight, settings.r), weights))
        torch.set_num_threads(threads)

    rows = interleaved(
        {
            f"a layer a thread, {threads} at a time": pool,
            "in turn, 1 thread": one_thread,
            f"in turn, {threads} threads": in_turn,
        },
        settings.rounds,
        settings.device,
    )
    show(f"top {settings.r} of {len(weights)} weights", rows, TIMES)
    steps = interleaved(_step_cases(weights, threads), settings.rounds, settings.device)
    show(
        "the products and orthogonalisations alone: 8 steps of 16 columns, weights of the commonest shape", steps, TIMES
    )
    return {"svd": rows, "steps": steps}


def _step_cases(weights, threads):
    """A sketch of batching: the same block iteration layer by layer in threads, and as one batch."""
    shapes = [weight.shape for weight in weights]
    shape = max(set(shapes), key=shapes.count)
    stack = torch.stack([weight for weight in weights if weight.shape == shape])
    start = torch.randn(len(stack), shape[1], 16, device=stack.device)

    def iterate(W, X) -> None:
        for _ in range(8):
            X = torch.linalg.qr(W @ X).Q
            X = torch.linalg.qr(W.mT @ X).Q

    def pool() -> None:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            list(executor.map(iterate, stack, start))
        torch.set_num_threads(threads)

    return {f"{threads} threads, a layer each": pool, f"one batch of {len(stack)}": lambda: iterate(stack, start)}


_MEASURED = """
import json, os, sys, threading, time
from dude_peft.init.run import initialise
peaks, own = {}, os.getpid()
def watch():
    while True:
        for pid in [own, *map(int, open(f"/proc/{own}/task/{own}/children").read().split())]:
            try:
                lines = open(f"/proc/{pid}/status").read().splitlines()
                peaks[pid] = int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
            except (OSError, StopIteration):
                pass
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
initialise(sys.argv[1], sys.argv[2], {"r": int(sys.argv[3])}, workers=int(sys.argv[4]) or None)
seconds = time.perf_counter() - start
workers = [peak for pid, peak in peaks.items() if pid != own]
print(json.dumps({"seconds": seconds, "parent_mib": peaks[own] / 1024, "worker_mib": max(workers) / 1024}))
"""


def checkpoint_part(settings, notes):
    """`dude init` by subprocess, its peak memory per process."""
    folder = Path(tempfile.mkdtemp(prefix="dude-init-", dir=settings.folder))
    try:
        shape, whole = SHAPES[settings.shapes]
        largest = _make_checkpoint(folder / "model", shape, settings.layers)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _MEASURED, folder / "model", folder / "adapter"]
        done = subprocess.run(
            [*command, str(settings.r), str(settings.workers or 0)], stdout=subprocess.PIPE, check=True, env=environment
        )
        *said, last = done.stdout.decode().splitlines()
        found = json.loads(last)
        found["layers_seconds"] = float(next(line for line in said if line.startswith("layers: ")).split()[1])
    finally:
        shutil.rmtree(folder)
    found |= {
        "layers": settings.layers,
        "largest_tensor_mib": largest / 2**20,
        "limit_mib": 3 * largest / 2**20 + 512,
        "extrapolated_seconds": found["seconds"] + found["layers_seconds"] * (whole / settings.layers - 1),
    }
    show("dude init", {f"{settings.layers} of {whole} layers of a {settings.shapes}": found}, list(found))
    if settings.layers < whole:
        notes.append(
            f"dude init: {settings.layers} of {whole} layers were made; the whole is the imports once and the "
            "layers' time by proportion; every shape is there, so the peak memory is the whole's"
        )
    return found


def _make_checkpoint(folder: Path, shape: dict[str, int], layers: int) -> int:
    """Writes one shard a layer; returns the bytes of the largest adapted tensor."""
    folder.mkdir()
    config = transformers.LlamaConfig(vocab_size=32000, num_hidden_layers=layers, dtype="bfloat16", **shape)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    generator, places, largest = torch.Generator().manual_seed(0), {}, 0
    start = time.perf_counter()
    for layer in [*(f"model.layers.{i}." for i in range(layers)), ""]:
        names = [name for name in shapes if name not in places and name.startswith(layer)]
        tensors = {}
        for name in names:
            shape = shapes[name]
            if len(shape) == 2 and layer:
                tensors[name] = decaying(*shape, generator).bfloat16()
                largest = max(largest, tensors[name].nbytes)
            else:  # never read
                tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
        file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        safetensors.torch.save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    console.print(f"checkpoint made in {time.perf_counter() - start:.0f} s", style="dim")
    return largest


if __name__ == "__main__":
    main()
