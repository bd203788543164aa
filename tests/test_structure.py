"""The shape of the package: imports run one way, the command starts lean."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "dude_peft"
# From the bottom up: a room may import from the rooms before it, and from itself.
ROOMS = [
    "version",
    "errors",
    "installing",
    "parents",
    "show",
    "names",
    "kinds",
    "doors",
    "line_child",
    "peft_file",
    "reward_file",
    "task_types",
    "core",
    "methods",
    "artifact",
    "tuner",
]
ROOMS += ["data", "config", "terminal", "machine", "model", "measure", "init", "folder", "exporting", "answer"]
ROOMS += ["rewards", "training", "planning", "chat", "evaluation", "comparison", "reporting", "doctor", "api", "cli"]
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "matplotlib", "trl", "numpy", "safetensors"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path, top_level_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_room_has_its_place():
    assert {room_of(path) for path in modules()} - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for name in imports_of(path):
        if name.startswith("dude_peft."):
            assert name.split(".")[1] in allowed, f"{path.name} of '{room}' imports {name}"


@pytest.mark.parametrize("room", ["core", "methods"])
def test_the_mathematics_needs_torch_alone(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top in {"torch", "dude_peft", "triton"} or top in sys.stdlib_module_names, f"{path.name}: {name}"


def loaded_by(statement):
    program = f"{statement}\nimport sys\nprint(','.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.strip().splitlines()[-1].split(",")}


@pytest.mark.parametrize("statement", ["import dude_peft", "import dude_peft.cli", "import dude_peft.config.schema"])
def test_starting_loads_nothing_heavy(statement):
    assert not loaded_by(statement) & HEAVY


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_imports_with_the_core_dependencies(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    if name.endswith("__main__"):
        return
    if "triton" in imports_of(path):
        pytest.importorskip("triton", reason=f"{path.name} is for GPUs and needs triton, which is not installed here")
    if "lm_eval.models.huggingface" in imports_of(path):
        pytest.importorskip("lm_eval", reason=f"{path.name} needs lm_eval, which is not installed here")
    importlib.import_module(name)
    extras = {"datasets", "matplotlib", "gguf", "trl", "bitsandbytes", "torchao", "llama_cpp", "scipy", "math_verify"}
    extras |= {"ray", "PIL", "liger_kernel"}
    assert not {n.split(".")[0] for n in imports_of(path, top_level_only=True)} & extras


def test_the_public_names_exist_and_are_documented():
    import dude_peft

    for name in dude_peft.__all__:
        value = getattr(dude_peft, name)
        assert name == "__version__" or value.__doc__
    with pytest.raises(AttributeError, match="nothing"):
        _ = dude_peft.nothing


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


# Their loaders run no code from a checkpoint.
RUN_NO_CODE = {"PeftModel", "DudeConfig", "GenerationConfig"}
# Of a run's YAML, or handed on from there; `code_refusal` tells of it where it is not allowed.
ALLOWED = {"False", "section.trust_remote_code", "trust_remote_code"}
MAY_ALLOW = {"model/load.py", "model/architecture.py"}


def asking_calls(tree):
    """Calls of other libraries that may run code from a checkpoint, or ask on standard input whether they may."""
    harness = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "HFLM" for base in node.bases)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value).rpartition(".")[2]
            loads = node.func.attr in ("from_pretrained", "from_config") and owner not in RUN_NO_CODE
            if loads or (node in harness and ast.unparse(node.func) == "super().__init__"):
                yield node
        elif ast.unparse(node.func) in ("HFLM", "pipeline", "simple_evaluate"):
            yield node


def test_no_checkpoint_asks_whether_its_code_may_run():
    """transformers asks on standard input where trust_remote_code is left unset."""
    seen = 0
    for path in modules():
        name = str(path.relative_to(PACKAGE))
        for call in asking_calls(ast.parse(path.read_text(encoding="utf-8"))):
            seen += 1
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            wanted = ALLOWED if name in MAY_ALLOW else {"False"}
            assert given.get("trust_remote_code") in wanted, f"{name}:{call.lineno}: needs trust_remote_code=False"
    assert seen >= 9


# What they read was written by this process, by an installed package, or by the kernel.
OWN_FILES = {
    "doors.py", "data/prepare.py", "data/render_child.py", "data/tokenizer_parts.py", "evaluation/local_tasks.py",
    "exporting/lowrank.py", "init/fold.py", "init/run.py", "machine/pages.py", "planning/device.py",
}  # fmt: skip


def test_foreign_files_come_in_by_one_door():
    for path in modules():
        name = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and name not in OWN_FILES:
                called = ast.unparse(node.func)
                opens = called == "open" or called.endswith(".open")
                reads = opens and any(
                    isinstance(word, ast.Constant) and word.value in ("r", "rb") for word in node.args
                )
                reads = reads or called.endswith((".read_text", ".read_bytes"))
                assert not reads, f"{name}:{node.lineno}: use dude_peft.doors, which waits for no FIFO"


def test_readmes_two_commands_exist_and_ci_calls_the_second():
    commands = re.findall(r"bash (scripts/\w+\.sh)", readme())
    assert "scripts/quickstart.sh" in commands
    assert "scripts/test.sh" in commands
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(os.access(ROOT / command, os.X_OK) for command in commands)


def test_no_pickle_and_no_eval_in_the_package():
    for path in modules():
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load"}, path
                assert call not in {"os.umask", "umask"}, f"{path}: other threads make files meanwhile"
                trusts = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
                assert not any(ast.unparse(value) == "True" for value in trusts), path


def test_what_installs_a_package_is_told_in_one_form():
    from dude_peft.installing import _EXTRA_OF, install

    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("[project.")[0]
    brought: dict[str, str] = {}
    for extra, wanted in re.findall(r"^([\w-]+) = \[(.*)\]", section, re.MULTILINE):
        for package in re.findall(r'"([\w-]+)', wanted):
            brought.setdefault(package, extra)
    assert brought == _EXTRA_OF
    assert install("torchao", "bitsandbytes") == "pip install 'dude-peft[quant]'"
    assert install("transformers>=5.3,<6", option="-U") == "pip install -U 'transformers>=5.3,<6'"
    others = {path: path.read_text(encoding="utf-8") for path in modules() if path.name != "installing.py"}
    texts = {path: re.sub(r'"""(?s:.*?)"""', "", text) for path, text in others.items()}
    assert [str(path) for path, text in texts.items() if "pip install" in text] == []
