"""What comes in from outside, at every door: code, files that are none, patterns, sizes, names."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from models import logits, perturb
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM

from dude_peft import DudeConfig, cli
from dude_peft.artifact.manifest import cover_tokenizer
from dude_peft.methods import METHODS

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_tiny"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def dude(monkeypatch, capfd):
    """The command in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        handler = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr(sys, "argv", ["dude", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def line(error):
    """The one line of an error."""
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, rows, the configuration of a run of two steps, and the run."""
    folder = tmp_path_factory.mktemp("doors")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", 8)
    write_config(folder / "run.yaml", folder, folder / "model", folder / "out")
    from dude_peft.config.reading import load_config
    from dude_peft.training.run import run

    run(load_config(folder / "run.yaml"), quiet=True)
    return folder


def write_config(path, folder, model, output, **changes):
    settings = {
        "model": {"name_or_path": str(model), **changes},
        "adapter": {"r": 2},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 64},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        "evaluation": {"enabled": False},
        "output_dir": str(output),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_mixture_in_a_run_ends_in_a_line_or_tells_who_gives_nothing(place, tmp_path, dude):
    write_rows(tmp_path / "few.jsonl", 4)
    config = write_config(tmp_path / "run.yaml", place, place / "model", tmp_path / "out")
    settings = yaml.safe_load(config.read_text())
    settings["data"]["train"] = [
        {"source": str(place / "train.jsonl"), "weight": 1e6},
        {"source": str(tmp_path / "few.jsonl"), "weight": 1},
    ]
    config.write_text(yaml.safe_dump(settings))
    code, _, error = dude("train", config, "--set", "data.train_rows=999999999")
    assert code == 2
    assert "999,999,999 rows is more than" in line(error)
    code, out, error = dude("train", config, "--set", "data.train_rows=8")
    assert code == 0
    assert (out + error).count("of the mixture gives no row") == 1


# --- code ---------------------------------------------------------------------------------------------------------


def test_a_models_own_code_runs_where_the_yaml_says_so_and_nowhere_else(place, tmp_path, dude, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tmp_path / "own"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    marker = tmp_path / "marker"
    (model / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n{OWN_CODE}")
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own_tiny", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (model / "config.json").write_text(json.dumps(config))
    run = write_config(tmp_path / "run.yaml", place, model, tmp_path / "out")
    for command in (("train", run), ("plan", run), ("init", model, "-o", tmp_path / "start"), ("generate", model, "a")):
        code, _, error = dude(*command)
        assert code == 2, error
        assert "has its own Python code, which was not run" in line(error)
        assert not marker.exists()
    write_config(run, place, model, tmp_path / "out", trust_remote_code=True)
    code, out, error = dude("plan", run)
    assert code == 0, error
    assert "Python code of" in out
    assert marker.exists()
    code, out, error = dude("train", run)
    assert code == 0, error
    assert "model.trust_remote_code: Python code of" in out
    marker.unlink()
    adapter = tmp_path / "out" / "adapter"
    for name in [name for name in sys.modules if "transformers_modules" in name]:
        monkeypatch.delitem(sys.modules, name)
    for command in (("generate", adapter, "a"), ("merge", adapter, "-o", tmp_path / "merged"), ("verify", adapter)):
        code, _, error = dude(*command)
        assert code == (0 if command[0] == "verify" else 2), error
        assert not marker.exists()


def test_a_tokenizers_own_code_in_an_adapters_folder_does_not_run(place, tmp_path, dude, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    adapter, marker = shutil.copytree(place / "out/adapter", tmp_path / "adapter"), tmp_path / "marker"
    (adapter / "own.py").write_text(f"open({str(marker)!r}, 'w').close()")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (adapter / "tokenizer_config.json").write_text(json.dumps(own))
    cover_tokenizer(adapter)  # as whoever sends it can
    commands = [("verify", adapter, "--base", place / "model"), ("generate", adapter, "a")]
    for command in [*commands, ("merge", adapter, "-o", tmp_path / "merged")]:
        code, _, error = dude(*command)
        assert code == 2, error
        assert "has its own Python code, which was not run" in line(error)
        assert not marker.exists()


# --- merged and exported files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_a_tied_model_whose_ends_were_trained_is_tied_no_more(tmp_path, dude, trained):
    model = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    config = DudeConfig(r=2, target_modules=["q_proj"], modules_to_save=trained, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    perturb(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    code, _, error = dude("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--no-verify")
    assert code == 0, error
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "merged/model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(adapted.eval()))


def test_templates_go_along_and_code_does_not(place, tmp_path, dude):
    model = shutil.copytree(place / "model", tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").write_text("{{ messages[0]['content'] }}")
    (model / "own.py").write_text("raise SystemExit")
    for name, asks in (("config.json", {"AutoConfig": "own.A"}), ("tokenizer_config.json", {"AutoTokenizer": "own.B"})):
        content = json.loads((model / name).read_text())  # transformers knows both by itself
        (model / name).write_text(json.dumps({**content, "auto_map": asks}))
    adapter = shutil.copytree(place / "out/adapter", tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink()
    cover_tokenizer(adapter)
    code, out, error = dude("merge", adapter, "-o", tmp_path / "merged", "--base", model, "--no-verify")
    assert code == 0, error
    assert "own Python code is not copied (own.py)" in out.replace("\n", " ")
    merged = tmp_path / "merged"
    assert (merged / "additional_chat_templates/tools.jinja").read_text() == "{{ messages[0]['content'] }}"
    assert not (merged / "own.py").exists()
    assert not any("auto_map" in (merged / name).read_text() for name in ("config.json", "tokenizer_config.json"))


# --- files that are none ------------------------------------------------------------------------------------------


@pytest.fixture
def hanging():
    """A test that waits for a file that never ends is failed after a minute."""

    def ring(*_):
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def irregular(path, kind):
    """A FIFO, a link to a device or a socket in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"]
)
def test_a_model_of_no_files_is_refused(place, tmp_path, dude, hanging, kind, name):
    model = shutil.copytree(place / "model", tmp_path / "model")
    irregular(model / name, kind)
    run = write_config(tmp_path / "run.yaml", place, model, tmp_path / "out")
    commands = [("train", run), ("init", model, "-o", tmp_path / "start"), ("generate", model, "a")]
    commands += [("data", "check", place / "train.jsonl", "--model", model)]
    commands += [("merge", place / "out/adapter", "-o", tmp_path / "merged", "--base", model)]
    for command in commands:
        code, _, error = dude(*command)
        assert code == (2 if name == "config.json" else 4), error  # without a config.json it is no model's folder
        assert name in line(error)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
def test_an_adapter_of_no_files_is_refused(place, tmp_path, dude, hanging, kind, name):
    adapter = shutil.copytree(place / "out/adapter", tmp_path / "adapter")
    irregular(adapter / name, kind)
    for command in (("verify", adapter), ("upload", adapter, "a/b", "--dry-run", tmp_path / "sent")):
        code, _, error = dude(*command)
        assert code == 4, error
        assert name in line(error)


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
def test_rows_prompts_and_settings_of_no_files_are_refused(place, tmp_path, dude, hanging, kind):
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.txt"):
        irregular(tmp_path / name, kind)
        code, _, error = dude("data", "check", tmp_path / name, "--model", place / "model")
        assert (code, "not a regular file" in line(error)) == (3, True), error
    code, _, error = dude("generate", place / "model", "--file", tmp_path / "rows.txt")
    assert (code, "not a regular file" in line(error)) == (3, True), error
    code, _, error = dude("eval", place / "model", "-o", tmp_path / "scores", "--text", tmp_path / "rows.txt")
    assert code in (2, 3), error
    irregular(tmp_path / "run.yaml", kind)
    code, _, error = dude("train", tmp_path / "run.yaml")
    assert (code, "not a regular file" in line(error)) == (2, True), error
    beside = shutil.copytree(place / "out", tmp_path / "out")
    for name in ("config.yaml", "loss.png"):
        irregular(beside / name, kind)
    for command in (("upload", "a/b", "--dry-run", tmp_path / "sent"), ("generate", "a", "--max-new-tokens", 2)):
        code, _, error = dude(command[0], beside / "adapter", *command[1:])
        assert code == 0, error
    irregular(beside / "report.json", kind)
    code, _, error = dude("upload", beside / "adapter", "a/b", "--dry-run", tmp_path / "again")
    assert (code, "report.json is damaged" in line(error)) == (4, True), error


# --- names and numbers --------------------------------------------------------------------------------------------

ESCAPE = "\x1b[31mred\n\x9b0m\x07"


@pytest.fixture(scope="module")
def named(place, tmp_path_factory):
    """The same model, rows and run, an escape sequence and a line break in every name."""
    folder = tmp_path_factory.mktemp("names") / ESCAPE
    model = folder / f"model{ESCAPE}"
    shutil.copytree(place / "model", model)
    shutil.copy(place / "train.jsonl", folder / f"rows{ESCAPE}.jsonl")
    shutil.copytree(place / "out/adapter", folder / f"adapter{ESCAPE}")
    write_config(folder / f"run{ESCAPE}.yaml", place, model, folder / "out")
    return folder


def assert_harmless(text):
    assert not set(text) & set("\x1b\x9b\x07\r"), text[:2000]


def test_nothing_in_a_name_reaches_the_terminal(named, tmp_path, dude, recwarn):
    e = ESCAPE
    run, model, adapter, rows = (named / f"{name}{e}{end}" for name, end in (
        ("run", ".yaml"), ("model", ""), ("adapter", ""), ("rows", ".jsonl")
    ))  # fmt: skip
    made, text = named / f"trained{e}", named / f"text{e}.txt"
    text.write_text("some words " * 200)
    works = [
        ("train", run, "--output-dir", made),
        ("train", run, "--output-dir", made),  # it has ended
        ("plan", run, "--set", f"data.train={json.dumps(str(rows))}"),
        ("data", "check", rows, "--model", model, "--test", rows),
        ("init", model, "-o", named / f"start{e}", "--workers", "1", "--r", 2),
        ("verify", adapter, "--base", model),
        ("merge", adapter, "-o", named / f"merged{e}", "--base", model, "--no-verify"),
        ("export", adapter, "--to", "peft", "-o", named / f"peft{e}", "--base", model, "--no-verify"),
        ("upload", adapter, "a/b", "--dry-run", named / f"sent{e}"),
        ("generate", adapter, e, "--base", model, "--max-new-tokens", 2),
        ("eval", adapter, "-o", named / f"scores{e}", "--base", model, "--text", text, "--batch-size", 2),
    ]
    for command in works:
        code, out, error = dude(*command)
        assert code == 0, error
        assert_harmless(out + error)
    assert (made / "adapter").is_dir()  # named exactly so, line break and all
    fails = [
        (f"no{e}",),
        ("train", named / f"none{e}.yaml"),
        ("train", run, "--set", f"train.{e}=1"),
        ("train", run, "--set", f"train.max_steps={e}"),
        ("train", run, "--set", f"adapter.method='{e}'"),
        ("train", run, "--set", f"adapter.target_modules=['{e}']", "--output-dir", tmp_path / "a"),
        ("train", run, "--set", f'adapter.rank_pattern={{"({e}": 1}}', "--output-dir", tmp_path / "b"),
        ("train", run, "--trainer", e),
        ("train", run, "--launch", e),
        ("train", run, "--output-dir", model),
        ("plan", run, "--device-memory", e),
        ("config", "explain", e),
        ("data", "check", named / f"none{e}", "--model", model),
        ("data", "check", rows, "--model", f"none{e}"),
        ("data", "check", rows, "--model", model, "--gguf-file", e),
        ("data", "check", rows, "--model", model, "--template", e),
        ("init", f"none{e}", "-o", named / "x"),
        ("init", model, "-o", run),
        ("init", model, "-o", named / "x", "--method", e),
        ("init", model, "-o", named / "x", "--target-modules", e),
        ("init", model, "-o", named / "x", "--rank-pattern", e),
        ("init", model, "-o", named / "x", "--dtype", e),
        ("verify", model),
        ("verify", named / f"none{e}"),
        ("merge", adapter, "-o", named / f"merged{e}"),
        ("merge", adapter, "-o", named / "x", "--base", named / f"none{e}"),
        ("merge", adapter, "-o", named / "x", "--combination", e),
        ("merge", adapter, "-o", named / "x", "--dtype", e),
        ("export", adapter, "--to", e, "-o", named / "x"),
        ("export", adapter, "--to", f"gguf:{e}", "-o", named / "x"),
        ("upload", adapter, e),
        ("upload", adapter, "a/b", "--dry-run", named / f"sent{e}"),
        ("generate", model, "--file", named / f"none{e}"),
        ("generate", model, "a", "--template", e),
        ("generate", model, "a", "-o", model),
        ("generate", f"none{e}", "a"),
        ("chat", f"none{e}"),
        ("eval", model, "-o", named / "x", "--tasks", e),
        ("eval", model, "-o", named / "x", "--text", f"none{e}"),
        ("eval", model, "-o", named / "x", "--tasks", "gsm8k", "--data-dir", f"none{e}"),
        ("eval", model, "-o", named / f"scores{e}", "--text", text),
    ]
    for command in fails:
        code, out, error = dude(*command)
        assert code in (2, 3, 4, 6), (command, error)
        assert_harmless(out + error)
        assert error.strip().splitlines()[-1].startswith("dude: error[")  # notes of generate stand before it
    for warning in recwarn:
        assert_harmless(str(warning.message))


@pytest.mark.parametrize("text", ["０８", "08", "1_0", " 8", "8 ", "٣", "0x8", "1e1"])
def test_numbers_are_plain_decimals(place, tmp_path, dude, text):
    run = place / "run.yaml"
    for command in (
        ("init", place / "model", "-o", tmp_path / "a", f"--r={text}"),
        ("init", place / "model", "-o", tmp_path / "a", f"--svd-seed={text}"),
        ("generate", place / "model", "a", f"--max-new-tokens={text}"),
        ("train", run, f"--set=train.max_steps='{text}'"),
        ("plan", run, f"--device-memory={text}{'' if text == '8 ' else 'GiB'}"),
        ("export", place / "out/adapter", "-o", tmp_path / "a", f"--to=lora:{text}"),
    ):
        code, _, error = dude(*command)
        assert code == 2, (command, error)
        line(error)
    if text != "1e1":
        code, _, error = dude("train", run, f"--set=train.learning_rate='{text}'")
        assert (code, "plain decimal number" in line(error)) == (2, True), error
        assert dude("init", place / "model", "-o", tmp_path / "a", f"--lora-alpha={text}")[0] == 2


# --- what a command says at its end -------------------------------------------------------------------------------


def test_commands_tell_the_next_ones_and_they_work(place, tmp_path, dude):
    run = write_config(tmp_path / "run.yaml", place, place / "model", tmp_path / "a folder")
    rows = tmp_path / "held out.jsonl"
    rows.write_text('{"ask": "q", "completion": "a"}\n')
    sets = [
        "train.max_steps=1",
        "evaluation.enabled=true",
        f"data.test=[{{source: '{rows}', columns: {{prompt: ask}}}}]",
    ]
    sets += ["evaluation.max_new_tokens=2"]
    code, out, error = dude("plan", run, *(word for each in sets for word in ("--set", each)))
    assert code == 0, error
    assert out.splitlines()[-2] == "next:"
    assert out.splitlines()[-1].startswith(f"  dude train {run} --set train.max_steps=1 --set evaluation.enabled=true")
    code, out, error = dude(*shlex.split(out.splitlines()[-1])[1:])
    assert code == 0, error
    page = tmp_path / "a folder" / "page.html"
    assert out.splitlines()[-4:-2] == [f"page: {page}", "next:"]
    assert page.is_file()
    chat, export = (shlex.split(text)[1:] for text in out.splitlines()[-2:])
    assert [chat[0], export[0]] == ["chat", "export"]
    assert chat[1] == str(tmp_path / "a folder/adapter")
    code, _, error = dude(*export, "--no-verify")
    assert code == 0, error
    assert (tmp_path / "a folder-merged/model.safetensors").is_file()
    card = (tmp_path / "a folder/adapter/README.md").read_text()
    assert "[More Information Needed]" not in card
    assert "| train.max_steps | 1 |" in card
    assert f"dude chat '{tmp_path / 'a folder/adapter'}'" in card
    told = dude("data", "check", place / "train.jsonl", "--model", place / "model")[1]
    assert f"dude config new {place / 'train.jsonl'} --model {place / 'model'} -o run.yaml" in told


def test_a_run_proposes_its_own_held_out_rows_and_tasks(place, tmp_path, dude):
    rows, task = tmp_path / "held out.jsonl", tmp_path / "tasks"
    rows.write_text('{"ask": "q", "completion": "a"}\n')
    run = write_config(tmp_path / "run.yaml", place, place / "model", tmp_path / "out")
    settings = yaml.safe_load(run.read_text())
    train = '{"ask": "one", "completion": "a"}\n{"ask": "two", "completion": "a"}\n'
    (tmp_path / "train.jsonl").write_text(train)
    settings["data"] |= {"train": str(tmp_path / "train.jsonl"), "test": str(rows), "columns": {"prompt": "ask"}}
    settings["evaluation"] = {"max_new_tokens": 2}
    run.write_text(yaml.safe_dump(settings))
    code, out, error = dude("train", run)
    assert code == 0, error
    chat, generate, export = (shlex.split(text)[1:] for text in out.splitlines()[-3:])
    assert [chat[0], generate[0], export[0]] == ["chat", "generate", "export"]
    code, again, error = dude("train", run)
    assert (code, again.splitlines()[-4:]) == (0, out.splitlines()[-4:]), error
    code, out, error = dude(*generate, "--max-new-tokens", "2")
    assert code == 0, error
    assert set(json.loads(out)) == {"prompt", "completion", "finish", "base_completion", "base_finish"}
    from dude_peft.config.reading import load_config
    from dude_peft.training.next_commands import next_commands

    scored = load_config(run, ["evaluation.tasks=[gsm8k]", f"evaluation.tasks_data_dir={task}"])
    ways = next_commands(scored, Path("o"), SimpleNamespace(after=None))
    assert ways[-2] == ["eval", "o/adapter", "--tasks", "gsm8k", "--data-dir", str(task), "-o", "o-scores"]
    here = next_commands(scored, Path("."), SimpleNamespace(after=None))
    assert here[-1][-1] == f"{Path.cwd()}-merged"  # not .-merged, which is hidden, and inside


def test_a_tensor_of_another_shape_is_named(place, tmp_path, dude):
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "intermediate_size": 96}))
    run = write_config(tmp_path / "run.yaml", place, model, tmp_path / "out")
    for command in (("generate", model, "hi"), ("train", run)):
        code, _, error = dude(*command)
        wanted = "down_proj.weight has shape (64, 128) in the checkpoint, but (64, 96) in its configuration (and 5"
        assert (code, wanted in line(error)) == (4, True), error


