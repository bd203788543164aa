"""The example scripts, each run as it is: on a tiny model, two steps."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from models import logits
from served import script
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dude_peft import load_adapter

pytest.importorskip("trl", reason="install dude-peft[trl]")

EXAMPLES = Path(__file__).parent.parent / "examples"
OPTIONS = {"dpo.py": [], "grpo.py": ["--max-completion-length", "16"], "sft_trl.py": []}


def run(name: str, *options: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return script(EXAMPLES / name, *options, cwd=cwd, CUDA_VISIBLE_DEVICES="")


def test_all_scripts_are_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(OPTIONS)


@pytest.mark.parametrize("script", OPTIONS)
def test_a_script_trains_and_its_adapter_loads(script, tmp_path):
    save_tiny(tmp_path / "model")
    model = tiny_llama()
    with torch.no_grad():  # a random model never writes ####, and GRPO learns from differences in reward alone
        model.lm_head.weight[tiny_tokenizer().convert_tokens_to_ids("#")] *= 60
    model.save_pretrained(tmp_path / "model")
    options = ["--model", "model", "--output-dir", "out", "--steps", 2, "--learning-rate", 0.01, *OPTIONS[script]]
    done = run(script, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dude chat out" in done.stdout
    base = logits(model)
    tuned = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out").eval()
    assert (logits(tuned) - base).abs().max() > 1e-3
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), base)
    assert tuned.peft_config["default"].base_model_name_or_path == "model"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template  # dude chat needs it
    if script == "dpo.py":
        losses = [float(found) for found in re.findall(r"'loss': '?([0-9.]+)", done.stdout)]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-3)  # the reference is the same model


@pytest.mark.parametrize("script", OPTIONS)
def test_a_model_without_a_chat_template_is_refused(script, tmp_path):
    save_tiny(tmp_path / "model", chat=False)
    done = run(script, "--model", "model", cwd=tmp_path)
    assert done.returncode == 2
    assert "has no chat template" in done.stderr
