"""What a run is, so that "the same command" can be told from another one: configuration, data, and where it computes.

run.json is written when training begins. A later start in the same folder compares: another configuration or other data
is refused with the difference, another machine or version is allowed with a warning: the numbers may then differ.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from dude_peft.artifact.base_settings import other_settings
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.sealed import content_sha256, read_object, read_sealed, sealed, unsealed
from dude_peft.config.reading import is_key
from dude_peft.config.schema import HELD_OUT
from dude_peft.data.tokenizer_parts import changed_parts
from dude_peft.errors import ArtifactError, ConfigError, DataError
from dude_peft.show import shown

NAME = "run.json"
FORMAT_VERSION = 2  # 1: without a seal
# What a run shows and keeps, but does not compute with.
_FREE = {
    "output_dir", "model.device_map", "model.max_memory", "model.offload_folder", "adapter.start", "data.streaming",
    "evaluation.samples", "train.save_steps", "train.save_total_limit",
    "train.report_to", "train.movement_steps", "train.grpo.reward_timeout",
    "train.grpo.reward_memory_gib",
}  # fmt: skip
# What the run is scored on; where that does not choose the adapter, it may change.
_SCORING = {
    "evaluation.tasks", "evaluation.tasks_data_dir", "evaluation.tasks_limit", "evaluation.tasks_chat",
    "evaluation.tasks_num_fewshot", "evaluation.tasks_text",
}  # fmt: skip
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Identity:
    """The content of run.json."""

    config: dict[str, Any]
    """The resolved configuration."""
    data: dict[str, str]
    """sha256 of each set of rows, in order."""
    environment: dict[str, Any]
    """What bit-exactness depends on: versions, device, threads, processes."""
    tokens: dict[str, str] = field(default_factory=dict)
    """sha256 of what each set of rows became, token ids and masks; of runs of older versions nothing is known."""
    tokenizer: dict[str, str] = field(default_factory=dict)
    """sha256 of each part of the tokenizer, which the adapter takes along."""
    asked: dict[str, Any] = field(default_factory=dict)
    """The adapter section as it was asked for, where its budget became the ranks of `config`."""
    moment: str = ""
    """When it began: the date that its chat template writes."""
    start: dict[str, Any] = field(default_factory=dict)
    """Of adapter.start: its sha256, and whether it is the base model; empty without one."""
    stages: str = ""
    """sha256 of curriculum.jsonl, which says in which stage every row is; empty without train.curriculum."""
    rewards: dict[str, Any] = field(default_factory=dict)
    """What decides rewards beside the configuration (`Judge.record`); of runs of older versions nothing is known."""
    format_version: int = FORMAT_VERSION

    def text(self) -> str:
        """As JSON."""
        return json_text(sealed(asdict(self)), indent=2, ensure_ascii=False) + "\n"

    def settled(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The adapter section that this run trains with, where it was asked for in these words; else None."""
        return dict(self.config["adapter"]) if self.asked and self.asked == asked else None

    def check_config(self, now: dict[str, Any]) -> None:
        """Raises ConfigError, with the difference, where `now` is the configuration of another run."""
        asks = bool(self.asked) and now["adapter"].get("budget") is not None
        before = {**self.config, "adapter": self.asked} if asks else self.config
        of_loss = now["evaluation"]["metric_for_best_model"] in HELD_OUT
        free = _FREE | (_SCORING if of_loss else set())
        changed = _changed(before, now, free)
        if changed and all(is_key(key) and _lacks(before, key) for key in changed):
            raise ConfigError(
                f"output_dir holds a run of another version of dude-peft, which did not know {', '.join(changed)}; "
                "finish it with that version, choose another output_dir, or add --overwrite to start over"
            )
        if changed:
            raise ConfigError(
                f"output_dir holds a run with another configuration ({changes(before, now, free)}); restore it to "
                "resume, choose another output_dir, or add --overwrite to start over"
            )

    def check_data(self, now: dict[str, str]) -> None:
        """Raises DataError where the rows are others than those of the run."""
        for name in {**self.data, **now}:
            if self.data.get(name) != now.get(name):
                raise DataError(
                    f"data.{name}: the rows differ from those that this run started with (sha256 "
                    f"{_cut(self.data.get(name))} then, {_cut(now.get(name))} now); restore them, choose another "
                    "output_dir, or add --overwrite"
                )

    def check_tokens(self, now: dict[str, str]) -> None:
        """Raises DataError where the same rows have become other tokens than those of the run."""
        for name in self.tokens:
            if self.tokens[name] != now.get(name):
                raise DataError(
                    f"data.{name}: the rows are the same, but their tokens differ: the model's tokenizer or chat "
                    "template has changed; restore it, choose another output_dir, or add --overwrite"
                )

    def check_tokenizer(self, now: dict[str, str]) -> None:
        """Raises DataError where the tokenizer is another one, though it makes the same tokens of the rows."""
        changed = changed_parts(self.tokenizer, now)
        if self.tokenizer and changed:
            raise DataError(
                f"the model's tokenizer is not the one that this run started with ({', '.join(changed)}); restore it, "
                "choose another output_dir, or add --overwrite"
            )

    def check_start(self, sha256: str | None) -> None:
        """Raises ConfigError where the run began with another start than the one of this print."""
        if self.start.get("sha256") != sha256:
            raise ConfigError(
                f"adapter.start: not the one that this run began with (sha256 {_cut(self.start.get('sha256'))} then, "
                f"{_cut(sha256)} now); restore it, choose another output_dir, or add --overwrite"
            )

    def check_stages(self, sha256: str) -> None:
        """Raises DataError where a curriculum has put the rows into other stages than when the run began."""
        if self.stages != sha256:
            raise DataError(
                "train.curriculum: the rows are in other stages than when this run started (sha256 "
                f"{_cut(self.stages)} then, {_cut(sha256)} now): the base model or this machine gives other pass "
                "rates; restore them, choose another output_dir, or add --overwrite"
            )

    def check_rewards(self, now: dict[str, Any]) -> None:
        """Raises ConfigError where a file that rewards import, or a reward model, is another one than at the start."""
        if not self.rewards:
            return
        todo = "restore it, choose another output_dir, or add --overwrite"
        then, here = self.rewards["beside"], now["beside"]
        for name in sorted({*then, *here}):
            if then.get(name) != here.get(name):
                raise ConfigError(
                    f"train.grpo.rewards: {shown(name, 300)}, which a file of rewards imports, is not as it was when "
                    f"this run started (sha256 {_cut(then.get(name))} then, {_cut(here.get(name))} now); {todo}"
                )
        for name, model in self.rewards["models"].items():
            if fault := _other_model(model, now["models"][name]):
                raise ConfigError(
                    f"train.grpo.rewards: {name} is not the reward model that this run started with ({fault}); {todo}"
                )

    def differences(self, now: dict[str, Any]) -> list[str]:
        """What of the environment is not as it was."""
        before, after = _flat(self.environment), _flat(now)
        return [
            f"{key} {_value(before.get(key))} -> {_value(after.get(key))}"
            for key in {**before, **after}
            if before.get(key) != after.get(key)
        ]


