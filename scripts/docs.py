"""Writes the parts of the documentation that follow from the code and the records.

    python scripts/docs.py           write them
    python scripts/docs.py --check   fail where a page is not what this writes

A page holds `<!-- made: NAME -->` and `<!-- end -->`; what stands between them is made here.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docs_results

ROOT = Path(__file__).resolve().parent.parent
_MADE = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is stale")
    check = parser.parse_args().check
    stale = [path for path in pages() if path.read_text("utf-8") != made(path)]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is stale; run python scripts/docs.py' if check else 'written'}")
        if not check:
            path.write_text(made(path), "utf-8")
    sys.exit(1 if check and stale else 0)


def pages() -> list[Path]:
    """All pages that may hold made parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def made(path: Path) -> str:
    """A page with its made parts as they should be."""
    return _MADE.sub(lambda part: f"{part[1]}\n{MAKERS[part[2]]().strip()}\n\n{part[3]}", path.read_text("utf-8"))


def configuration() -> str:
    from dude_peft.config.explain import choices, explain

    blocks, section = [], ""
    for key, values, default, meaning in explain():
        top = key.partition(".")[0] if "." in key else "output_dir"
        if top != section:
            section = top
            blocks.append(f"## {section}\n\n| key | takes | default | meaning |\n|---|---|---|---|")
        blocks[-1] += f"\n| `{key}` | {_cell(values)} | {_default(default)} | {_cell(meaning)} |"
    for key in ("adapter.method", "train.learning_rate"):
        blocks.append(f"`{key}` by method:\n\n" + "\n".join(f"- {_cell(line)}" for line in choices(key)))
    return "\n\n".join(blocks)


def grid() -> str:
    from dude_peft.config.explain import explain_grid

    keys = [row for row in explain_grid() if "[]" not in row[0]]  # sources are those of data.train
    rows = [f"| `{key}` | {_cell(v)} | {_default(d)} | {_cell(meaning)} |" for key, v, d, meaning in keys]
    return "| key | takes | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)


def python() -> str:
    """The public functions as a table, for readers of the clone."""
    import inspect

    import dude_peft

    rows = ["| name | does |", "|---|---|"]
    names = "train compare plan method_table check_data generate evaluate merge export verify report load_adapter"
    for name in names.split():
        function = getattr(dude_peft, name)
        parts = [p.name if p.default is p.empty else f"{p.name}={p.default!r}"
                 for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]  # fmt: skip
        first = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
        rows.append(f"| `{name}({_cell(', '.join(parts))})` | {_cell(first)} |")
    return "\n".join(rows)


def methods() -> str:
    """`dude methods` without a model."""
    from dude_peft.planning.method_table import method_table

    rows = ["| method | what it is | take it for | start | step beside W0 | learning rate | source |"]
    rows.append("|---" * 7 + "|")
    for row in method_table().rows:
        rate = f"{row.learning_rate:g}" + (f" (of {row.rate_of})" if row.rate_of else "")
        number = re.fullmatch(r"arXiv ([\d.]+)", row.paper)
        paper = f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else row.paper
        cells = [f"`{row.name}`", row.summary, row.choose, row.start, row.step, rate, f"{paper}, {row.certainty}"]
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "| method | trained in a layer (out, in) | kept beside | experts |", "|---|---|---|---|"]
    rows += [
        f"| `{row.name}` | {row.trained} | {row.kept} | {'yes' if row.experts else 'no'} |"
        for row in method_table().rows
    ]
    return "\n".join(rows)


def commands() -> str:
    import typer.main

    from dude_peft.cli import app

    return "\n\n".join(_command(command, name) for name, command in _leaves(typer.main.get_command(app), "dude"))


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for word, inner in getattr(command, "commands", {}).items():
        yield from _leaves(inner, f"{name} {word}")
    if not hasattr(command, "commands"):
        yield name, command


def _command(command: Any, name: str) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in ("help", "version")]
    words = [a.metavar for a in arguments]
    usage = " ".join([name, *(w if a.required else f"[{w}]" for a, w in zip(arguments, words, strict=True))])
    usage += "".join(f" {p.opts[0]} {p.metavar or _kind(p)}" for p in options if p.required)
    text = f"## {name}\n\n{command.help}\n\n```text\n{usage}{' [OPTIONS]' if options else ''}\n```"
    rows = [f"| `{w}` | | {_cell(a.help or '')} |" for a, w in zip(arguments, words, strict=True)]
    rows += [f"| {_names(p)} | {_option_default(p)} | {_cell(p.help or '')} |" for p in options]
    return text + ("\n\n| argument or option | default | does |\n|---|---|---|\n" + "\n".join(rows) if rows else "")


def _names(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    value = "" if option.is_flag else f" {option.metavar or _kind(option)}"
    return _cell(", ".join(f"`{name}{value if name == option.opts[0] else ''}`" for name in names))


def _kind(option: Any) -> str:
    kinds = str(option.type_descriptor.annotation)
    return "N" if "int" in kinds else "X" if "float" in kinds else "PATH" if "Path" in kinds else "TEXT"


def _option_default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag:
        return f"`{option.opts[0]}`" if option.default and option.secondary_opts else ""
    return "" if option.default in (None, "", [], ()) else _default(str(option.default))


def layout() -> str:
    package = ROOT / "src" / "dude_peft"
    lines = ["src/dude_peft/"]
    for room in _rooms():
        folder = package / room
        if not folder.is_dir():
            lines.append(_described(f"  {room}.py", package / f"{room}.py"))
            continue
        lines.append(_described(f"  {room}/", folder / "__init__.py"))
        lines += [_described(f"    {p.name}", p) for p in sorted(folder.glob("*.py")) if p.name != "__init__.py"]
    for name in ("examples", "scripts", "benchmarks"):
        lines.append(f"{name}/")
        files = [p for p in sorted((ROOT / name).iterdir()) if p.suffix in (".py", ".sh", ".yaml", ".ipynb")]
        lines += [_described(f"  {path.name}", path) for path in files]
    lines.append("recipes/")
    lines += [_described(f"  {path.parent.name}/", path) for path in sorted((ROOT / "recipes").glob("*/run.yaml"))]
    return "```text\n" + "\n".join(lines) + "\n```"


def _rooms() -> list[str]:
    """From the bottom up, as the test of the imports has them."""
    test = ast.parse((ROOT / "tests" / "test_structure.py").read_text("utf-8"))
    lists = [node for node in test.body if isinstance(node, (ast.Assign, ast.AugAssign))]
    named = [node for node in lists if ast.unparse(node).startswith("ROOMS ")]
    return [room for node in named for room in ast.literal_eval(node.value)]


def _described(name: str, path: Path) -> str:
    return f"{name:<26} {_first_line(path)}".rstrip()


def _first_line(path: Path) -> str:
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        words = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split()
    elif path.suffix == ".ipynb":
        import json

        words = json.loads(text)["cells"][0]["source"][0].lstrip("# ").split()
    else:
        words = next(line for line in text.splitlines() if line.startswith("# ")).lstrip("# ").split()
    return re.split(r"(?<=[\w)`'])[.;](?= |$)", " ".join(words))[0].rstrip(".")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _default(text: str) -> str:
    return text if text == "required" else f"`{text}`"


MAKERS: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "grid": grid,
    "commands": commands,
    "python": python,
    "methods": methods,
    "layout": layout,
    **docs_results.MAKERS,
}

if __name__ == "__main__":
    main()
