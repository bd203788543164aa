"""What we replace of other libraries' classes: a release that lost or changed it is refused in one line, at once."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import textwrap
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typing_extensions import override

import dude_peft
import dude_peft.doctor.run as doctor_run
from dude_peft import cli
from dude_peft.errors import ConfigError
from dude_peft.machine.sharding import check_sharding
from dude_peft.parents import TESTED, fits, refusal_of, require
from dude_peft.training.trl_trainer import _trainer_class

ROOT = Path(__file__).parent.parent
# Typer's is public, and `dude --help` shall not pay for it.
NOT_CHECKED = {"_Commands"}
# FSDP2 alone needs it, and asks for it (`machine/sharding.py`).
NEWER = {"_defer_fsdp_gradient_reduction"}


class Parent:
    """As a release of PEFT could have it; the tests' classes below are written for another one."""

    __module__ = "peft.tuners.tuners_utils"

    def __init__(self):
        self._kept = 1

    def _replaced(self, model, adapter_name, state=None):
        getattr(self, "_asked", None)


def child_of(parent, uses=()):
    class Child(parent):
        @override
        def _replaced(self, model, adapter_name, state=None): ...

    return fits(uses=uses)(Child)


def parent_with(function):
    return type("Parent", (), {"__module__": Parent.__module__, "_replaced": function})


def refused(make):
    with pytest.raises(ConfigError) as caught:
        make()
    line = str(caught.value)
    assert "\n" not in line
    assert re.match(r"peft \d\S* does not fit dude-peft \d\S*: ", line), line
    assert line.endswith(f"; run: pip install -U dude-peft 'peft<={TESTED['peft']}'")
    return line


def test_a_parent_that_has_all_is_taken():
    assert child_of(Parent, uses=("_kept", "_asked", "_replaced")).__name__ == "Child"
    require(Parent, "_kept", "_asked", "_replaced")


@pytest.mark.parametrize(
    "function",
    [
        lambda self, *args, **kwargs: None,
        lambda self, model, adapter_name, state: None,
        lambda self, model, *, adapter_name, state=None: None,
        lambda self, model, **kwargs: None,
        classmethod(lambda cls, model, adapter_name, state=None: None),
    ],
)
def test_a_parent_that_can_be_called_likewise_is_taken(function):
    child_of(parent_with(function))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, model: None,
        lambda self, model, adapter_name, state=None, scale=1.0: None,
        lambda self, model, name, state=None: None,
        lambda self, adapter_name, model, state=None: None,
        lambda self, model, adapter_name, state=None, *, scale: None,
        lambda self: None,
    ],
)
def test_other_parameters_are_refused(function):
    line = refused(lambda: child_of(parent_with(function)))
    assert "Parent._replaced takes (" in line
    assert "not (model, adapter_name, state)" in line


def test_what_is_gone_is_refused():
    empty = type("Parent", (), {"__module__": Parent.__module__})
    assert "Parent has no _replaced;" in refused(lambda: child_of(empty))
    assert "Parent has no _other;" in refused(lambda: child_of(Parent, uses=("_kept", "_other")))
    assert "Parent has no _other;" in refused(lambda: require(Parent, "_kept", "_other"))


def test_a_property_is_compared_by_name():
    class Child(Parent):
        @property
        @override
        def size(self): ...

    assert "has no size" in refused(lambda: fits()(Child))


def test_a_method_that_the_parent_has_got_too_is_refused():
    """Ours would be called in place of the parent's new one."""

    class Child(Parent):
        def _replaced(self, model, adapter_name, state=None): ...

    assert "Parent has a _replaced of its own, and Child another one" in refused(lambda: fits()(Child))


def test_an_import_that_a_release_no_longer_offers():
    def error_of(statement):
        with pytest.raises(ImportError) as caught:
            exec(statement)
        return caught.value

    assert "cannot import name 'no_such' from 'peft'" in refused(lambda: raise_(error_of("from peft import no_such")))
    assert "No module named 'peft.tuners.gone'" in refused(lambda: raise_(error_of("import peft.tuners.gone")))
    assert refusal_of(error_of("import no_such_package")) is None
    assert refusal_of(ModuleNotFoundError("No module named 'trl'", name="trl")) is None  # an extra that is not there


def raise_(error):
    raise refusal_of(error) from error


def foreign(kind):
    return kind is not object and kind.__module__.partition(".")[0] != "dude_peft"


def guarded_classes():
    """Our classes that replace functions or properties of other libraries' classes."""
    found = [_trainer_class()]
    for module in pkgutil.walk_packages(dude_peft.__path__, "dude_peft."):
        if module.name != "dude_peft.__main__":
            names = vars(importlib.import_module(module.name))
            found += [kind for kind in names.values() if inspect.isclass(kind) and kind.__module__ == module.name]
    return [kind for kind in found if replaced_by(kind) and kind.__name__ not in NOT_CHECKED]


def replaced_by(kind):
    """Names of functions and properties -> the parents that have them; nn.Module's public methods are for everyone."""
    parents = [parent for parent in kind.__mro__ if foreign(parent) and parent.__module__ not in ("builtins", "enum")]
    own = [each for each in kind.__mro__ if each not in parents and each is not object]
    names = {name for each in own for name, member in vars(each).items() if is_method(member)}
    found = {name: [parent for parent in parents if name in vars(parent)] for name in names}
    return {name: having for name, having in found.items() if having and counts(name, having[0])}


