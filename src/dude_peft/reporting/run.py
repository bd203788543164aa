"""`dude report`: which folder it is, what its page says, and the one file that is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dude_peft.artifact.durable import disk_errors, replace_file
from dude_peft.errors import ArtifactError, ConfigError, DudeError
from dude_peft.folder.record import PAGE
from dude_peft.installing import install
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.html import table
from dude_peft.terminal.quiet import quiet_imports

if TYPE_CHECKING:
    from dude_peft.measure.base_weights import WeightOf
    from dude_peft.reporting.document import Document

FORMS = ("html", "md", "csv")
_RUN, _EVALUATION, _COMPARISON = "report.json", "results.json", "comparison.json"


@dataclass(frozen=True)
class Page:
    """A page that was written."""

    path: Path
    answer: tuple[str, ...]
    """What it begins with: the result in words, a sentence each."""

    def _repr_html_(self) -> str:
        return table(str(self.path), [(sentence,) for sentence in self.answer])


def report(
    folder: Path,
    output: Path,
    *,
    to: str = "html",
    overwrite: bool = False,
    quiet: bool = False,
    weight_of: WeightOf | None = None,
) -> Page:
    """Write the page of a run, an evaluation or a comparison.

    Args:
        folder: its folder.
        output: the file.
        to: html, md or csv.
        overwrite: replace a file that is there.
        quiet: print nothing.
        weight_of: the base weights of a run's model, where they are in memory.

    Raises:
        ConfigError: no such form, an output that cannot be used, or scipy is missing.
        ArtifactError: the folder is none of the three, not finished, or damaged.
        ResourceError: disk or permission.
    """
    if to not in FORMS:
        raise ConfigError(f"--to {shown(to)}: there is {', '.join(FORMS)}; choose one")
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError(f"dude report needs scipy: {install('scipy')}")
    _check_output(output, overwrite)
    kind = _kind(folder)
    display = Display(quiet=quiet)
    with display.waiting(f"reading {shown(folder, 200)}"), quiet_imports():
        if kind == _RUN:
            from dude_peft.reporting.of_run import document_of_run

            made: Callable[[Path], Document] = partial(document_of_run, weight_of=weight_of)
        elif kind == _EVALUATION:
            from dude_peft.reporting.of_evaluation import document_of_evaluation as made
        else:
            from dude_peft.reporting.of_comparison import document_of_comparison as made
        if to == "html":
            from dude_peft.reporting.html import html as written
        elif to == "md":
            from dude_peft.reporting.markdown import markdown as written
        else:
            from dude_peft.reporting.csv_text import csv_text as written
        try:
            document = made(folder)
            content = written(document).encode("utf-8", "backslashreplace")
        except DudeError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Sealed by whoever wrote it, it may hold anything.
            reason = f"{type(error).__name__}: {shown(error)}"
            raise ArtifactError(
                f"{shown(folder / kind, 300)} is not as this version writes it ({reason}); make it again"
            ) from error
    with disk_errors(output):
        try:
            replace_file(output, content, new=not overwrite)
        except FileExistsError:
            raise _taken(output) from None
    for sentence in document.answer:
        display.say(shown(sentence, None))
    if to == "html" and importlib.util.find_spec("matplotlib") is None:
        display.say(f"the page has no figures, because matplotlib is missing: {install('matplotlib')}")
    display.say(f"written: {shown(output, None)} ({len(content) / 1024:,.0f} KiB)")
    return Page(output, document.answer)


def page_of(folder: Path, weight_of: WeightOf | None = None) -> Path:
    """Write `page.html` into a folder that has just been finished, in place of an older one; as `report`."""
    return report(folder, folder / PAGE, overwrite=True, quiet=True, weight_of=weight_of).path


def _kind(folder: Path) -> str:
    """The file that tells what the folder is."""
    named = shown(folder, 300)
    if folder.is_file():
        raise ArtifactError(f"{named} is a file; give the folder of a run, its output_dir, or of a comparison")
    if not folder.is_dir():
        raise ArtifactError(f"{named}: no such folder; give the folder of a run, an evaluation or a comparison")
    found = [name for name in (_COMPARISON, _RUN, _EVALUATION) if (folder / name).is_file()]
    if found:
        return found[0]
    if (folder / "run.json").exists():
        raise ArtifactError(f"{named} is a run that has not finished; run dude train again, it resumes")
    if (folder / "answers").is_dir():
        raise ArtifactError(f"{named} is an evaluation that has not finished; run dude eval again, it resumes")
    parent = folder.absolute().parent
    hint = f"give the run's folder, {shown(parent, 300)}" if (parent / _RUN).is_file() else "give one of these"
    raise ArtifactError(f"{named} is not the folder of a run, an evaluation or a comparison; {hint}")


def _check_output(output: Path, overwrite: bool) -> None:
    named = shown(output, 300)
    if not output.parent.is_dir():
        raise ConfigError(f"output {named}: no such folder; create it, or choose another name")
    if output.is_symlink() or (output.exists() and not output.is_file()):
        raise ConfigError(f"output {named} is not a file; choose another name")
    if output.exists() and not overwrite:
        raise _taken(output)


def _taken(output: Path) -> ConfigError:
    return ConfigError(f"output {shown(output, 300)} already exists; choose another name, or add --overwrite")