def read_identity(folder: Path) -> Identity | None:
    """What run.json of a folder says; None where there is none.

    Raises:
        ArtifactError: it is damaged, or of another version.
    """
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        return None
    remedy = "add --overwrite to start over"
    content = read_object(path, remedy)
    try:
        if content["format_version"] == FORMAT_VERSION:
            found = Identity(**unsealed(content))
            if all(
                isinstance(part, dict)
                for part in (
                    *(found.config, found.data, found.environment, found.tokens, found.tokenizer),
                    *(found.asked, found.start, found.rewards),
                )
            ) and isinstance(found.stages, str):
                _ = datetime.fromisoformat(found.moment) if found.moment else None
                return found
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{shown(path, 300)} is damaged; {remedy}") from error
    raise ArtifactError(
        f"{shown(path, 300)} belongs to a run that this version cannot resume; finish it with the version that "
        "started it, or add --overwrite to start over"
    )


def recorded_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder; None where there is no run.json that is as it was written."""
    try:
        return dict(read_sealed(folder / NAME)["config"])
    except (ValueError, TypeError, KeyError):
        return None


def changes(before: dict[str, Any], after: dict[str, Any], free: Set[str] = frozenset()) -> str:
    """What differs between two configurations, `key: old -> new; ...`, but for keys in `free`; empty for nothing."""
    old, new, changed = _flat(before), _flat(after), _changed(before, after, free)
    told = [f"{key}: {_change(old.get(key), new.get(key))}" for key in changed[:_MOST_SHOWN]]
    return "; ".join(told) + (f" and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else "")


def _other_model(then: dict[str, Any], now: dict[str, Any]) -> str:
    """In what a reward model is another one; empty for nothing. Its configuration may come from another version."""
    if then["weights"] != now["weights"]:
        return f"weights {_cut(then['weights'])} then, {_cut(now['weights'])} now"
    if then["reads"] != now["reads"]:
        return f"it reads {_value(now['reads'])} instead of {_value(then['reads'])}"
    settings = other_settings(then["settings"], now["settings"])
    return ", ".join([*settings, *changed_parts(then["tokenizer"], now["tokenizer"])])


def _changed(before: dict[str, Any], after: dict[str, Any], free: Set[str]) -> list[str]:
    """The keys that differ, but for those in `free`."""
    old, new = _flat(before), _flat(after)
    within = tuple(f"{key}." for key in free)
    kept = (key for key in {**old, **new} if key not in free and not key.startswith(within))
    return [key for key in kept if old.get(key) != new.get(key)]


def _lacks(tree: Any, key: str) -> bool:
    """Whether a section that is there has no place for the key."""
    for name in key.split("."):
        if not isinstance(tree, dict):
            return False  # the section was off
        if name not in tree:
            return True
        tree = tree[name]
    return False


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _change(old: Any, new: Any) -> str:
    """Long texts that begin alike, as chat templates do, are told apart by their hashes."""
    before, after = _value(old), _value(new)
    if before != after:
        return f"{before} -> {after}"
    return f"another text (sha256 {_cut(content_sha256(old))} -> {_cut(content_sha256(new))})"


def _value(value: Any) -> str:
    return shown(json.dumps(value, ensure_ascii=False), 60)


def _cut(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