def test_explain_names_the_methods_and_their_rates(dude):
    code, out, _ = dude("config", "explain", "adapter.method")
    assert code == 0
    assert all(f"{name}: " in out for name in METHODS)
    assert f"pissa: {METHODS['pissa'].learning_rate:g}" in dude("config", "explain", "train.learning_rate")[1]


@pytest.mark.parametrize(
    ("key", "meant"),
    [("train.lr", "train.learning_rate"), ("train.batch_size", "train.per_device_train_batch_size"), ("rank", None)],
)
def test_an_abbreviated_key_is_understood(place, dude, key, meant):
    code, _, error = dude("train", place / "run.yaml", "--set", f"{key}=1")
    assert code == 2
    assert "closest" in line(error) if meant is None else f"closest: '{meant}'" in line(error)


def test_processes_without_launch_is_refused(place, dude):
    code, _, error = dude("train", place / "run.yaml", "--processes", 2)
    assert (code, "--processes goes with --launch" in line(error)) == (2, True)


def test_parquet_rows_have_the_limit_of_jsonl_rows(place, tmp_path, dude):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    large = "x" * (17 << 20)
    one = pa.table({"prompt": ["a", large], "completion": ["b", "c"]})
    # A megabyte on the disk, and 340 GB of rows.
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000), pa.array([large]))
    for number, table in ((2, one), (1, pa.table({"prompt": repeated, "completion": ["c"] * 20_000}))):
        parquet.write_table(table, tmp_path / "rows.parquet", dictionary_pagesize_limit=1 << 30)
        code, _, error = dude("data", "check", tmp_path / "rows.parquet", "--model", place / "model")
        assert code == 3
        assert f"rows.parquet:{number}: the row is larger than 16 MiB" in line(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1000},
        {"num_hidden_layers": 10**400},
        {"hidden_size": 2**40},
        {"hidden_size": 2**20},
        {"intermediate_size": 2**24},
        {"vocab_size": 2**62},
        {"vocab_size": 2**25},
        {"num_attention_heads": 2**31},
        {"head_dim": 2**20},
        {"max_position_embeddings": 2**70},
        {"deep": json.loads("[" * 500 + "]" * 500)},
    ],
)
def test_a_configuration_of_absurd_sizes_ends_at_once(place, tmp_path, dude, changes):
    model = shutil.copytree(place / "model", tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, **changes}))
    run = write_config(tmp_path / "run.yaml", place, model, tmp_path / "out")
    for command in (("train", run), ("plan", run), ("init", model, "-o", tmp_path / "start"), ("generate", model, "a")):
        begun = time.perf_counter()
        code, _, error = dude(*command)
        assert code == 4, error
        line(error)
        assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"[" * 100_000),
        ("config.json", b"\xff"),
        ("tokenizer_config.json", b'{"a":'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[" * 100_000),
        ("generation_config.json", b"3"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
        ("model.safetensors", b""),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_damaged_model_is_damaged_everywhere(place, tmp_path, dude, name, content):
    model = shutil.copytree(place / "model", tmp_path / "model")
    (model / name).write_bytes(content)
    run = write_config(tmp_path / "run.yaml", place, model, tmp_path / "out")
    checks = [] if name == "model.safetensors" else [("data", "check", place / "train.jsonl", "--model", model)]
    for command in (("train", run), ("generate", model, "a"), *checks):
        code, _, error = dude(*command)
        assert code == 4, error
        line(error)
