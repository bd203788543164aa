"""Time to load and to save an adapter: ours (checked, with its frozen start) against PEFT's LoRA of the same rank.

    python benchmarks/load.py --json benchmarks/results/DATE-load.json

Our file holds rank 2r and A0, its hashes are checked, and so is every adapted weight of the base; PEFT checks nothing.
`read and hash` is the floor of what those checks cost: the file through sha256 and the base weights through XXH3, once.
`load the base` is transformers' own loading of the base model, `print of the base` hashes every tensor of it.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measure import arguments, console, finish, interleaved, set_threads, show
from peft import LoraConfig, PeftModel, get_peft_model
from subjects import llama
from transformers import AutoModelForCausalLM

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.fingerprint import fingerprint, sha256_of, xxh3_of
from dude_peft.tuner import DudeLinear


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    settings = parser.parse_args()
    set_threads(settings)
    folder = Path(tempfile.mkdtemp(prefix="dude-load-"))
    try:
        results, notes = measured(settings, folder)
    finally:
        shutil.rmtree(folder)
    show("Loading an adapter", results, ["median_seconds", "ratio", "ratio_low", "ratio_high"])
    for note in notes:
        console.print(note)
    finish("load", settings, results, notes)


def measured(settings, folder):
    """Time of every case, on one base model that is stripped of its adapter between the rounds."""
    intermediate = 8 * settings.hidden // 3 // 64 * 64
    dtype = getattr(torch, settings.dtype)
    base = llama(dtype, settings.hidden, settings.layers, intermediate, vocabulary=32000).eval()
    common = {"r": settings.r, "target_modules": "all-linear"}
    configs = {"PEFT LoRA": LoraConfig(**common), "dude": DudeConfig(**common, svd_tol=0.1)}
    sizes, hashed, adapted = {}, [], {}
    base.save_pretrained(folder / "base")
    for name, adapter in configs.items():
        model = get_peft_model(base, adapter)
        model.save_pretrained(folder / name)
        adapted[name] = get_peft_model(llama(dtype, settings.hidden, settings.layers, intermediate, 32000), adapter)
        if name == "dude":
            hashed = [m.get_base_layer().weight for m in model.modules() if isinstance(m, DudeLinear)]
        base = model.unload()
        sizes[name] = (folder / name / "adapter_model.safetensors").stat().st_size

    def floor() -> None:
        pieces = [(folder / "dude/adapter_model.safetensors").read_bytes()]
        data = torch.frombuffer(bytearray(pieces[0]), dtype=torch.uint8)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda tensor: xxh3_of([tensor]), hashed))
            list(pool.map(lambda tensor: sha256_of([tensor]), data.split(1 << 20)))

    def hash_all() -> None:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fingerprint, base.state_dict().values()))

    cases = {
        "PEFT LoRA": lambda: PeftModel.from_pretrained(base, folder / "PEFT LoRA", is_trainable=True).unload(),
        "dude": lambda: load_adapter(base, folder / "dude", is_trainable=True).unload(),
        "read and hash": floor,
        "load the base": lambda: AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype),
        "print of the base": hash_all,
        "save PEFT LoRA": lambda: adapted["PEFT LoRA"].save_pretrained(folder / "saved"),
        "save dude": lambda: adapted["dude"].save_pretrained(folder / "saved"),
    }
    notes = [
        f"{sum(p.numel() for p in base.parameters()) / 1e6:.0f} M parameters in {settings.dtype}, "
        f"{len(hashed)} layers of {sum(w.nbytes for w in hashed) / 2**20:.0f} MiB; files "
        + ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
    ]
    return interleaved(cases, settings.rounds, settings.device), notes


if __name__ == "__main__":
    main()
