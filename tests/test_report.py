"""`dude report`: pages of a run, an evaluation and a comparison, inert whatever strangers wrote, in three forms."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
import signal
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from night import some_by_day
from served import dude
from tiny import save_tiny, write_rows

pytest.importorskip("scipy", reason="dude report needs scipy, which is not installed here")

from test_compare_statistics import comparison, failing

import dude_peft
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.sealed import sealed
from dude_peft.errors import StoppedError
from dude_peft.evaluation.record import Counts, Evaluation, Measure, Value
from dude_peft.evaluation.second_opinion import Disagreement
from dude_peft.folder.record import RunReport
from dude_peft.measure.intervals import compare
from dude_peft.measure.movement import movement
from dude_peft.reporting import html as html_module
from dude_peft.reporting.adapted import adapted
from dude_peft.reporting.curves import bars_figure, lines_figure, map_figure, scatter_figure
from dude_peft.reporting.document import Commands, Document, Sample, Samples, Section, Table, Text, number
from dude_peft.reporting.html import html
from dude_peft.reporting.markdown import markdown

SVG = {"svg", "style", "metadata", "defs", "g", "path", "use", "text", "tspan", "clipPath", "rect", "image"}
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a browser sees: tags with their attributes, and texts; unbalanced tags are an error."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a tiny model."""
    place = tmp_path_factory.mktemp("report")
    save_tiny(place / "model")
    write_rows(place / "train.jsonl", 24)
    write_rows(place / "test.jsonl", 4, start=100)
    config = {
        "model": {"name_or_path": str(place / "model")},
        "adapter": {"method": "dude", "r": 4, "lora_alpha": 8},
        "data": {"train": str(place / "train.jsonl"), "test": str(place / "test.jsonl"), "max_length": 64},
        "train": {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1},
        "evaluation": {"rows": 4, "max_new_tokens": 4, "eval_steps": 2},
        "output_dir": str(place / "run"),
    }
    done = dude("train", place_config(place, config))
    assert done.returncode == 0, done.stderr
    assert f"page: {place / 'run/page.html'}\n" in done.stdout
    assert "dude report" not in done.stdout
    return place / "run"


def place_config(place, config):
    path = place / "run.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The folder of an evaluation, as dude eval writes it."""
    return write_evaluation(tmp_path_factory.mktemp("eval") / "scores")


def write_evaluation(folder, text="Tom has 3 apples."):
    model, base = [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]
    measure = Measure(
        "gsm8k", "exact_match", "strict-match", 4, 1319, Value(0.75, (0.3, 0.95)), Value(0.5, (0.15, 0.85)),
        compare(model, base),
    )  # fmt: skip
    none = Value(math.nan, None)
    undefined = Measure("other", "f1", "none", 4, 4, none, none, None)
    found = Evaluation(
        f"runs/{text}/adapter", True, False, [measure, undefined], [], None,
        {"model": Counts({}, {"gsm8k": 2}, {}), "base": Counts({}, {}, {})},
        {"gsm8k": [Disagreement(0, "strict-match", False, True, text, "18", text)]}, {"versions": {"torch": text}},
    )  # fmt: skip
    (folder / "samples").mkdir(parents=True)
    (folder / "answers").mkdir()
    (folder / "results.json").write_text(found.text_of(), encoding="utf-8")
    lines = [
        {
            "task": "gsm8k", "doc_id": n, "filter": "strict-match", "doc": {"question": f"{text} {n}?"}, "target": "18",
            "model": {"responses": [[f"{text} {n} m"]], "filtered": ["18"], "exact_match": mine},
            "base": {"responses": [[f"{text} {n} b"]], "filtered": ["17"], "exact_match": theirs},
        }
        for n, (mine, theirs) in enumerate(zip(model, base, strict=True))
    ]  # fmt: skip
    body = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples" / "gsm8k.jsonl").write_text(body, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison with a failed run."""
    folder = tmp_path_factory.mktemp("compared")
    whole = comparison({"lora": 1.5, "dude": 1.3, "dora": 1.3})
    finals = tuple(failing(one) if (one.method, one.seed) == ("dora", 12) else one for one in whole.finals)
    replace(
        whole, finals=finals, protocol={"learning_rates": [1e-4, 1e-3]}, not_tested=("Other models were not tested.",),
        environment={"torch": "2"}, data_hashes={"train": "ab12"}, warnings=("A rate is on the edge.",),
    ).write(folder)  # fmt: skip
    return folder


