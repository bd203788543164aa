"""`dude upload`: an adapter to the hub, verified, with a card that fills itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dude_peft.errors import ArtifactError, ConfigError, ResourceError
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.quiet import quiet_imports

if TYPE_CHECKING:
    from dude_peft.exporting.adapter import SavedAdapter

_LONGEST_NAME = 96  # the hub's
_MOST_NAMES = 8


def upload(
    adapter: str | Path, repository: str, *, private: bool = False, folder: Path | None = None, quiet: bool = False
) -> str:
    """Check an adapter, write its card, and send both to the hub.

    Args:
        adapter: its folder; report.json and loss.png of the run are looked for beside it.
        repository: OWNER/NAME.
        private: of a repository that is made.
        folder: write what would be sent into this new folder, and send nothing.
        quiet: print nothing.

    Returns:
        The address, or the folder.

    Raises:
        ConfigError: no such name for a repository, or the folder is there.
        ArtifactError: the adapter is damaged.
        ResourceError: the hub refuses, or cannot be reached.
    """
    _check_name(repository)
    display = Display(quiet=quiet)
    with display.waiting("checking the adapter"), quiet_imports():
        from dude_peft.artifact.durable import disk_errors, whole_folder
        from dude_peft.exporting.adapter import open_adapter

        opened = open_adapter(adapter)
    base = opened.config.base_model_name_or_path
    if base and Path(base).is_dir():
        display.warn(f"the base model is a folder on this machine ({shown(base, 200)}): other users need a hub id")
    if folder is not None:
        with disk_errors(folder), whole_folder(folder) as target:
            left = _gather(opened, target, repository, display.warn)
        _say_what_stays(display, left)
        display.say(f"written: {shown(folder, None)}")
        return str(folder)
    with tempfile.TemporaryDirectory() as temporary:
        with disk_errors(Path(temporary)):
            left = _gather(opened, Path(temporary), repository, display.warn)
        _say_what_stays(display, left)
        address = _send(Path(temporary), repository, private)
    display.say(f"uploaded: {shown(address, None)}")
    return address


def _check_name(repository: str) -> None:
    """Refuse what the hub would, before anything is made."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        if repository.count("/") != 1 or not repository.isascii() or len(repository) > _LONGEST_NAME:
            raise HFValidationError
        for name in (repository, *repository.split("/")):
            validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"repository {shown(repository)!r}: write OWNER/NAME, in at most {_LONGEST_NAME} characters; each is "
            "letters, digits, '-', '_' and '.', does not begin or end with '-' or '.', and has no '--' or '..' in it; "
            "NAME does not end in .git"
        ) from error


def _gather(opened: SavedAdapter, target: Path, repository: str, tell: Callable[[str], None]) -> list[str]:
    """Copies the adapter's two files, its tokenizer if it has one, the loss curve, the card; names what it leaves."""
    from dude_peft.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE
    from dude_peft.artifact.sealed import file_sha256
    from dude_peft.exporting.adapter import open_adapter
    from dude_peft.exporting.card import CARD, model_card, report_of

    adapter = opened.folder
    # A link that nobody vouches for may lead anywhere.
    own = [name for name in opened.tokenizer() if opened.vouched is not None or not (adapter / name).is_symlink()]
    sent = [CONFIG_FILE, WEIGHTS_FILE, *own]
    for name in sent:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(adapter / name, target / name)
    picture = adapter.parent / "loss.png"
    report = report_of(adapter.absolute(), tell)
    if report is not None and picture.is_file():
        files = report.get("files")
        wanted = files.get(picture.name) if isinstance(files, dict) else None
        if wanted is not None and file_sha256(picture) != wanted:
            raise ArtifactError(f"{shown(picture, 300)} is damaged; restore it, or move it away")
        if wanted is not None or not picture.is_symlink():
            shutil.copyfile(picture, target / picture.name)
    has_picture = (target / picture.name).is_file()
    card = model_card(open_adapter(target), report, picture=has_picture, place=repository)
    (target / CARD).write_text(card, encoding="utf-8")
    known = {CARD, *(Path(name).parts[0] for name in sent)}
    return sorted(path.name for path in adapter.iterdir() if path.name not in known)


def _say_what_stays(display: Display, left: list[str]) -> None:
    if left:
        more = f" and {len(left) - _MOST_NAMES} more" if len(left) > _MOST_NAMES else ""
        display.say(
            f"not uploaded, because they are not part of an adapter: {', '.join(map(shown, left[:_MOST_NAMES]))}{more}"
        )


def _send(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="DuDe adapter"))
    except Exception as error:  # the hub client's errors have no common base
        reason = shown(next(iter(str(error).strip().splitlines()), type(error).__name__), 200)
        raise ResourceError(
            f"{shown(repository)} cannot be uploaded ({reason}); check access with: hf auth whoami"
        ) from error
