"""`dude doctor`: what it tells, what it exits with, and that its self test can fail."""

from __future__ import annotations

import json

import pytest
import torch
from served import dude

from dude_peft.doctor import packages as found
from dude_peft.doctor.packages import Package
from dude_peft.doctor.run import doctor
from dude_peft.doctor.self_test import self_test
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.tuner import DudeLinear

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


def test_the_command_tells_everything_and_no_secret():
    done = dude("doctor", "--json", HF_TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["training_works"] is True
    assert {"torch", "transformers", "peft"} <= {package["name"] for package in told["packages"]}
    assert told["devices"][0]["kind"] == "cpu"
    assert told["hub"]["offline"] is True
    assert all(ability["note"] for ability in told["abilities"])
    assert told["self_test_seconds"] < 2


@pytest.mark.parametrize(
    ("version", "state", "remedy"),
    [
        ("2.13.0+cpu", "ok", ""),
        ("2.9.1", "too old", "pip install -U 'x<3,>=2.10'"),
        ("3.0", "too new", "pip install -U 'x<3,>=2.10'"),
        (None, "missing", "pip install -U 'x<3,>=2.10'"),
    ],
)
def test_versions_against_their_bounds(version, state, remedy):
    package = Package("x", version, "<3,>=2.10", None, required=True)
    assert (package.state, package.remedy) == (state, remedy)


def test_an_extra_is_installed_as_one():
    assert "dude-peft[gguf]" in Package("gguf", None, ">=0.17", "gguf", required=False).remedy
    assert Package("deepspeed", None, "", None, required=False).remedy == ""


def test_a_missing_requirement_is_exit_2(monkeypatch, capsys):
    real = found.installed
    monkeypatch.setattr(found, "installed", lambda name: None if name == "peft" else real(name))
    with pytest.raises(ConfigError, match=r"peft is missing; pip install -U 'peft<"):
        doctor(as_json=True)
    assert json.loads(capsys.readouterr().out)["training_works"] is False


def test_the_self_test_notices_a_start_that_is_not_the_base(monkeypatch):
    self_test()
    real = DudeLinear.forward
    monkeypatch.setattr(DudeLinear, "forward", lambda self, x: real(self, x) * (1 + 1e-6))
    with pytest.raises(NumericsError, match="self test"):
        self_test()


def test_the_self_test_notices_a_gradient_that_is_not_a_number(monkeypatch):
    real = DudeLinear.forward

    def spoilt(self: DudeLinear, x: torch.Tensor) -> torch.Tensor:
        y = real(self, x)
        y.register_hook(lambda gradient: gradient * torch.nan)
        return y

    monkeypatch.setattr(DudeLinear, "forward", spoilt)
    with pytest.raises(NumericsError, match="not finite"):
        self_test()
