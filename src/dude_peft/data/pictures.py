"""Images that stand in messages: local files in the folder of the data, looked at before anything is trained on them.

A path never leads out of that folder, and nothing is fetched. What a file holds is found by its first bytes, never by
its name; Pillow reads only formats that are plain pixels. The hash of an image's bytes goes wherever its row goes, so
that another image is another row.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from hashlib import sha256
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dude_peft.doors import NoFileError, read_file
from dude_peft.errors import ConfigError, DataError, ResourceError
from dude_peft.installing import install
from dude_peft.show import quoted, shown

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may read a file as; others run programs, or are documents."""
LARGEST_BYTES = 64 * 2**20

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
INSTALL = f"images need Pillow, which is not installed: {install('pillow')}"
"""What is said where it is missing."""
_WIDE = ("I", "F")
"""Beginnings of Pillow's modes of 16 and 32 bits, whole numbers and fractions: as RGB they are cut, not scaled."""
_KNOWN = 2**16


@dataclass(frozen=True)
class Picture:
    """An image and its place in a message."""

    at: int
    """Characters of the message's text before it."""
    name: str
    """As the row gives it."""
    sha256: str = ""
    """Of the file's bytes."""
    file: str = field(default="", compare=False)
    """Where it is."""
    animated: bool = field(default=False, compare=False)
    """Whether there are more images in the file, of which only the first is used."""

    @property
    def is_found(self) -> bool:
        """False of a mere place for an image, which a row's `images` fill."""
        return bool(self.sha256)


def found(name: str, folder: Path | None, where: str) -> Picture:
    """The image that a path means, its header looked at; it stands at the beginning of a text.

    Args:
        name: path in the folder, as the row gives it.
        folder: of the data file; None for rows that come from no local file.
        where: begins every error: `file.jsonl:12: messages[0].content[1].image`.

    Raises:
        DataError: a URL, a path out of the folder, no file there, no image in it, or too large a one.
        ConfigError: Pillow is not installed.
        ResourceError: the file cannot be read.
    """
    if _URL.match(name):
        raise DataError(f"{where} is a URL, and nothing is fetched; save the image beside the data, and give its path")
    if folder is None:
        raise DataError(f"{where}: images are read beside a local data file; save the rows and their images as files")
    path = _inside(name, folder, where)
    try:
        state = os.stat(path)
        digest, animated = _looked_at(path, state.st_size, state.st_mtime_ns, state.st_ino)
    except DataError as error:
        raise DataError(f"{where}: {quoted(name, 200)} {error}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{where}: no such image {quoted(name, 200)} in {shown(folder, 200)}{_closest(path)}"
        ) from error
    except (NoFileError, IsADirectoryError) as error:
        raise DataError(f"{where}: {quoted(name, 200)} is no regular file; give the path of an image") from error
    except OSError as error:
        raise ResourceError(
            f"{where}: {quoted(name, 200)} cannot be read ({shown(error.strerror or error)})"
        ) from error
    return Picture(0, name, digest, str(path), animated)


def opened(picture: Picture, where: str) -> Image:
    """The pixels of an image: upright, RGB, as transformers loads images.

    Args:
        picture: from `found`.
        where: begins every error.

    Raises:
        DataError: the file is damaged, or is another one than when the rows were read.
        ConfigError: Pillow is not installed.
    """
    from transformers.image_utils import load_image

    name = quoted(picture.name, 200)
    try:
        data = read_file(picture.file, LARGEST_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: image {name} cannot be read any more ({shown(error)}); restore it") from error
    if sha256(data).hexdigest() != picture.sha256:
        raise DataError(
            f"{where}: image {name} was changed while it was in use; start again, and do not change it during the run"
        )
    try:
        with _header(data) as image:
            image.load()
            return load_image(image)
    except DataError as error:
        raise DataError(f"{where}: {name} {error}") from error
    except Exception as error:  # each format's decoder raises its own
        reason = shown(" ".join(str(error).split()) or type(error).__name__, 120)
        raise DataError(f"{where}: image {name} is damaged ({reason}); save it again") from error


def placed(texts: Sequence[str | Picture]) -> tuple[str, tuple[Picture, ...]]:
    """The text of a message's parts in a row, and the images with their places in it."""
    from dataclasses import replace

    text, pictures = "", []
    for part in texts:
        if isinstance(part, Picture):
            pictures.append(replace(part, at=len(text)))
        else:
            text += part
    return text, tuple(pictures)


def _inside(name: str, folder: Path, where: str) -> Path:
    """The path, which lies in the folder, links followed."""
    if ".." in PurePath(name).parts:
        raise DataError(f"{where}: {quoted(name, 200)} has '..'; give a path in the folder of the data file")
    try:
        root = Path(os.path.realpath(folder))
        path = Path(os.path.realpath(folder / name))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {quoted(name, 200)} is no usable path ({shown(error)}); check it") from error
    if root != path and root not in path.parents:
        raise DataError(
            f"{where}: {quoted(name, 200)} lies outside of the folder of the data file, {shown(root, 200)}; copy the "
            "image into it"
        )
    return path


@lru_cache(_KNOWN)
def _looked_at(path: Path, size: int, changed_ns: int, inode: int) -> tuple[str, bool]:
    """sha256 of a file that did not change since, and whether it holds several images."""
    try:
        data = read_file(path, LARGEST_BYTES)
    except ValueError as error:
        raise DataError(f"is too large ({error}); save it smaller") from error
    with _header(data) as image:
        try:
            animated = bool(getattr(image, "is_animated", False))
        except Exception:  # what is behind the first image is not read; that itself is decoded later
            animated = True
    return sha256(data).hexdigest(), animated


def _header(data: bytes) -> Image:
    """The image, its pixels not decoded yet."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigError(INSTALL) from error
    if not data:
        raise DataError("is an empty file; save the image again")
    most = Image.MAX_IMAGE_PIXELS or 2**27
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is refused below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"has far more than {most:,} pixels; scale it down") from error
    except UnidentifiedImageError as error:
        raise DataError(f"is no image, or damaged; save it as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except Exception as error:  # each format's reader raises its own
        reason = shown(" ".join(str(error).split()) or type(error).__name__, 120)
        raise DataError(f"is a damaged image ({reason}); save it again") from error
    width, height = image.size
    if width * height > most:
        raise DataError(f"has {width} x {height} pixels, more than {most:,}; scale it down")
    if image.mode.startswith(_WIDE):
        raise DataError(
            f"has more than 8 bits a pixel (Pillow's mode {image.mode}), of which readers of images for models keep "
            "only the darkest 256 levels; save it with 8 bits"
        )
    return image


def _closest(path: Path) -> str:
    try:
        names = os.listdir(path.parent)
    except OSError:
        return "; check the path"
    near = get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {quoted(near[0])}?" if near else "; check the path"


def name_of(value: Any) -> str | None:
    """The path in what a row has for an image: text, or the object that `datasets` makes of a file; else None."""
    if isinstance(value, dict) and value.get("bytes") is None:
        value = value.get("path")
    return value if isinstance(value, str) and value.strip() else None