def is_method(member):
    return inspect.isfunction(member) or isinstance(member, (property, classmethod, staticmethod))


def counts(name, parent):
    torch = parent.__module__.startswith("torch")
    return not name.startswith("__") and (name.startswith("_") or not torch)


def test_every_class_that_replaces_something_is_known_here():
    names = {kind.__name__ for kind in guarded_classes()}
    assert {"RunTrainer", "TrlRunTrainer", "DudeModel", "DudeLinear", "DudeConfig", "HarnessModel", "Loop"} <= names


def source_of(kind):
    return ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]


def used_by(kind):
    """What the class's `@fits(uses=...)` names; the decorator has to be there."""
    decorators = [d for d in source_of(kind).decorator_list if ast.unparse(d).startswith("fits(")]
    assert decorators, f"{kind.__name__} needs @fits()"
    return {name for keyword in decorators[0].keywords for name in ast.literal_eval(keyword.value)}


@pytest.mark.parametrize("kind", guarded_classes(), ids=lambda kind: kind.__name__)
def test_every_replaced_name_is_compared(kind, monkeypatch):
    """Take each name from the real parent: the class is refused, by this name."""
    fits()(kind)
    for name, parents in replaced_by(kind).items():
        with monkeypatch.context() as patch:
            for parent in parents:
                patch.delattr(parent, name)
            if name in NEWER:
                fits()(kind)
                continue
            with pytest.raises(ConfigError, match=rf" has no {name};"):
                fits()(kind)


@pytest.mark.parametrize("kind", guarded_classes(), ids=lambda kind: kind.__name__)
def test_every_class_is_compared_with_what_it_uses(kind):
    """The decorator is there, and names every private attribute of a parent that the class reaches through itself."""
    uses = used_by(kind)
    own = {name for each in kind.__mro__ if not foreign(each) for name in vars(each)}
    reached = {
        node.attr
        for node in ast.walk(source_of(kind))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls", "super()")
    }
    private = {name for name in reached - own if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if is_known(kind, name)} <= uses


def is_known(kind, name):
    try:
        for parent in filter(foreign, kind.__mro__):
            require(parent, name)
            return True
    except ConfigError:
        return False


@pytest.mark.slow
def test_the_library_refuses_a_parent_and_an_import():
    program = """
import peft.tuners.tuners_utils as theirs
import dude_peft
def refuse(holder, name):
    kept = holder.__dict__[name]
    delattr(holder, name)
    try:
        dude_peft.DudeConfig
    except ValueError as error:
        print(error)
    setattr(holder, name, kept)
refuse(theirs.BaseTuner, "_check_merge_allowed")
refuse(theirs, "_maybe_include_all_linear_layers")
print(dude_peft.DudeConfig.__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    method, function, config = done.stdout.splitlines()
    assert "BaseTuner has no _check_merge_allowed;" in method
    assert "cannot import name '_maybe_include_all_linear_layers'" in function
    assert all(line.startswith("peft ") and "pip install -U" in line for line in (method, function))
    assert config == "DudeConfig"


@pytest.mark.parametrize(("module", "code"), [("peft.tuners.gone", 2), ("no_such_package", 1)])
def test_the_command_refuses_an_import_that_a_release_no_longer_offers(module, code, monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda **_: importlib.import_module(module))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert ("pip install -U dude-peft 'peft<=" in line) == (code == 2)


def test_fsdp2_is_refused_before_anything_is_loaded_where_transformers_is_too_old(monkeypatch):
    older = type("PreTrainedModel", (), {"__module__": "transformers.modeling_utils"})
    monkeypatch.setattr("transformers.PreTrainedModel", older)
    with pytest.raises(ConfigError, match=r"transformers .* has no .*; run: pip install -U dude-peft 'transformers<="):
        check_sharding()


def test_the_doctor_tells_what_does_not_fit(monkeypatch, capsys):
    def misfit(*_):
        raise ConfigError("peft 9.9 does not fit")

    monkeypatch.setattr(doctor_run, "_machine", misfit)
    with pytest.raises(ConfigError, match="does not fit"):
        doctor_run.doctor(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["training_works"], told["problem"]) == (False, "peft 9.9 does not fit")


def test_starting_compares_nothing():
    program = "import sys, dude_peft.cli; print('dude_peft.parents' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_tested_versions_are_those_of_the_lock_or_newer_and_every_one_has_a_bound():
    locked = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    bounds = {}
    for text in re.findall(r'"([\w-]+>=[^"]+)"', (ROOT / "pyproject.toml").read_text()):
        bounds[Requirement(text).name] = Requirement(text).specifier
    for name, version in TESTED.items():
        assert Version(version) >= Version(locked[name]), name
        assert version in bounds[name]
        assert "<" in {bound.operator for bound in bounds[name]}, f"{name} needs an upper bound"


def lowest_versions():
    spec = importlib.util.spec_from_file_location("lowest_versions", ROOT / "scripts" / "lowest_versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lowest_versions_are_the_lower_bounds():
    lowest = lowest_versions().lowest
    declared = ["torch<3,>=2.10", "datasets>=4.7; extra == 'train'", "datasets>=4.8; extra == 'trl'", "gguf>=0.17"]
    assert lowest(declared) == ["datasets==4.8", "gguf==0.17", "torch==2.10"]
    assert lowest(declared[::-1]) == lowest(declared)
    with pytest.raises(ValueError, match="numpy has no lower bound"):
        lowest(["numpy<3"])
    assert len(lowest(requires("dude-peft"))) > 20
