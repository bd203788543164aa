"""`data.chat_template`: a template of the user's own, from reading to the exported tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from served import dude
from tiny import save_tiny, write_rows
from transformers import AutoTokenizer

from dude_peft.config.reading import load_config
from dude_peft.errors import ConfigError

OWN = (
    "{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }} Think step by step.\n"
    "Answer:{% elif message.role == 'assistant' %}{{ message.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model whose tokenizer has a template, and a run that replaces it."""
    place = tmp_path_factory.mktemp("template")
    save_tiny(place / "model")
    write_rows(place / "train.jsonl", 12)
    write_rows(place / "test.jsonl", 3, start=100)
    (place / "own.jinja").write_text(OWN, encoding="utf-8")
    config = {
        "model": {"name_or_path": "model"},
        "adapter": {"r": 2},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "chat_template": "own.jinja"},
        "train": {"max_steps": 2, "per_device_train_batch_size": 4},
        "evaluation": {"rows": 2, "max_new_tokens": 3},
        "output_dir": "out",
    }
    (place / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def trained(place):
    done = dude("train", "run.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


def data(own: object, **more: object) -> dict:
    section = {"train": "train.jsonl", "chat_template": own, **more}
    return {"model": {"name_or_path": "m"}, "data": section, "evaluation": {"enabled": False}, "output_dir": "o"}


def test_rows_are_written_by_it(place):
    done = dude("data", "check", "train.jsonl", "--model", "model", "--chat-template", "own.jinja", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "Question: say 0 Think step by step.\nAnswer:«yes<|end|>»" in done.stdout
    assert "chat_template: own.jinja" in done.stdout


def test_the_run_keeps_it_and_needs_no_file(trained, tmp_path):
    assert load_config(trained / "out/config.yaml").data.chat_template == OWN
    assert (trained / "out/adapter/chat_template.jinja").read_text(encoding="utf-8") == OWN
    assert json.loads((trained / "out/run.json").read_text(encoding="utf-8"))["config"]["data"]["chat_template"] == OWN


@pytest.mark.slow
def test_every_command_on_the_adapter_uses_it(trained, tmp_path):
    done = dude("export", "out/adapter", "--to", "merged", "-o", tmp_path / "merged", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == OWN
    asked = [
        dude("generate", "out/adapter", "say 5", "--max-new-tokens", 2, cwd=trained),
        dude("generate", "out/adapter", "Question: say 5 Think step by step.\nAnswer:", "--raw", "--max-new-tokens", 2,
             cwd=trained),
    ]  # fmt: skip
    assert [one.returncode for one in asked] == [0, 0], asked
    first, second = (json.loads(one.stdout)["completion"] for one in asked)
    assert first == second


@pytest.mark.slow
def test_a_plan_counts_the_tokens_that_it_writes(place):
    texts = []
    for extra in ([], ["--set", "data.chat_template=null"]):
        done = dude("plan", "run.yaml", "--json", *extra, cwd=place)
        assert done.returncode in (0, 5), done.stderr
        texts.append(json.loads(done.stdout))
    assert texts[0] != texts[1]


def test_another_template_is_another_run(trained):
    changed = OWN.replace("{% endfor %}", "{# the same rows #}{% endfor %}")
    own = trained / "own.jinja"
    own.write_text(changed, encoding="utf-8")
    try:
        done = dude("train", "run.yaml", cwd=trained)
    finally:
        own.write_text(OWN, encoding="utf-8")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "data.chat_template: another text (sha256 " in done.stderr
    again = dude("train", "run.yaml", cwd=trained)
    assert again.returncode == 0, again.stderr
    assert "this run is finished" in again.stdout


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}\n{{ m.content }", r"line 2: this is no valid Jinja \(unexpected '}'\)"),
        ("{{ messages | nothing }}", "line 1: the template .*No filter named 'nothing'"),
        ("{{ 9**(9**9) }}{{ messages[0].content }}", "line 1: the template cannot be used"),
        ("{% set a = [0] * 10**10 %}{{ messages[0].content }}", "line 1: the template "),
        ("{{ '%9999999999d' % 1 }}{{ messages[0].content }}", "line 1: the template "),
        ("{% for m in message %}{{ m.content }}{% endfor %}", "line 1: the template writes nothing of a conversation"),
        ("{{ messages.no.such }}", "the template fails on a conversation .*UndefinedError"),
        ("{{ messages.__class__.__mro__ }}", "the template fails on a conversation .*SecurityError"),
        ("{{ messages[0].content }}" + "x" * 2**16, "a run takes up to 64 KiB"),
        ("none.jinja", "none.jinja cannot be read .No such file"),
        ("{# a remark #}", "cannot be read"),
        ("", "expected"),
        (3, "expected"),
    ],
)
def test_what_is_no_template_is_told_in_one_line(template, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(data(template))
    assert "\n" not in str(caught.value)
    assert "data.chat_template" in str(caught.value)


def test_a_fault_in_the_file_has_its_line(tmp_path):
    Path(tmp_path, "bad.jinja").write_text("{{ messages }}\n{% endfor %}", encoding="utf-8")
    Path(tmp_path, "latin.jinja").write_bytes("{{ messages }} ä".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"bad\.jinja:2: this is no valid Jinja"):
        load_config(data(str(tmp_path / "bad.jinja")))
    with pytest.raises(ConfigError, match="byte 15 is not UTF-8"):
        load_config(data(str(tmp_path / "latin.jinja")))


@pytest.mark.parametrize("name", ["{}.jinja", "my{model}.jinja", "a}.jinja"])
def test_braces_in_a_files_name_are_part_of_it(tmp_path, name):
    Path(tmp_path, name).write_text("{{ messages }}\n{% endfor %}", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}:2: this is no valid Jinja"):
        load_config(data(str(tmp_path / name)))
    Path(tmp_path, name).write_text(OWN, encoding="utf-8")
    assert load_config(data(str(tmp_path / name))).data.chat_template == OWN


def test_it_is_refused_beside_the_plain_template():
    with pytest.raises(ConfigError, match=r"no effect beside data\.template: plain"):
        load_config(data(OWN, template="plain"))


def test_templates_that_want_a_system_message_or_tools_are_taken():
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages }}"
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    for text in (wants, "{{ tools[0].function.name }}{{ messages }}", marked):
        assert load_config(data(text)).data.chat_template == text
