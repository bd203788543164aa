"""A PEFT configuration in a file of its own, `adapter.method: peft:FILE.json`: what can be told of it without PEFT.

The run keeps the content, not the file: two runs are the same where it is the same. What would run code, read other
files or need more than a plain training step is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dude_peft.doors import parse_json, read_file, without_duplicates
from dude_peft.errors import ConfigError
from dude_peft.show import quoted, shown

PREFIX = "peft:"
"""Begins `adapter.method`: of a run as it is written before FILE.json, of a resolved one before PEFT's type."""
_LARGEST_BYTES = 1 << 20
_LARGEST_NUMBER = 1 << 24  # seeds are larger
_SEED = re.compile(r".*(seed|key|prime).*")
# PEFT's own, of no concern here.
_BASE = "base_model_name_or_path"
_IGNORED = {_BASE, "peft_version", "inference_mode", "task_type", "revision", "megatron_core"}
_NEEDS_MORE = {
    "ADALORA": "calls PEFT in every step to move its ranks",
    "OSF": "changes the base weights themselves",
    "POLY": "needs a task number with every row",
    "XLORA": "needs other adapters",
    "DUDE": "is a method of DuDe: write adapter.method: NAME",
}
_CODE = ("auto_mapping", "runtime_config", "megatron_config", "arrow_config", "layer_replication", "custom_modules")
_STARTS = (True, "gaussian", "orthogonal")


def is_foreign(method: object) -> bool:
    """Whether a method is a PEFT configuration of its own, and no row of our table."""
    return isinstance(method, str) and method.startswith(PREFIX)


def read_peft_file(method: str) -> dict[str, Any]:
    """The content of FILE.json of `peft:FILE.json`.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    name = method.removeprefix(PREFIX)
    where = f"key 'adapter.method': {shown(name or method, 300)}"
    try:
        content = parse_json(read_file(name, _LARGEST_BYTES), object_pairs_hook=without_duplicates)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{where} cannot be read ({shown(reason, 200)}); write peft:FILE.json") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds no JSON object; write what PEFT's adapter_config.json holds")
    return content


def checked_settings(content: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The settings in it that count, without those that PEFT only notes.

    Args:
        content: of the file, or of a resolved configuration.
        model: name of the run's base model.

    Raises:
        ConfigError: it names no type, another base model, or what a run does not do.
    """
    kind = content.get("peft_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Z0-9_]{1,40}", kind):
        raise _refused("peft_type", f"is {shown(repr(kind), 60)}; write one of PEFT's types, such as OFT or IA3")
    if kind in _NEEDS_MORE:
        raise _refused("peft_type", f"{kind} {_NEEDS_MORE[kind]}, which dude train does not do; choose another type")
    base = content.get(_BASE)
    if base not in (None, "", model):
        raise _refused(_BASE, f"is {shown(repr(base))}, but the run's model is {shown(model)}; leave it out")
    for key, value in content.items():
        _check(key, value)
    return {key: value for key, value in content.items() if key not in _IGNORED}


def _check(key: str, value: Any) -> None:
    if value in (None, "", False) or (isinstance(value, (dict, list)) and not value):
        return
    if key in _CODE:
        raise _refused(key, "would run other code or change the model's layers; leave it out")
    if key == "init_lora_weights" and value not in _STARTS:
        raise _refused(
            key,
            f"{shown(repr(value), 60)} needs data or changes the base weights; use true, or a method of DuDe (pissa, "
            "olora, ...)",
        )
    if key.endswith(("_path", "_config")) and key != _BASE:
        raise _refused(key, "reads another file or needs data; leave it out")
    most = 2**63 if _SEED.fullmatch(key) else _LARGEST_NUMBER
    for number in _numbers(value):
        if not abs(number) <= most:  # nor NaN
            raise _refused(key, f"is {shown(repr(number), 30)}; no adapter has such a size")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, (int, float)):
        yield value


def _refused(key: str, why: str) -> ConfigError:
    return ConfigError(f"adapter.peft: key {quoted(key)} {why}")
