"""Builds the wheel and tries it where there is no repository: a fresh environment, the command, two steps of training.

    python scripts/test_wheel.py [--python INTERPRETER]

The model is made on the spot, so that nothing is fetched but packages.
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
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[train]")
        os.chdir(place)
        os.environ["HF_HUB_OFFLINE"] = "1"
        for key in ("PYTHONPATH", "VIRTUAL_ENV"):
            os.environ.pop(key, None)
        dude = programs / "dude"
        run(dude, "--version")
        run(python, "-c", MODEL, "model")
        run(dude, "config", "new", "builtin:word-problems", "--model", "./model", "-o", "run.yaml")
        run(dude, "train", "run.yaml", "--set", "train.max_steps=2", "--set", "evaluation.rows=2",
            "--set", "data.train_rows=24", "--set", "data.test_rows=4", "--set", "adapter.r=4",
            "--output-dir", "out")  # fmt: skip
        run(dude, "verify", "out/adapter", "--base", "./model")
        run(dude, "plan", "builtin:quickstart", "--set", "model.name_or_path=./model", "--set", "model.gguf_file=null")
    print("the wheel installs, starts and trains")


def run(*command: object) -> None:
    """One command, shown."""
    words = [str(word) for word in command]
    print("$", *(words if "\n" not in " ".join(words) else words[:2]), flush=True)
    subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
