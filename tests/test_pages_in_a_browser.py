"""Pages as Chromium shows them: accessible (axe), quiet, without a request, also on a phone, in the dark, on paper.

Needs playwright (pip), a Chromium (playwright's own, or the one that DUDE_CHROMIUM names) and axe-core (npm install
axe-core at the root of the checkout, or the axe.min.js that DUDE_AXE names).
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import itertools
import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="dude report needs scipy, which is not installed here")

from test_docs import build_site
from test_report import compared, document_of, evaluation, hostile, run, written  # noqa: F401

from dude_peft.reporting.html import html

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed here"),
]
AXE = Path(os.environ.get("DUDE_AXE") or Path(__file__).parent.parent / "node_modules/axe-core/axe.min.js")
WIDTHS, SCHEMES = (1280, 360), ("light", "dark")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import Error, sync_playwright

    if not AXE.is_file():
        pytest.skip("axe-core is not here: npm install axe-core, or set DUDE_AXE")
    own = os.environ.get("DUDE_CHROMIUM")
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium starts here: {str(error).splitlines()[0]}")
        yield found
        found.close()


def opened(browser, url, width, scheme, own=()):
    """The page, and what it did that no page may: requests beyond what is its own, messages, errors, dialogs."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    done: list[str] = []
    own = ("data:image/svg", url, *own)
    page.on("request", lambda request: None if request.url.startswith(own) else done.append(request.url))
    page.on("console", lambda message: done.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: done.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (done.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(url)
    page.wait_for_load_state("networkidle")
    return page, done


def violations(page):
    """What axe finds, by rule."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return {one["id"]: [node["html"][:200] for node in one["nodes"][:3]] for one in found}


@pytest.fixture(params=["run", "evaluation", "compared", "hostile"])
def file(request, tmp_path):
    path = tmp_path / "page.html"
    if request.param == "hostile":
        path.write_text(html(document_of(hostile())), encoding="utf-8", errors="backslashreplace")
    else:
        written(request.getfixturevalue(request.param), path)
    return path


def test_a_page_is_accessible_and_asks_for_nothing(browser, file):
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        page, done = opened(browser, file.as_uri(), width, scheme)
        assert done == [], (width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        assert violations(page) == {}, (width, scheme)
        page.close()
    assert file.stat().st_size < 3_000_000


def test_faults_are_noticed(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        "<!doctype html><html lang=en><title>x</title><main><h1 style='color:#eee'>pale</h1><img src=none.png>"
        "<script>console.log('said'); throw new Error('thrown')</script></main>"
    )
    page, done = opened(browser, path.as_uri(), 360, "light")
    assert {"color-contrast", "image-alt"} <= set(violations(page))
    assert {"console: said", "error: thrown"} <= set(done)
    assert [what for what in done if what.endswith("none.png")]
    page.close()


def test_a_page_prints(browser, file):
    page, _ = opened(browser, file.as_uri(), 1280, "light")
    assert page.pdf().startswith(b"%PDF")
    page.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, and where it is served: its search wants a server."""
    folder = tmp_path_factory.mktemp("site")
    build_site(folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_every_page_of_the_site_fits_and_asks_for_nothing(browser, site):
    folder, url = site
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        for file in sorted(folder.glob("*.html")):
            page, done = opened(browser, url + file.name, width, scheme, own=(url, "data:", "blob:"))
            assert done == [], (file.name, width, scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (file.name, width, scheme)
            page.close()