def written(folder, output, *options):
    done = dude("report", folder, "-o", output, *options)
    assert done.returncode == 0, done.stderr
    return output.read_text(encoding="utf-8"), done.stdout


# What a page says


def test_a_run_begins_with_its_answer_and_has_everything(run, tmp_path):
    text, told = written(run, tmp_path / "page.html")
    page, report = Page(text), RunReport.read(run / "report.json")
    assert "The held-out loss fell" in told
    assert f"{report.before.loss:.4f} before training, {report.after.loss:.4f} after" in page.text
    assert page.text.index("The held-out loss fell") < page.text.index("Before and after")
    assert "one run with one seed (0)" in page.text
    for title in ("Answers side by side", "Training", "What moved in the weights", "Cost", "Data", "Settings"):
        assert f" {title} " in page.text
    assert report.data["train"]["sha256"] in page.text
    assert "train.per_device_train_batch_size" in page.text
    assert report.versions["torch"] in page.text
    assert f"dude chat {run}/adapter" in page.text
    assert all(answer.text.strip() in page.text for answer in report.after.answers if answer.text.isprintable())
    titles = [" ".join(part.split()) for part in re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S)]
    assert len(titles) == 7
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_movement_is_that_of_the_live_model(run):
    from transformers import AutoModelForCausalLM

    live = dude_peft.load_adapter(AutoModelForCausalLM.from_pretrained(run.parent / "model"), run / "adapter")
    theirs = movement(live)
    found = adapted(run / "adapter", None)
    assert found.problem is None
    assert {one.name for one in found.layers} == set(theirs)
    for one in found.layers:
        assert one.magnitude == pytest.approx(theirs[one.name]["magnitude"], rel=1e-4, abs=1e-9)
        assert one.direction == pytest.approx(theirs[one.name]["direction"], rel=1e-4, abs=1e-9)


def test_spectra_are_those_of_the_whole_matrices(run):
    from dude_peft.exporting.adapter import open_adapter

    opened, found = open_adapter(run / "adapter"), adapted(run / "adapter", None)
    one = found.layers[0]
    tensors, s = opened.layer(one.name, tuple(opened.base[one.name]["shape"])), opened.scaling(one.name)
    A, B = tensors.A0 + tensors.dA, tensors.B0 + tensors.dB
    for values, matrix in (
        (one.start, s * tensors.B0 @ tensors.A0),
        (one.end, s * B @ A),
        (one.change, s * (B @ A - tensors.B0 @ tensors.A0)),
    ):
        expected = torch.linalg.svdvals(matrix.double())[: len(values)]
        assert torch.allclose(torch.tensor(values, dtype=torch.double), expected, rtol=1e-3, atol=1e-5)
    Q0, Q = torch.linalg.qr(tensors.A0.double().T).Q, torch.linalg.qr(A.double().T).Q
    cosine = torch.linalg.svdvals(Q0.T @ Q).min()
    assert one.angle == pytest.approx(math.degrees(math.acos(min(1.0, float(cosine)))), abs=0.01)


def test_without_the_base_model_the_rest_is_told(run, tmp_path):
    (run.parent / "model").rename(tmp_path / "away")
    try:
        found = adapted(run / "adapter", None)
        text, _ = written(run, tmp_path / "page.html")
    finally:
        (tmp_path / "away").rename(run.parent / "model")
    assert found.problem
    assert all(one.direction is None and one.magnitude is not None for one in found.layers)
    assert "The directions need the base model" in text


