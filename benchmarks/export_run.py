"""Everything that `dude export` makes of one finished run, on its own held-out rows.

    dude train examples/quickstart.yaml --set train.max_steps=100 --output-dir runs/export
    python benchmarks/export_run.py runs/export --json benchmarks/results/DATE-export-run.json

For every export: captured energy, KL from the live adapter on the built-in prompts (`dude export` runs them in a fresh
process), and held-out loss; merged weights in bfloat16 also rounded to the nearest instead of dithered. For GGUF files
also the greedy continuation of some held-out prompts, token by token, and where it parts from the live adapter's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import arguments, finish, set_threads, show
from peft import PeftModel

from dude_peft import load_adapter
from dude_peft.config.reading import load_config
from dude_peft.data.encode import encode, prompt_ids
from dude_peft.data.rows import load_rows
from dude_peft.data.template import Template
from dude_peft.exporting import merge as merging
from dude_peft.exporting.run import export
from dude_peft.measure.score import held_out_loss
from dude_peft.model.load import load_model, load_tokenizer, locate

COLUMNS = ["held_out_loss", "kl", "kl_worst", "logits", "agreement", "energy", "energy_worst", "greedy_equal"]


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path, help="folder that dude train filled")
    parser.add_argument("--loras", default="8,16,32,64")
    parser.add_argument("--ggufs", default="F32,F16,Q8_0", help="empty for none")
    parser.add_argument("--prompts", type=int, default=20, help="greedy generations")
    parser.add_argument("--new", type=int, default=48, help="tokens of each")
    settings = parser.parse_args()
    set_threads(settings)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run = Run(settings)
    results = {"base model": {"held_out_loss": run.loss(run.base())}}
    live = run.live()
    results["live adapter"] = {"held_out_loss": run.loss(live)}
    answers = run.greedy(live)
    del live
    with tempfile.TemporaryDirectory() as temporary:
        for to in ["merged", *(f"lora:{rank}" for rank in settings.loras.split(","))]:
            folder = Path(temporary) / to.replace(":", "-")
            results[to] = run.exported(to, folder)
            model = run.load(folder) if to == "merged" else PeftModel.from_pretrained(run.base(), str(folder))
            results[to]["held_out_loss"] = run.loss(model)
            del model
        for name, rounding in (("merged, bfloat16", None), ("merged, bfloat16, to the nearest", to_nearest)):
            folder = Path(temporary) / name.replace(" ", "-")
            results[name] = run.exported("merged", folder, rounding, dtype="bfloat16")
            # The rounded weights alone: computed in float32.
            results[name]["held_out_loss"] = run.loss(run.load(folder).float())
        for kind in filter(None, settings.ggufs.split(",")):
            folder = Path(temporary) / kind
            results[f"gguf:{kind}"] = run.exported(f"gguf:{kind}", folder) | run.compared(
                answers, folder / f"model-{kind}.gguf"
            )
    show(f"exports of {settings.run.name}", results, COLUMNS)
    note = "one run, one seed; greedy_parts: place of the first other token of every continuation that is not equal"
    finish("exports of a run", settings, results, [note, json.dumps({"data": run.report["data"]})])


class Run:
    """A finished run: its model, adapter and held-out rows."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.folder: Path = settings.run
        self.report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        self.config = load_config(self.folder / "config.yaml")
        self.where = locate(self.config.model)
        self.tokenizer = load_tokenizer(self.config.model, self.where)
        template = Template(self.tokenizer, self.config.data.template)
        data = self.config.data
        rows = load_rows(data.test, split=data.test_split, limit=data.test_rows, seed=data.seed)
        self.examples = encode(rows, template, self.tokenizer, data.max_length).examples
        self.prompts = [prompt_ids(row, template, self.tokenizer) for row in rows[: settings.prompts]]

    def base(self) -> Any:
        """The pretrained model."""
        return load_model(self.config.model, self.where)

    def live(self) -> Any:
        """The model under the adapter."""
        return load_adapter(self.base(), self.folder / "adapter").eval()

    def load(self, folder: Path) -> Any:
        """A merged model."""
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def loss(self, model: Any) -> float:
        """Mean cross-entropy of the held-out answers, nats a token."""
        return held_out_loss(model, self.examples, pad_id=int(self.tokenizer.pad_token_id), batch_size=32)

    def greedy(self, model: Any) -> list[list[int]]:
        """Likeliest continuation of every prompt, to the end of the answer."""
        found = []
        for prompt in self.prompts:
            with torch.inference_mode():
                out = model.generate(
                    input_ids=torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    generation_config=transformers.GenerationConfig(
                        do_sample=False, max_new_tokens=self.settings.new, pad_token_id=0
                    ),
                )
            found.append(out[0, len(prompt) :].tolist())
        return found

    def exported(self, to: str, folder: Path, rounding: Any = None, **options: Any) -> dict[str, Any]:
        """Exports, and what the verification found."""
        original = merging._rounded
        if rounding is not None:
            merging._rounded = rounding
        try:
            export(self.folder / "adapter", to, folder, quiet=True, **options)
        finally:
            merging._rounded = original
        record = json.loads((folder / "dude_export.json").read_text(encoding="utf-8"))
        row = dict(record["difference"])
        if "captured" in record:
            row["energy"] = statistics.mean(record["captured"].values())
            row["energy_worst"] = min(record["captured"].values())
        return row

    def compared(self, answers: list[list[int]], gguf: Path) -> dict[str, Any]:
        """llama.cpp's greedy continuations beside the live adapter's."""
        program = (
            "import json, sys; from pathlib import Path; from dude_peft.exporting import llama_library as library\n"
            "path, prompts, new = json.load(sys.stdin); print(json.dumps(library.greedy(Path(path), prompts, new)))"
        )
        request = json.dumps([str(gguf), self.prompts, self.settings.new])
        done = subprocess.run(
            [sys.executable, "-c", program], input=request, capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        parts = [
            next((place for place, token in enumerate(ours) if token != theirs[place]), None)
            for ours, theirs in zip(answers, found, strict=True)
        ]
        parted = sorted(place for place in parts if place is not None)
        return {"greedy_equal": f"{len(parts) - len(parted)} of {len(parts)}", "greedy_parts": parted}


def to_nearest(merged: Any, dtype: torch.dtype, first_row: int, name: str) -> Any:
    """What torch does, in place of the dithered rounding."""
    return merged.to(dtype)


if __name__ == "__main__":
    main()
