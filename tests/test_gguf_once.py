"""A GGUF file is parsed once for tokenizer, configuration and weights, to the bits that transformers finds alone."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import read_field

from dude_peft.config.schema import ModelSection
from dude_peft.errors import DudeError
from dude_peft.model import gguf_once
from dude_peft.model.load import load_model, load_settings, load_tokenizer, locate

WIDTH, INNER, PIECES = 64, 96, 260


def save_gguf(path: Path, seed: int = 0) -> Path:
    """A Llama of one layer with a vocabulary, some of its weights in four bits."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "2", *(f"t{number}" for number in range(PIECES - 3))])
    writer.add_token_types([1] * PIECES)
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    numbers = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": (PIECES, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (WIDTH // 2, WIDTH),
        "blk.0.attn_v.weight": (WIDTH // 2, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": (INNER, WIDTH),
        "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
    }
    for name, shape in shapes.items():
        values = numbers.standard_normal(shape, dtype=np.float32)
        if ".attn_" in name and len(shape) == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def section(tmp_path):
    save_gguf(tmp_path / "model.gguf")
    yield ModelSection(name_or_path=str(tmp_path), gguf_file="model.gguf")
    gguf_once.forget()


@pytest.fixture
def parses(monkeypatch):
    found = []
    plain = gguf.gguf_reader.GGUFReader.__init__

    def counted(self, path, *rest):
        found.append(Path(path).name)
        plain(self, path, *rest)

    monkeypatch.setattr(gguf.gguf_reader.GGUFReader, "__init__", counted)
    return found


def test_tokenizer_configuration_and_weights_are_those_of_transformers_alone(section):
    where = section.name_or_path
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file="model.gguf")
    settings = AutoConfig.from_pretrained(where, gguf_file="model.gguf")
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file="model.gguf", dtype=torch.float32)
    for _ in range(2):
        assert load_tokenizer(section, where).get_vocab() == tokenizer.get_vocab()
        assert load_settings(section, where).to_dict() == settings.to_dict()
        found = load_model(section, where).state_dict()
        wanted = model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_it_is_parsed_once(section, parses):
    where = locate(section)
    load_tokenizer(section, where)
    load_settings(section, where)
    load_model(section, where)
    assert parses == ["model.gguf"]
    assert gguf_once._Kept.found is None, "what was parsed is let go"
    assert gguf.GGUFReader is gguf.gguf_reader.GGUFReader, "other code reads as ever"


def test_a_file_that_changed_is_parsed_again(section, parses):
    where = locate(section)
    first = load_model(section, where).state_dict()["model.embed_tokens.weight"]
    load_settings(section, where)
    path = Path(where) / "model.gguf"
    before = path.stat()
    save_gguf(path, seed=1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # some disks count in seconds
    second = load_model(section, where).state_dict()["model.embed_tokens.weight"]
    assert not torch.equal(first, second)
    assert len(parses) == 3


def test_a_fault_leaves_gguf_as_it_was(section):
    where = locate(section)
    path = Path(where) / "model.gguf"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(DudeError):
        load_model(section, where)
    assert gguf.GGUFReader is gguf.gguf_reader.GGUFReader
    path.write_bytes(content)
    load_model(section, where)


def test_the_elements_of_arrays_are_those_that_gguf_reads(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    arrays = {
        "texts": ["", "a", "ĠLanguage", "日本"],
        "bytes": [0, 255],
        "ids": [-1, 0, 2**31 - 1],
        "scores": [0.1, -1e30],
        "marks": [True, False],
    }
    kinds = {"bytes": "UINT8", "ids": "INT32", "scores": "FLOAT32", "marks": "BOOL", "texts": "STRING"}
    for name, values in arrays.items():
        kind = gguf.GGUFValueType[kinds[name]]
        writer.add_key_value(f"our.{name}", values, gguf.GGUFValueType.ARRAY, sub_type=kind)
    writer.add_name("tiny")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = gguf.GGUFReader(tmp_path / "model.gguf")
    wanted = {name: read_field(plain, name) for name in plain.fields}
    with gguf_once.parsed_once():
        ours = gguf.GGUFReader(tmp_path / "model.gguf")
        found = {name: read_field(ours, name) for name in ours.fields}
    assert {name: read_field(ours, name) for name in ours.fields} == wanted, "transformers' own function reads them too"
    assert found == wanted
    assert list(map(type, found["our.scores"])) == [float, float]
    gguf_once.forget()