def test_an_evaluation(evaluation, tmp_path):
    text, told = written(evaluation, tmp_path / "page.html")
    page = Page(text)
    assert "75.0% (30.0% to 95.0%)" in told
    assert "a sample of 4 of 1,319 items" in page.text
    assert "Tom has 3 apples. 0 m" in page.text
    assert "where the base model is better: the first 1" in page.text
    assert "math-verify judges differently" in page.text
    assert "generations that never stopped" in page.text


def test_a_comparison(compared, tmp_path):
    text, told = written(compared, tmp_path / "page.html")
    page = Page(text)
    assert "has the best mean" in told
    assert "beats lora by" in page.text
    assert "dora: 1 of 5 final runs failed" in told
    for words in ("NaN at step 3", "Other models were not tested.", "A rate is on the edge.", "ab12"):
        assert words in page.text
    for title in ("Ranking", "Pairs of methods", "Learning rates", "Seeds", "What tuning costs", "Cost against gain"):
        assert f" {title} " in page.text


def test_the_csv_has_every_number(compared, tmp_path):
    text, _ = written(compared, tmp_path / "numbers.csv", "--to", "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    from dude_peft.comparison.outcome import Comparison
    from dude_peft.comparison.statistics import summarise

    whole = Comparison.read(compared)
    expected = summarise(whole)
    values = {float(row["value"]) for row in rows}
    assert {one.mean for one in expected.methods} <= values
    assert {pair.difference for pair in expected.pairs} <= values
    assert {trial.validation_loss for trial in whole.trials} <= values
    assert {value for one in expected.methods for value in one.by_seed.values()} <= values


def test_markdown_has_the_answer_and_the_tables(compared, tmp_path):
    text, _ = written(compared, tmp_path / "page.md", "--to", "md")
    assert text.startswith("# A comparison: mine\n")
    assert "| method | learning rate |" in text
    assert "<" not in text


def test_the_same_folder_gives_the_same_bytes(run, tmp_path):
    first, _ = written(run, tmp_path / "one.html")
    second, _ = written(run, tmp_path / "two.html")
    assert first == second


def test_the_page_at_the_end_of_a_run_is_that_of_dude_report(run, tmp_path):
    text, _ = written(run, tmp_path / "page.html")
    assert (run / "page.html").read_text(encoding="utf-8") == text
    assert "How far the direction moved" in text  # the base weights were at hand, without their files
    assert len(text) < 3_000_000
    again = dude("train", run.parent / "run.yaml")
    assert again.returncode == 0, again.stderr
    assert "this run is finished" in again.stdout
    assert "dude report" not in again.stdout


def test_runs_without_a_page_at_their_end(run, tmp_path, capsys):
    """None is wanted, nothing was measured, or it fails: the run ends well, and says what writes a page."""
    from dude_peft.config.reading import load_config
    from dude_peft.training.run import run as trained

    def failing(folder, weight_of):
        raise RuntimeError("two\nlines")

    config = json.loads((run.parent / "run.yaml").read_text(encoding="utf-8"))
    path, folder = place_config(tmp_path, {**config, "output_dir": str(tmp_path / "run")}), tmp_path / "run"
    options, unmeasured = ["train.max_steps=1"], ["train.max_steps=1", "evaluation={enabled: false}"]
    for overrides, write_page, warning in (
        (options, failing, "there is no page about this run (two lines); the run itself is finished"),
        (options, None, ""),
        (unmeasured, failing, ""),
    ):
        trained(load_config(path, overrides), overwrite=True, write_page=write_page)
        told = capsys.readouterr()
        assert f"dude report {folder} -o {folder}.html" in told.out
        assert warning in " ".join((told.out + told.err).split())
        assert not (folder / "page.html").exists()
        assert not [text for text in RunReport.read(folder / "report.json").warnings if "page" in text]
        (folder / "page.html").write_text("of an older run")
    with pytest.raises(StoppedError, match="stopped by Ctrl-C while the page was written; the run itself is finished"):
        trained(load_config(path, options), overwrite=True, write_page=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert (folder / "report.json").is_file()


@pytest.mark.parametrize("changed", some_by_day([{"dtype": "bfloat16"}, {"transposed": True}], [{"dtype": "bfloat16"}]))
def test_base_weights_in_memory_and_in_files_give_the_same_page(changed, run, tmp_path):
    """Rounded on the way into memory, and GPT-2's, which lie the other way round."""
    config = json.loads((run.parent / "run.yaml").read_text(encoding="utf-8"))
    model = dict(config["model"])
    if changed.get("transposed"):
        from tiny import tiny_tokenizer
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(
            GPT2Config(vocab_size=261, n_embd=32, n_layer=2, n_head=2, n_positions=128, eos_token_id=256)
        ).save_pretrained(tmp_path / "gpt2")
        tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
        model["name_or_path"] = str(tmp_path / "gpt2")
    else:
        model["dtype"] = "bfloat16"
    config |= {"model": model, "output_dir": str(tmp_path / "run")}
    done = dude("train", place_config(tmp_path, config), "--set", "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    text, _ = written(tmp_path / "run", tmp_path / "page.html")
    assert (tmp_path / "run/page.html").read_text(encoding="utf-8") == text
    assert "How far the direction moved" in text


def test_a_run_of_stock_peft_has_a_page_too(run, tmp_path):
    config = json.loads((run.parent / "run.yaml").read_text(encoding="utf-8"))
    (tmp_path / "ia3.json").write_text('{"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}')
    config |= {"adapter": {"method": f"peft:{tmp_path / 'ia3.json'}"}, "output_dir": str(tmp_path / "run")}
    done = dude("train", place_config(tmp_path, config), "--set", "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    text, _ = written(tmp_path / "run", tmp_path / "page.html")
    assert (tmp_path / "run/page.html").read_text(encoding="utf-8") == text
    assert "peft:IA3 is an adapter of stock PEFT, which is not taken apart here" in text


def test_from_python(compared, tmp_path):
    page = dude_peft.report(compared, tmp_path / "page.html")
    assert page.path.is_file()
    assert "has the best mean" in page.answer[0]
    assert "has the best mean" in page._repr_html_()


def test_without_matplotlib_the_numbers_are_there(compared, tmp_path, monkeypatch):
    monkeypatch.setattr(html_module, "can_draw", lambda: False)
    dude_peft.report(compared, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in text
    assert "the figure needs matplotlib (pip install" in text
    assert Page(text).text.count("Validation loss over learning rate") >= 2


# Safe


def hostile():
    """200 texts that somebody might have put where a name or an answer stands."""
    seeds = [
        "<script>alert(1)</script>", "</style><script>x</script>", "</title><img src=x onerror=alert(1)>",
        '"><svg/onload=x>', "' onmouseover='x", "{{ 7*7 }}", "{% for x in y %}", "javascript:alert(1)",
        "data:text/html,<b>", "&lt;b&gt;", "]]>", "<!-- ", "-->", "<base href=//evil>",
        "<meta http-equiv=refresh content=0>", "\x00\x01\x1b[31m", "\u202egnp.exe", "\ud800", "$x_{1}$", "$\\frac{",
        "=cmd|' /C calc'!A0", "@SUM(1)", "+1", "-1", "`rm -rf`", "```\n# h", "|a|b|", "_x", "[a](javascript:x)",
        "![a](http://evil/x.png)", "http://evil.example", "@everyone", "#1", "\n\n# heading", "\r\nX: y",
        "a" * 9000, "💥" * 50, "٣\u200f", "<a href='http://evil'>x</a>", "<iframe src=http://evil>",
    ]  # fmt: skip
    return [f"{seed}{ending}" for ending in ("", "</pre>", "\\", "\u2028x", "'\"><i>") for seed in seeds]


def inert(text):
    """Refuses a page in which a foreign text has become markup."""
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert tags <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "div", "p", "nav", "ul", "li", "a",
        "section", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img", "details",
        "summary", "pre", "footer",
    }  # fmt: skip
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        if tag == "a":
            assert re.fullmatch(r"#s\d+", attributes["href"])
        if tag == "img":
            assert attributes["src"].startswith("data:image/svg+xml;base64,")
            for part in ElementTree.fromstring(base64.b64decode(attributes["src"].partition(",")[2])).iter():
                assert part.tag.rpartition("}")[2] in SVG
                for name, value in part.attrib.items():
                    assert not name.startswith("on")
                    assert not name.endswith("href") or value.startswith(("#", "data:image/png;base64,"))
    assert sum(tag == "style" for tag, _ in page.tags) == 1
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    return page


def document_of(texts):
    table = Table(texts[0], (texts[1], texts[2]), tuple((text, number(1.5)) for text in texts))
    samples = Samples(texts[3], tuple(Sample(text, text, ((text, text), (text, text))) for text in texts))
    points = {text: [(1.0, 2.0), (2.0, 3.0)] for text in texts[:40]}
    return Document(
        texts[4],
        tuple(texts),
        (
            Section(texts[5], (table, Text(texts[6]), samples, Commands((texts[7],)))),
            Section(
                texts[8],
                (
                    lines_figure(texts[9], texts[10], points, x="x", y="y"),
                    scatter_figure(texts[11], texts[12], points, x="x", y="y", trend=(1.0, 0.0)),
                    bars_figure(texts[13], texts[14], [(text, 1.0, (0.5, 1.5)) for text in texts[:40]], x="x"),
                    map_figure(texts[15], texts[16], ["0"], texts[:20], {("0", text): 1.0 for text in texts[:20]}),
                ),
            ),
        ),
    )


def test_200_hostile_texts_are_inert():
    texts = hostile()
    assert len(texts) == 200
    for shift in (0, 17, 60, 111, 160):
        inert(html(document_of(texts[shift:] + texts[:shift])))


@pytest.mark.slow
def test_hostile_folders(tmp_path):
    for place, text in enumerate(["<script>x</script>\"'", "$x_{$ \u202e", "=1+1|`a`|[b](http://c)"]):
        folder = tmp_path / str(place)
        folder.mkdir()
        whole = comparison({text: 1.5, "dude": 1.3})
        replace(whole, name=text, protocol={text: text}, not_tested=(text,), warnings=(text,)).write(folder)
        page, told = written(folder, folder / "page.html")
        inert(page)
        assert "\u202e" not in told
        marked, _ = written(folder, folder / "page.md", "--to", "md")
        assert "<script" not in marked
        assert not re.search(r"(?<!\\)\]\(", marked)
        numbers, _ = written(folder, folder / "page.csv", "--to", "csv")
        for row in csv.reader(io.StringIO(numbers)):
            assert not [cell for cell in row[:4] if cell[:1] in ("=", "+", "-", "@")]
        inert(written(write_evaluation(tmp_path / f"e{place}", text), tmp_path / f"e{place}.html")[0])


def test_markdown_of_hostile_texts_has_no_markup():
    text = markdown(document_of(hostile()))
    outside = re.sub(r"(`{3,})bash\n.*?\n\1", "", text, flags=re.S)
    assert not re.search(r"<[a-z!/]|(?<!\\)\[[^\]]*\]\(", outside)
    assert len([line for line in outside.splitlines() if line.startswith("#")]) == 3


def test_the_policy_allows_the_page_itself_alone(compared, tmp_path):
    text, _ = written(compared, tmp_path / "page.html")
    page = Page(text)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert len(text) < 3 << 20
    assert not re.search(r"https?://", re.sub(r"base64,[^\"]*", "", text))
    # A table that scrolls can be reached by keys, and every table names its rows and columns.
    assert all(a.get("tabindex") == "0" and a["aria-label"] for tag, a in page.tags if a.get("class") == "wide")
    assert all(a.get("scope") in ("row", "col") for tag, a in page.tags if tag == "th")


# Refusals


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-o", "taken.html"], 2, "already exists"),
        (["-o", "link.html", "--overwrite"], 2, "is not a file"),
        (["-o", "folder", "--overwrite"], 2, "is not a file"),
        (["-o", "nowhere/page.html"], 2, "no such folder; create it"),
        (["-o", "page.pdf", "--to", "pdf"], 2, "there is html, md, csv"),
        ([], 2, "--output"),
    ],
)
def test_outputs_that_cannot_be_used(compared, tmp_path, options, code, words):
    (tmp_path / "taken.html").write_text("mine")
    (tmp_path / "link.html").symlink_to(tmp_path / "taken.html")
    (tmp_path / "folder").mkdir()
    done = dude("report", compared, *options, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert words in done.stderr
    assert (tmp_path / "taken.html").read_text() == "mine"


def test_overwrite_replaces_and_odd_names_are_shown(compared, tmp_path):
    odd = tmp_path / "a\nb\x1b[31m.html"
    written(compared, odd)
    assert dude("report", compared, "-o", odd).returncode == 2
    _, told = written(compared, odd, "--overwrite")
    assert "\x1b" not in told


def test_folders_that_are_none_of_the_three(run, tmp_path):
    unfinished, asked, damaged = tmp_path / "unfinished", tmp_path / "asked", tmp_path / "damaged"
    for folder in (unfinished, asked / "answers", damaged / "answers", tmp_path / "empty"):
        folder.mkdir(parents=True)
    (unfinished / "run.json").write_text("{}")
    (damaged / "results.json").write_text('{"model": 3}')
    for folder, words in (
        (tmp_path / "nothing", "no such folder"),
        (run / "report.json", "is a file; give the folder of a run"),
        (tmp_path / "empty", "is not the folder of a run"),
        (unfinished, "has not finished; run dude train again"),
        (asked, "has not finished; run dude eval again"),
        (damaged, "is damaged"),
        (run / "adapter", f"give the run's folder, {run}"),
    ):
        done = dude("report", folder, "-o", tmp_path / "page.html")
        assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
        assert words in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_forged_files_are_told_in_one_line(run, compared, tmp_path):
    """Their seal is right, what they hold is not."""
    import shutil

    forged = [
        (run, "report.json", {"data": [1]}), (run, "report.json", {"seconds": {"x": "y"}}),
        (run, "report.json", {"config": 3}), (run, "report.json", {"tasks": {"measures": [3]}}),
        (compared, "comparison.json", {"protocol": 3, "methods": 4}), (compared, "comparison.json", {"base": {}}),
        (compared, "comparison.json", {"primary": "right"}), (compared, "comparison.json", {"format": 2}),
    ]  # fmt: skip
    for place, (folder, name, changes) in enumerate(forged):
        copy = shutil.copytree(folder, tmp_path / str(place), ignore=shutil.ignore_patterns("adapter", "checkpoints"))
        if (folder / "adapter").is_dir():
            (copy / "adapter").symlink_to(folder / "adapter")
        content = json.loads((copy / name).read_text(encoding="utf-8"))
        del content["sha256"]
        (copy / name).write_text(json_text(sealed({**content, **changes})), encoding="utf-8")
        done = dude("report", copy, "-o", tmp_path / f"{place}.html")
        assert done.returncode in (0, 4), done.stderr
        assert done.returncode == 0 or done.stderr.count("\n") == 1, done.stderr


def test_edited_files_are_refused(run, compared, evaluation, tmp_path):
    import shutil

    copies = [shutil.copytree(one, tmp_path / str(n)) for n, one in enumerate((run, run, compared, evaluation))]
    for folder, name in zip(
        copies, ("report.json", "metrics.jsonl", "comparison.json", "samples/gsm8k.jsonl"), strict=True
    ):
        path = folder / name
        path.write_text(path.read_text(encoding="utf-8").replace("1", "2", 1).replace("{", "[", name[0] == "s"))
        done = dude("report", folder, "-o", tmp_path / "page.html")
        assert (done.returncode, done.stderr.count("\n")) == (4, 1), (name, done.stderr)
