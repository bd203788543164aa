"""Training examples on disk as a sequence, of one source or a mixture."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dude_peft.data.columns import STANDARD, Columns
from dude_peft.data.encode import Counts
from dude_peft.data.formats import Row
from dude_peft.data.sight import Shown, Sight
from dude_peft.data.stamp import Stamp
from dude_peft.data.token_store import TokenStore


@dataclass(frozen=True)
class Stored:
    """One source of a TokenSet."""

    name: str
    """What its rows' places follow: `file.jsonl`, `builtin:word-problems[train]`."""
    store: TokenStore
    stamp: Stamp | None
    """Of a local file."""
    columns: Columns = STANDARD
    """What it calls its columns."""
    folder: Path = Path()
    """Of the local file, in which its images are."""
    sight: Sight | None = None
    """Who sees these."""


class TokenSet(Sequence[dict[str, Any]]):
    """Examples as Trainer takes them, read from disk when asked for: {"input_ids", "labels"} of each.

    An example with images has these as "shown", of which `batches.pad_right` makes tensors. Of a pair these are of the
    better conversation, "rejected_input_ids" and "rejected_labels" of the worse one.
    """

    lengths: NDArray[np.int64]
    """Tokens of each example; of a pair, of both conversations."""
    counts: Counts
    """What became of the rows of all sources; tokens, trained_tokens and ended of the examples of this set."""
    sha256: str
    """What it was made of, in order: of one source `rows.data_sha256`, of a mixture its sources' and the choice."""
    tokens_sha256: str
    """What became of it: the token ids and masks of its sources, and the choice."""

    def __init__(self, sources: Sequence[Stored], chosen: Sequence[NDArray[np.int64]]) -> None:
        """`chosen`: of each source the examples taken, in order, repeats allowed."""
        self._sources = list(sources)
        sizes = [len(source.store) for source in sources]
        self._bounds = np.cumsum([0, *sizes])
        self._index = np.concatenate([picked + first for picked, first in zip(chosen, self._bounds, strict=False)])
        self.lengths = self._gathered("lengths")
        self.counts = self._counted()
        whole = len(sources) == 1 and np.array_equal(self._index, np.arange(sizes[0]))
        self.sha256 = sources[0].store.sha256 if whole else self._mixed_sha256("sha256")
        self.tokens_sha256 = self._mixed_sha256("tokens_sha256")

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """One example as lists; labels are IGNORE where a token is not trained."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        source, place = self._place(index)
        example = source.store.example(place)
        found: dict[str, Any] = {"input_ids": example.ids, "labels": example.labels}
        pictures = source.store.pictures(place, source.folder)
        if pictures and source.sight is not None:
            found["shown"] = Shown(pictures, source.sight, self.source(index))
        if source.store.sides == 2:
            worse = source.store.example(place, 1)
            found |= {"rejected_input_ids": worse.ids, "rejected_labels": worse.labels}
        return found

    def parts(self, places: NDArray[np.int64] | None = None) -> list[tuple[Stored, NDArray[np.int64]]]:
        """Of each source the examples that stand at `places` of this set, or all of them: what makes a set again."""
        index = self._index if places is None else self._index[places]
        bounds = zip(self._sources, self._bounds[:-1], self._bounds[1:], strict=True)
        return [(source, index[(index >= low) & (index < high)] - low) for source, low, high in bounds]

    def source(self, index: int) -> str:
        """Where an example comes from: `file.jsonl:12`."""
        source, place = self._place(index)
        return f"{source.name}:{source.store.columns['places'][place]}"

    def conversation(self, index: int) -> Row:
        """What an example asks, as its row has it, with an empty answer; of a set that keeps it (`prepare`)."""
        source, place = self._place(index)
        return source.store.conversation(place, self.source(index))

    @property
    def images(self) -> NDArray[np.int64]:
        """Images of each example."""
        return self._gathered("shown")

    def image_hashes(self) -> list[tuple[str, ...]]:
        """sha256 of the images of each example that has some."""
        places = np.flatnonzero(self.images)
        each = (self._place(int(place)) for place in places)
        return [tuple(one.sha256 for one in source.store.pictures(place, source.folder)) for source, place in each]

    @property
    def longest(self) -> int:
        """Tokens of the longest row that a model reads of them: of a pair, one conversation."""
        return int(self._gathered("longest").max())

    @property
    def asked(self) -> NDArray[np.int64]:
        """The tokens of each example that are not learned; of plain text 1."""
        return np.asarray(self.lengths - self._gathered("learned"))

    @property
    def margins(self) -> NDArray[np.int64]:
        """Of each pair, by how many judged tokens the better answer is longer than the worse one."""
        return self._gathered("margins")

    @property
    def wanted_margins(self) -> NDArray[np.float32]:
        """Of each pair to be scored, its row's margin; 0 where it has none."""
        return self._gathered("margin")

    @property
    def labels(self) -> NDArray[np.bool_]:
        """Of each labelled answer, whether it is wanted."""
        return self._gathered("label")

    @property
    def contradictions(self) -> int:
        """The number of different labelled answers that are called wanted as well as unwanted."""
        contents, labels = self._gathered("contents"), self.labels
        return len(np.intersect1d(contents[labels], contents[~labels]))

    @property
    def duplicates(self) -> int:
        """The number of examples whose tokens are all those of another; a row that a mixture repeats counts once."""
        used = np.unique(self._index)
        return len(used) - len(np.unique(self._gathered("contents", used)))

    def prompts(self) -> NDArray[np.uint64]:
        """64-bit hashes of what each example asks (of plain text: of the block)."""
        return self._gathered("prompts")

    def losses(self, max_length: int) -> list[str]:
        """`Counts.losses`, and the names of `data.columns` that no row has."""
        lines = self.counts.losses(max_length)
        for source in self._sources:
            if unread := source.columns.unread(source.store.counts.used):
                lines.append(f"{source.name}: no row has {', '.join(unread)}, but data.columns names them")
        return lines

    def verify_unchanged(self) -> None:
        """Raises DataError where a file was changed since it was read."""
        for source in self._sources:
            if source.stamp is not None:
                source.stamp.verify(source.name)

    def _place(self, index: int) -> tuple[Stored, int]:
        number = int(self._index[index])
        source = int(np.searchsorted(self._bounds, number, side="right")) - 1
        return self._sources[source], number - int(self._bounds[source])

    def _gathered(self, name: str, index: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """A column of all sources, in the order of the set."""
        parts = [_column(source.store, name) for source in self._sources]
        return np.concatenate(parts)[self._index if index is None else index]

    def _counted(self) -> Counts:
        each = [source.store.counts for source in self._sources]
        numbers = [name for name, value in vars(each[0]).items() if isinstance(value, int)]
        summed = {name: sum(getattr(counts, name) for counts in each) for name in numbers}
        return replace(
            Counts(**summed),
            used=dict(sum((Counter(counts.used) for counts in each), Counter())),
            left_out=dict(sum((Counter(counts.left_out) for counts in each), Counter())),
            longest=max(counts.longest for counts in each),
            largest_id=max(counts.largest_id for counts in each),
            tokens=int(self.lengths.sum()),
            trained_tokens=int(self._gathered("learned").sum()),
            ended=int(self._gathered("ended").sum()),
            images=int(self.images.sum()),
            image_tokens=int(self._gathered("image_tokens").sum()),
        )

    def _mixed_sha256(self, of: str) -> str:
        hashes = [getattr(source.store, of) for source in self._sources]
        digest = hashlib.sha256(json.dumps(hashes).encode("ascii"))
        digest.update(self._index.astype("<i8").tobytes())
        return digest.hexdigest()


def _column(store: TokenStore, name: str) -> NDArray[Any]:
    """One of the store's own, or what follows from them."""
    starts = store.columns["starts"]
    if name == "lengths":
        return np.diff(starts[:: store.sides])
    if name == "longest":
        return np.asarray(np.diff(starts).reshape(-1, store.sides).max(1))
    if name == "margins":
        judged = np.add.reduceat(np.append(store.columns["trained"], False), starts[:-1], dtype=np.int64)
        return np.asarray(judged[::2] - judged[1::2])
    if name in ("shown", "image_tokens") and name not in store.columns:
        return np.zeros(len(store), np.int64)
    return store.columns[name]


def overlap(train: TokenSet, test: TokenSet) -> int:
    """The number of test examples that ask what a training example asks: leaked questions."""
    return int(np.isin(test.prompts(), train.prompts()).sum())


def shared_images(train: TokenSet, test: TokenSet) -> int:
    """The number of test examples that show an image that a training example shows, whatever they ask of it."""
    seen = {digest for hashes in train.image_hashes() for digest in hashes}
    return sum(not seen.isdisjoint(hashes) for hashes in test.image_hashes())


def told_of_leaks(train: TokenSet, test: TokenSet) -> list[str]:
    """A line for each way in which a held-out example is one of training."""
    lines = []
    if leaked := overlap(train, test):
        lines.append(
            f"{leaked} of {len(test)} held-out examples repeat the question of a training example, so the score "
            "measures memory"
        )
    if known := shared_images(train, test):
        lines.append(
            f"{known} of {len(test)} held-out examples show an image of a training example, so the score is not that "
            "of new images"
        )
    return lines
