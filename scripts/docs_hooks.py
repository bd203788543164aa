"""What the site adds to docs/: pages and files from the rest of the repository, and formulas as MathML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that lie at the root, where GitHub looks for them.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
_RELATIVE = re.compile(r"\]\((?!https?:|mailto:|#)(?:\./)?([^)\s]+)")


def on_config(config: MkDocsConfig) -> None:
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _formula})


def on_files(files: Files, config: MkDocsConfig) -> None:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_from_the_root((ROOT / name).read_text("utf-8"))))
    for page in list(files.documentation_pages()):
        for target in _OUTSIDE.findall(page.content_string):
            if target not in PAGES and files.get_file_from_path(_copy(target)) is None:
                files.append(File.generated(config, _copy(target), abs_src_path=str(ROOT / target)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _OUTSIDE.sub(lambda link: f"]({PAGES.get(link[1], _copy(link[1]))}", markdown)


def _from_the_root(markdown: str) -> str:
    """A page of the root as if it lay in docs/."""

    def moved(link: re.Match[str]) -> str:
        inside = link[1].startswith("docs/")
        return f"]({link[1].removeprefix('docs/') if inside else '../' + link[1]}"

    return _RELATIVE.sub(moved, markdown)


def _copy(target: str) -> str:
    return f"repository/{target}"


def _formula(source: str, language: str, class_name: str, options: Any, md: Any, **_: Any) -> str:
    from latex2mathml.converter import convert

    lines = [line for line in re.split(r"\\\\\s*", source.strip()) if line]
    # A phone is narrower than a formula: it scrolls by itself, not the whole page.
    scrolls = '<p class="math" style="overflow-x: auto">'
    return "".join(f"{scrolls}{convert(line, display='block')}</p>" for line in lines)
