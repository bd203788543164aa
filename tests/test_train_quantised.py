"""`model.quantization`: a run on a base that is quantised while it loads, from the YAML to the dense model."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from eval_data import write_data
from night import NIGHT, some_by_day
from safetensors.torch import load_file
from served import dude
from test_cli import assert_refused
from test_train_resume import _CutError, cut_at, result
from tiny import save_tiny, write_rows

from dude_peft import METHODS, merge, verify
from dude_peft.artifact.manifest import read_manifest
from dude_peft.config.reading import load_config
from dude_peft.config.schema import ModelSection, QuantizationSection
from dude_peft.errors import ConfigError
from dude_peft.measure.score import held_out_loss
from dude_peft.model import quantised
from dude_peft.model.load import load_model, with_only_gguf
from dude_peft.training import run as run_module
from dude_peft.training.run import run

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; install dude-peft[quant]")

DOUBLE = {"method": "nf4", "double_quantization": True}
FORMATS: dict[str, Any] = {
    "nf4": "nf4",
    "int8": "int8",
    "nf4-double": DOUBLE,
    "fp4": "fp4",
    "torchao": "torchao:int8_weight_only",
    "float8": "torchao:float8_weight_only",
}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model whose inputs are no multiples of 64 everywhere, and rows."""
    folder = tmp_path_factory.mktemp("quantised")
    save_tiny(folder / "model", intermediate_size=172)
    write_rows(folder / "train.jsonl", 22)
    write_rows(folder / "test.jsonl", 4, start=100)
    return folder


def write_yaml(place: Path, name: str, quantization: Any, **sections: dict[str, Any]) -> Path:
    settings: dict[str, Any] = {
        "model": {"name_or_path": str(place / "model"), "quantization": quantization},
        "adapter": {"r": 4, "lora_dropout": 0.1},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl"), "template": "plain"},
        "train": {
            "learning_rate": 0.01,
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "logging_steps": 4,
            "save_steps": 2,
        },
        "evaluation": {"rows": 2, "max_new_tokens": 3, "eval_steps": 3},
        "output_dir": str(place / name),
    }
    for section, changes in sections.items():
        settings[section] |= changes
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def start(file: Path, *sets: str) -> Any:
    return run(load_config(file, sets), quiet=True)


