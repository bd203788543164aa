"""The documentation: made parts are current, links lead somewhere, code runs, the site builds without a warning."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from page_blocks import add_adapter, blocks, make_folder, run_page

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
PAGES = [*DOCS, README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
RUN_HERE = [page for page in (*DOCS, README) if blocks(page, "python", "bash", "yaml", "json")]
# Several runs, proofs in processes of their own, the harness.
SLOW = {"README.md", "index.md", "export.md", "evaluation.md", "training.md"}
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def named(paths, slow=()):
    return [pytest.param(p, id=p.name, marks=[pytest.mark.slow] * (p.name in slow)) for p in paths]


def test_made_parts_are_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    docs = importlib.import_module("docs")
    if tuple(map(int, metadata.version("typer").split(".")[:2])) < (0, 29):
        pytest.skip("the pages are made with a newer typer")
    stale = [page.name for page in docs.pages() if page.read_text("utf-8") != docs.made(page)]
    assert not stale, "run python scripts/docs.py"


def headings(page):
    """Anchors, as the site and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    for title in re.findall(r"^#+ (.+)$", text, re.M):
        words = re.sub(r"[^\w\s-]", "", title.partition(" {")[0].lower())
        yield re.sub(r"\s+", "-", words.strip())


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = page if not name else page.parent / name
        assert path.is_file(), f"{page.name}: {target}"
        if anchor:
            assert anchor in headings(path), f"{page.name}: {target}"


def test_readme_is_one_page():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert (ROOT / "docs" / "images" / "quickstart.svg").is_file()


def test_the_picture_of_growth_is_of_the_newest_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    growth = importlib.import_module("growth")
    assert growth.seal() in growth.PICTURE.read_text("utf-8"), "run python scripts/growth.py"
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert all(growth.newest(kind).name in page for kind in ("step-growth-float32", "memory-growth-float32"))


def test_a_published_figure_that_the_plan_misses_by_far_says_why():
    records = (ROOT / "benchmarks/results").glob("*-plan-published*.json")
    figures = [each for path in records for each in json.loads(path.read_text("utf-8"))["results"].items()]
    assert figures
    unexplained = [title for title, found in figures if abs(found["ratio"] - 1) > 0.15 and not found["why"]]
    assert unexplained == []


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert all(page.name in menu for page in DOCS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What pages speak of."""
    return make_folder(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """The same, with a finished run."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("finished") / "pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        add_adapter(folder)
    return folder


@pytest.mark.parametrize("page", named(RUN_HERE, SLOW))
def test_code_runs(page, request, tmp_path, monkeypatch):
    code = "".join(text for _, text in blocks(page, "python", "bash"))
    folder = tmp_path / "page"
    shutil.copytree(request.getfixturevalue("finished" if "runs/mine/adapter" in code else "prepared"), folder)
    monkeypatch.chdir(folder)
    run_page(page, folder)


SMALL = 'MODEL, GGUF_FILE = "my-model", None\nSTEPS, ROWS, EVAL_ROWS, SEEDS = 2, 8, 2, (0, 1)'


@pytest.mark.parametrize("notebook", named(NOTEBOOKS))
def test_the_cells_of_notebooks_run(notebook, prepared, tmp_path, monkeypatch):
    """One after the other, here: a kernel of its own, as below, takes longer than they do."""
    shutil.copytree(prepared / "my-model", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        code = SMALL if "parameters" in cell["metadata"].get("tags", []) else "".join(cell["source"])
        tree = ast.parse(code)
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, notebook.name, "exec"), names)
        shown = None if last is None else eval(compile(last, notebook.name, "eval"), names)
        assert shown is None or shown._repr_html_().startswith("<table>")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", named(NOTEBOOKS))
def test_notebooks_run(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="install the group dev")
    nbformat = pytest.importorskip("nbformat", reason="install the group dev")
    make_folder(tmp_path)
    content = nbformat.read(notebook, as_version=4)
    settings = next(cell for cell in content.cells if "parameters" in cell.metadata.get("tags", []))
    settings.source = SMALL
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_notebooks_use_public_names_alone_and_carry_no_output():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        code = "\n".join("".join(cell["source"]) for cell in cells)
        assert not re.findall(r"dude_peft\.\w+\.|from dude_peft\.|import dude_peft\.|\b_\w", code), path.name
        assert not any(cell["outputs"] for cell in cells), path.name


def build_site(folder: Path) -> None:
    mkdocs = Path(sys.executable).parent / "mkdocs"
    if not mkdocs.is_file():
        pytest.skip("mkdocs is not installed: pip install --group docs")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [str(mkdocs), "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr


def test_the_site_builds_without_a_warning_and_reads_nothing_from_elsewhere(tmp_path):
    build_site(tmp_path)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(DOCS)
    for page in pages:
        text = page.read_text("utf-8")
        assert "<code>math " not in text, f"{page.name}: a formula was not understood"
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(https?:[^\"' >]+)", text)
        assert not loaded, f"{page.name} loads {loaded}"
