"""Adapter files as a stranger would forge them: refused at once, in one line, with next to nothing allocated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import struct
import time
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import make
from peft import get_peft_model
from served import dude

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.header import read_header
from dude_peft.artifact.manifest import read_manifest
from dude_peft.errors import ArtifactError, ConfigError, DudeError
from dude_peft.exporting.run import merge
from dude_peft.exporting.verify import verify

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An adapter on one layer, of a few KiB."""
    folder = tmp_path_factory.mktemp("small")
    get_peft_model(base(), DudeConfig(r=1, target_modules=["linear"])).save_pretrained(folder)
    assert (folder / WEIGHTS).stat().st_size < 4096
    return folder


def base():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 4, bias=False)})


@pytest.fixture
def copied(small, tmp_path):
    shutil.copytree(small, tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder, error=ArtifactError):
    with pytest.raises(error) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def file_of(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FORGED = {
    "empty": b"",
    "zeros": bytes(4096),
    "length only": struct.pack("<Q", 2),
    "huge length": struct.pack("<Q", 1 << 63) + b"{}",
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "length of all memory": struct.pack("<Q", (1 << 40)) + b"{" + bytes(100),
    "no json": file_of(b"\xff\xfe{}"),
    "a list": file_of(b"[]"),
    "a number": file_of(b"12"),
    "deep": file_of(b"[" * 100_000),
    "deep objects": file_of(b'{"a":' * 50_000),
    "duplicate keys": file_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', bytes(8)),
    "overlap": file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "hole": file_of({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "beyond the end": file_of({"a": entry((1 << 40,), (0, 1 << 42))}, bytes(8)),
    "overflow": file_of({"a": entry((1 << 62, 4), (0, 8))}, bytes(8)),
    "empty but vast": file_of({"a": entry((0, 1 << 62), (0, 0))}),
    "negative": file_of({"a": entry((-2,), (0, 8))}, bytes(8)),
    "backwards": file_of({"a": entry((2,), (8, 0))}, bytes(8)),
    "floats": file_of({"a": entry((2.0,), (0, 8))}, bytes(8)),
    "booleans": file_of({"a": entry((True,), (0, 4))}, bytes(4)),
    "5000 dimensions": file_of({"a": entry((1,) * 5000, (0, 4))}, bytes(4)),
    "300 000 tensors": file_of({f"t{i}": entry((0,), (0, 0)) for i in range(300_000)}),
    "unknown dtype": file_of({"a": entry(dtype="F31")}, bytes(8)),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "trailing bytes": file_of({"a": entry()}, bytes(9)),
    "metadata of numbers": file_of({"__metadata__": {"dude": 1}}),
    "metadata no object": file_of({"__metadata__": "x"}),
    "a long text": file_of(b'{"' + b"x" * (20 << 20) + b'":1}'),
    "nan": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_header_is_refused_at_once(name, copied):
    (copied / WEIGHTS).write_bytes(FORGED[name])
    tracemalloc.start()
    start = time.perf_counter()
    try:
        text = refused(copied)
        took, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert WEIGHTS in text
    assert took < 0.5
    assert peak < 50e6


@pytest.mark.slow
def test_every_bit_of_a_small_adapter_counts(copied):
    for name in (WEIGHTS, CONFIG):
        data = (copied / name).read_bytes()
        before = json.loads(data) if name == CONFIG else None
        missed = []
        for place in range(len(data)):
            for bit in range(8):
                flipped = data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
                (copied / name).write_bytes(flipped)
                try:
                    read_manifest(copied)
                except ArtifactError:
                    continue
                missed.append((place, flipped))
        (copied / name).write_bytes(data)
        # What is left is another layout of the same content: a blank that became another blank.
        assert all(name == CONFIG and json.loads(flipped) == before for _, flipped in missed)


def test_every_truncation_of_a_small_adapter_is_refused(copied):
    data = (copied / WEIGHTS).read_bytes()
    for cut in range(len(data)):
        (copied / WEIGHTS).write_bytes(data[:cut])
        refused(copied)


def test_a_thousand_flipped_bits_of_a_larger_adapter(tmp_path):
    get_peft_model(make("llama"), DudeConfig(r=16, target_modules="all-linear")).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    size = path.stat().st_size
    assert size > 200_000
    generator = torch.Generator().manual_seed(0)
    with path.open("r+b") as file:
        for place, bit in zip(
            torch.randint(size, (1000,), generator=generator).tolist(),
            torch.randint(8, (1000,), generator=generator).tolist(),
            strict=True,
        ):
            file.seek(place)
            (byte,) = file.read(1)
            for value in (byte ^ (1 << bit), byte):
                file.seek(place)
                file.write(bytes([value]))
                file.flush()
                if value != byte:
                    refused(tmp_path)
    read_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["directory", "fifo", "absent"])
def test_what_is_no_file_is_refused_without_waiting(kind, copied):
    (copied / WEIGHTS).unlink()
    if kind == "directory":
        (copied / WEIGHTS).mkdir()
    elif kind == "fifo":
        os.mkfifo(copied / WEIGHTS)
        assert stat.S_ISFIFO((copied / WEIGHTS).stat().st_mode)
    start = time.perf_counter()
    assert "is missing" in refused(copied)
    assert time.perf_counter() - start < 1


def test_pickles_are_never_read(copied, tmp_path):
    marker = tmp_path / "marker"
    (copied / WEIGHTS).unlink()
    code = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        (copied / name).write_bytes(code)
    assert "a pickle" in refused(copied)
    with pytest.raises(DudeError):
        load_adapter(base(), copied)
    assert not marker.exists()


def reseal(folder, change):
    """Change the manifest and make its seal fit, as a careful forger would."""
    path = folder / WEIGHTS
    header = read_header(path)
    manifest = json.loads(header.metadata["dude"])
    change(manifest)
    text = json.dumps(manifest)
    metadata = {"format": "pt", "dude": text, "dude_sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), metadata))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_forged_manifest_ends_in_one_of_our_errors(copied, small, data):
    shutil.copy(small / WEIGHTS, copied / WEIGHTS)
    fields = json.loads(read_header(copied / WEIGHTS).metadata["dude"])
    group = data.draw(st.sampled_from([None, "config", "base", "tensors"]))
    keys = sorted(fields if group is None else fields[group])
    key, value = data.draw(st.sampled_from(keys)), data.draw(VALUES)

    def change(manifest):
        (manifest if group is None else manifest[group])[key] = value

    reseal(copied, change)
    with contextlib.suppress(DudeError):  # or the value was a legal one
        load_adapter(base(), copied)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "rslora"}, {"method": "dora"}, {"method": "dude"}, {"r": 1}, {"lora_alpha": 17},
        {"lora_alpha": 1e308}, {"alpha_pattern": {"linear": 3}}, {"target_modules": None}, {"method": "x" * 9999},
    ],
)  # fmt: skip
def test_settings_that_change_what_the_adapter_computes_are_damage(change, tmp_path):
    model = get_peft_model(base(), DudeConfig(method="lora", r=2, target_modules=["linear"]))
    model.save_pretrained(tmp_path)
    reseal(tmp_path, lambda manifest: manifest["config"].update(change))
    for use in (lambda: load_adapter(base(), tmp_path), lambda: verify(tmp_path, quiet=True)):
        with pytest.raises(ArtifactError) as caught:
            use()
        assert len(str(caught.value)) < 500


def test_a_module_to_save_that_the_file_does_not_have_is_damage(tmp_path):
    def two():
        return torch.nn.ModuleDict({**base(), "head": torch.nn.Linear(4, 2)})

    get_peft_model(two(), DudeConfig(r=1, target_modules=["linear"])).save_pretrained(tmp_path)
    reseal(tmp_path, lambda manifest: manifest["config"].update(modules_to_save=["head"]))
    with pytest.raises(ArtifactError, match=r"has no tensor .*head"):
        load_adapter(two(), tmp_path)


@pytest.mark.parametrize("key", ["dtype", "shape", "xxh3_128"])
@pytest.mark.parametrize("value", [5, 1.5, None, True, {"a": 1}, [[1]], [1.5], [-1]])
def test_a_fingerprint_of_odd_kinds_is_damage(key, value, copied):
    reseal(copied, lambda manifest: next(iter(manifest["base"].values())).update({key: value}))
    for use in (lambda: load_adapter(base(), copied), lambda: verify(copied, quiet=True)):
        with pytest.raises(ArtifactError):
            use()


NAMES = ["../x", "/etc/passwd", "a/b", "x" * 5000, "\x00", "\x1b[2J", "CON", "a\u202eb", "", "..", "model..layers"]


@pytest.mark.parametrize("name", NAMES)
def test_a_forged_layer_name_is_refused(name, copied):
    reseal(copied, lambda manifest: manifest["base"].update({name: next(iter(manifest["base"].values()))}))
    with pytest.raises(DudeError) as caught:
        load_adapter(base(), copied)
    assert "\n" not in str(caught.value)
    with pytest.raises(DudeError):
        verify(copied, quiet=True)


@pytest.mark.parametrize("name", [*NAMES, "a.b", "nul", "é", "x" * 65])
def test_an_adapter_name_that_is_no_folders_name_is_refused(name, small):
    for call in (
        lambda: get_peft_model(base(), DudeConfig(r=1, target_modules=["linear"]), adapter_name=name),
        lambda: load_adapter(base(), small, adapter_name=name),
    ):
        with pytest.raises(ConfigError, match="adapter_name"):
            call()


@pytest.mark.parametrize("name", ["__dict__", "keys", "training", "forward"])
def test_a_name_that_torchs_lists_have_themselves_is_refused(name):
    with pytest.raises(ConfigError, match="choose another one"):
        get_peft_model(make("llama"), DudeConfig(r=2, target_modules=["q_proj"]), adapter_name=name)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80))
def test_any_adapter_name_is_taken_or_refused(name):
    with contextlib.suppress(ConfigError):
        get_peft_model(base(), DudeConfig(r=1, target_modules=["linear"]), adapter_name=name)
        assert (name.isascii() and name.replace("-", "").replace("_", "").isalnum()) or set(name) <= {"-", "_"}


def test_code_in_a_models_folder_is_never_run(small, tmp_path):
    model, marker = tmp_path / "model", tmp_path / "marker"
    make("llama").save_pretrained(model)
    get_peft_model(make("llama"), DudeConfig(r=1, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    content = json.loads((model / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    (model / "config.json").write_text(json.dumps(content))
    merge([tmp_path / "adapter"], tmp_path / "merged", base=str(model), verify=False, quiet=True)
    content["model_type"] = "evil"
    (model / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError):
        merge([tmp_path / "adapter"], tmp_path / "again", base=str(model), verify=False, quiet=True)
    assert not marker.exists()


def test_a_refusal_is_one_line_at_the_command(copied):
    (copied / WEIGHTS).write_bytes(FORGED["300 000 tensors"])
    done = dude("verify", copied)
    assert done.returncode == 4
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("dude: error[artifact]: ")
    assert WEIGHTS in line
