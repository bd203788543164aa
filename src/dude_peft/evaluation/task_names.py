"""Which names the harness's tasks have, as its files spell them: a misspelt one is told in a second.

The harness's own index parses thousands of YAML files, which takes a quarter of a minute; here their lines are looked
at. What is found is at least every name: each word behind `task:`, `group:` and `tag:`, and in the lists below these.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dude_peft.doors import read_file
from dude_peft.errors import ConfigError
from dude_peft.show import quoted

GSM8K = ("gsm8k", "gsm8k_cot", "gsm8k_cot_zeroshot")
WORDMATH = "wordmath"
LLM_ADAPTERS = ("commonsense", "math")
GROUPS = ("mmlu", *LLM_ADAPTERS)

_NAMES = re.compile(
    r"""^[ \t-]*["']?(?:task|group|tag)["']?[ \t]*:(.*(?:\n[ \t]*-.*|\n[ \t]+\S.*|\n\].*)*)""", re.MULTILINE
)
_WORD = re.compile(r"[^\s\[\]{},:\"'#]+")
_LARGEST_BYTES = 1 << 20


def is_yaml(name: str) -> bool:
    """Whether it is the path of a user's own task."""
    return name.endswith((".yaml", ".yml"))


def harness_tasks() -> Path:
    """The folder of the harness's tasks; ModuleNotFoundError where it is not installed."""
    found = importlib.util.find_spec("lm_eval")  # not lm_eval.tasks, which would import torch
    if found is None or found.origin is None:
        raise ModuleNotFoundError("lm_eval", name="lm_eval")
    return Path(found.origin).parent / "tasks"


def check_names(names: Sequence[str]) -> None:
    """Refuse what no task is called; files, and names of our own, are not looked at.

    Raises:
        ConfigError: an unknown name, with the closest ones.
    """
    asked = [name for name in names if not is_yaml(name) and name not in (*GSM8K, *GROUPS, WORDMATH)]
    if not asked:
        return
    for name in asked:
        if not name.isprintable() or not name or name != name.strip():
            raise ConfigError(f"--tasks: {quoted(name)} is no name of a task; `lm-eval ls tasks` lists all tasks")
    known = _spelt(harness_tasks())
    for name in asked:
        # A name that is no word of a file may be one all the same: the harness's index decides.
        if _WORD.fullmatch(name) and name not in known:
            raise ConfigError(unknown(name, known))


def unknown(name: str, known: Iterable[str]) -> str:
    """What is said of a name that no task has, with the closest of those that are known."""
    names = [*GROUPS, *GSM8K, WORDMATH, *(name for name in known if "\\" not in name)]  # escapes of YAML are no names
    close = dict.fromkeys(difflib.get_close_matches(name, names, n=4, cutoff=0.5))
    hint = f"did you mean {', '.join(map(quoted, close))}?" if close else "`lm-eval ls tasks` lists all tasks"
    return f"--tasks: there is no task {quoted(name)}; {hint}"


def _spelt(folder: Path) -> set[str]:
    found: set[str] = set()
    for where, _, files in os.walk(folder):
        for file in files:
            path = os.path.join(where, file)
            if file.endswith((".py", ".pyc", ".md")) or os.path.getsize(path) > _LARGEST_BYTES:
                continue
            text = read_file(path, _LARGEST_BYTES).decode("utf-8", "replace")
            found.update(word for block in _NAMES.findall(text) for word in _WORD.findall(block))
    return found