@pytest.fixture(scope="module")
def whole(place) -> Any:
    """Format -> the folder of its uninterrupted run, through the command."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            file = write_yaml(place, f"whole-{name}", FORMATS[name])
            done = dude("train", file)
            assert done.returncode == 0, done.stderr
            made[name] = place / f"whole-{name}"
            # Its page needs the dense weights: `dude report` makes them, at the end of a run nobody waits for that.
            assert not (made[name] / "page.html").exists()
            assert f"dude report {made[name]} -o {made[name]}.html" in done.stdout
        return made[name]

    return get


# --- from the YAML to the dense model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_by_day(FORMATS, ["nf4"]))
def test_killed_and_resumed_through_the_command_it_is_the_same_bit_by_bit(place, whole, tmp_path, monkeypatch, name):
    if name in ("torchao", "float8"):
        pytest.importorskip("torchao", reason="torchao is not installed")
    file = write_yaml(place, f"cut-{name}", FORMATS[name])
    with monkeypatch.context() as patch:
        cut_at(4, patch)
        with pytest.raises(_CutError):
            start(file)
    done = dude("train", file)
    assert done.returncode == 0, done.stderr
    assert "resuming from the checkpoint of step 4" in done.stdout
    ours, theirs = result(place / f"cut-{name}"), result(whole(name))
    lines = [found.pop("lines") for found in (ours, theirs)]
    assert ours == theirs
    assert [line.get("loss") for line in lines[0]] == [line.get("loss") for line in lines[1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"gradient_checkpointing": True, "bf16": True, "optim": "paged_adamw_8bit"}},
        {"train": {"objective": "mol"}, "data": {"general": "train.jsonl", "general_test": "test.jsonl"}},
        {"train": {"trainer": "trl"}, "data": {"packing": True, "max_length": 64}},
    ],
    ids=["checkpointing", "mol", "trl"],
)
def test_other_ways_to_train_resume_as_well(place, monkeypatch, name, sections):
    data = {key: str(place / value) if "gen" in key else value for key, value in sections.get("data", {}).items()}
    files = []
    for kind in ("through", "halved"):
        file = write_yaml(place, f"{kind}-{name}-{'-'.join(sections['train'])}", name, **(sections | {"data": data}))
        files.append(file)
    start(files[0])
    with monkeypatch.context() as patch:
        cut_at(4, patch)
        with pytest.raises(_CutError):
            start(files[1])
    start(files[1])
    ours, theirs = (load_file(place / file.stem / "adapter/adapter_model.safetensors") for file in files)
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_manifest_says_how_the_base_was_quantised_and_every_command_does_it_again(whole, place, tmp_path, name):
    out = whole(name)
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["loss"] < report["before"]["loss"] - 0.2
    recorded = read_manifest(out / "adapter").quantization
    assert quantised.method_of(recorded["config"]) == (FORMATS[name] if isinstance(FORMATS[name], str) else "nf4")
    assert bool(recorded["config"].get("bnb_4bit_use_double_quant")) == (name == "nf4-double")
    done = dude("generate", out / "adapter", "--file", place / "test.jsonl", "--max-new-tokens", 3, "--base-too")
    assert done.returncode == 0, done.stderr
    done = dude("verify", out / "adapter")
    assert done.returncode == 0, done.stderr
    done = dude("merge", out / "adapter", "-o", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    # The held-out loss that the run reported is the saved adapter's, and the merged model's, on the same tokens.
    assert abs(loss_of(merged, place, out) - report["after"]["loss"]) < 1e-4


def loss_of(model: Any, place: Path, out: Path) -> float:
    from dude_peft.training.run_data import read

    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "adapter")
    data = read(load_config(out / "config.yaml").resolved(), tokenizer)
    return held_out_loss(model, data.held_out.examples, pad_id=int(tokenizer.pad_token_id), batch_size=16)


@pytest.mark.slow
def test_chat_evaluation_and_exports(whole, tmp_path):
    adapter = whole("nf4") / "adapter"
    write_data(tmp_path / "data")
    sets = ("--tasks", "mmlu_anatomy", "--data-dir", tmp_path / "data", "--limit", 2)
    done = dude("eval", adapter, *sets, "-o", tmp_path / "scores")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "dude_peft", "chat", str(adapter), "--compare", "--max-new-tokens", "4"]
    talked = subprocess.run(command, input="say 5\n", capture_output=True, text=True, timeout=300, check=False)
    assert talked.returncode == 0, talked.stderr
    done = dude("export", adapter, "--to", "merged", "-o", tmp_path / "dense")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "dense" / "dude_export.json").read_text())["verified"]


@pytest.mark.parametrize("name", some_by_day(FORMATS, ["nf4"]))
def test_the_python_of_the_model_card_loads_it(whole, name):
    card = (whole(name) / "adapter" / "README.md").read_text("utf-8")
    code = card.partition("```python\n")[2].partition("\n```")[0]
    assert "quantization_config=" in code
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].active_adapter == "default"


def test_evaluation_computes_with_the_weights_that_training_uses(place):
    """In evaluation on CPUs bitsandbytes would pack, and round the input of 8-bit layers."""
    ids = torch.arange(3, 40)[None]
    for name in ("nf4", "int8"):
        section = ModelSection(name_or_path=str(place / "model"), quantization={"method": name})
        model = load_model(section, str(place / "model"))
        with torch.no_grad():
            trained, evaluated = (model.train(mode)(input_ids=ids).logits for mode in (True, False))
        assert torch.equal(trained, evaluated)


@pytest.mark.slow
def test_a_checkpoint_that_is_stored_quantised_is_loaded_as_it_is(place, whole):
    section = ModelSection(name_or_path=str(place / "model"), quantization={"method": "nf4"})
    stored = place / "stored"
    load_model(section, str(place / "model")).save_pretrained(stored)
    transformers.AutoTokenizer.from_pretrained(place / "model").save_pretrained(stored)
    file = write_yaml(place, "from-stored", None, model={"name_or_path": str(stored)})
    for key in ("null", "nf4") if NIGHT else ("null",):
        done = dude("train", file, "--set", f"model.quantization={key}", "--output-dir", place / f"stored-{key}")
        assert done.returncode == 0, done.stderr
        trained, same = (
            load_file(out / "adapter/adapter_model.safetensors") for out in (place / f"stored-{key}", whole("nf4"))
        )
        assert all(torch.equal(trained[tensor], same[tensor]) for tensor in same)
    for key, words in (
        ("int8", "method: int8, but the checkpoint"),
        ("none", "method: none, but the checkpoint"),
        ("{method: nf4, double_quantization: true}", "double_quantization: true, but the checkpoint"),
        ("{method: nf4, compute_dtype: bfloat16}", "compute_dtype: bfloat16, but the checkpoint"),
    ):
        for command in ("train", "plan") if NIGHT or key == "int8" else ("train",):
            sets = ("--set", f"model.quantization={key}", "--set", f"output_dir={place / 'refused'}")
            done = dude(command, file, *sets)
            line = assert_refused(done, 2, "config")
            assert words in line
            assert "is stored quantised with" in line
    assert not (place / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_merges(place, tmp_path, method, name):
    file = write_yaml(place, f"{method}-{name}", name, adapter={"method": method}, train={"max_steps": 2})
    start(file)
    verify(place / file.stem / "adapter", base=str(place / "model"))
    merge(place / file.stem / "adapter", tmp_path / "merged")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nf8", "key 'model.quantization': 'nf8' is no format; choose none, nf4, fp4, int8 or torchao:SCHEME"),
        ("torchao", "choose none, nf4, fp4, int8 or torchao:SCHEME"),
        ("torchao:int8", "torchao has no scheme 'int8'; known: "),
        ("torchao:intx_weight_only", "transformers trains no adapters on torchao:intx_weight_only; choose nf4"),
        ("{method: int8, double_quantization: true}", "are for nf4 and fp4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(place, value, words):
    if "torchao:" in value:
        pytest.importorskip("torchao", reason="torchao is not installed")
    file = write_yaml(place, "refused", None)
    assert words in assert_refused(dude("train", file, "--set", f"model.quantization={value}"), 2, "config")


def test_what_takes_plain_weights_is_refused_by_name(place):
    file = write_yaml(place, "plain", "nf4", adapter={"budget": {"parameters": "1%"}})
    for command in ("train", "plan"):
        assert "key 'adapter.budget' does not work on a quantised base" in assert_refused(
            dude(command, file), 2, "config"
        )


def test_a_format_that_does_not_run_here_names_those_that_do(monkeypatch):
    original = quantised._layer

    def layer(asked: QuantizationSection, W: torch.Tensor) -> Any:
        if asked.method in ("nf4", "fp4"):
            raise NotImplementedError("no kernel")
        return original(asked, W)

    monkeypatch.setattr(quantised, "_layer", layer)
    with pytest.raises(ConfigError, match=r"nf4 does not run on cpu in float32 .*no kernel\); choose int8") as caught:
        quantised.check_runs(QuantizationSection(method="nf4"), torch.float32, "cpu")
    assert "fp4" not in str(caught.value).partition("choose")[2]
    assert "\n" not in str(caught.value)


def test_a_format_that_applies_other_weights_or_another_gradient_is_not_trusted(monkeypatch):
    class Wrong(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x.detach() * 2 - x, self.weight)

    def layer(asked: QuantizationSection, W: torch.Tensor) -> Any:
        made = Wrong(W.shape[1], W.shape[0], bias=False)
        made.weight = torch.nn.Parameter(W * (3 if asked.method == "fp4" else 1), requires_grad=False)
        return made

    monkeypatch.setattr(quantised, "_layer", layer)
    for method, words in (("nf4", "its gradient is not"), ("fp4", "it applies other weights")):
        with pytest.raises(ConfigError, match=words):
            quantised.check_runs(QuantizationSection(method=method), torch.float32, "cpu")


def test_without_the_library_the_line_says_how_to_get_it(place, whole, monkeypatch):
    adapter = whole("nf4") / "adapter"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"nf4 needs bitsandbytes: pip install 'dude-peft\[quant\]'"):
        start(write_yaml(place, "missing", "nf4"))
    from dude_peft.answer.speaker import open_speaker
    from dude_peft.terminal.display import Display

    with pytest.raises(ConfigError, match=r"needs bitsandbytes: pip install 'dude-peft\[quant\]'"):
        open_speaker(str(adapter), base=None, gguf_file=None, notes=Display(quiet=True))


def test_another_quantisation_is_another_run(place, whole):
    file = write_yaml(place, "other", "nf4")
    shutil.copytree(whole("nf4"), place / "other")
    line = assert_refused(dude("train", file, "--set", "model.quantization=int8"), 2, "config")
    assert 'model.quantization.method: "nf4" -> "int8"' in line


@pytest.mark.parametrize(("key", "value"), [("quantization", {"method": "nf4"}), ("device_map", "auto")])
def test_a_folder_with_one_gguf_file_is_refused_as_if_its_name_were_given(tmp_path, key, value):
    """dude plan used to accept it, and dude train to end in an error of transformers."""
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match=rf"keys 'model.gguf_file' and 'model.{key}': GGUF weights are dequantised"):
        with_only_gguf(ModelSection(name_or_path=str(tmp_path), **{key: value}))
    assert with_only_gguf(ModelSection(name_or_path=str(tmp_path))).gguf_file == "model.gguf"


def test_gguf_weights_are_not_quantised_again():
    with pytest.raises(ValueError, match=r"dequantised in memory, here a\.gguf; save them as a dense folder"):
        ModelSection(name_or_path="m", gguf_file="a.gguf", quantization={"method": "nf4"})


@pytest.mark.slow
def test_an_export_for_stock_peft_says_what_peft_cannot_do_over_int8(whole, tmp_path):
    """On CPUs its DoRA loses the weights' scales in the first forward; the export is compared over all prompts."""
    done = dude("export", whole("int8") / "adapter", "--to", "peft", "-o", tmp_path / "peft")
    assert done.returncode == 0, done.stderr
    assert "over int8 weights on GPUs alone" in done.stderr
    assert "KL(tuned || export)" in done.stderr + done.stdout
