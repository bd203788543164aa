"""Collects the bad rows of one source, so that one run reports them all and not only the first."""

from collections.abc import Callable, Iterable, Iterator

from dude_peft.data.formats import Row
from dude_peft.errors import DataError

MAX_REPORTED = 20


class BadRows:
    """Counts faults: the first is kept in full, of the others only their places (line numbers or indices)."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._first: DataError | None = None
        self._places: list[int] = []
        self._count = 0

    def add(self, place: int, error: DataError) -> None:
        """Notes one bad row at `place`."""
        if self._first is None:
            self._first = error
        if len(self._places) < MAX_REPORTED:
            self._places.append(place)
        self._count += 1

    def raise_if_any(self) -> None:
        """Raises one DataError for all rows noted; returns where there are none."""
        if self._first is None:
            return
        if self._count == 1:
            raise self._first
        places = ", ".join(map(str, self._places)) + (", ..." if self._count > MAX_REPORTED else "")
        raise DataError(f"{self._first} ({self._count} bad {self._unit}: {places})") from self._first


def good_rows(
    attempts: Iterable[tuple[int, Callable[[], Row]]], *, unit: str, limit: int | None, empty: str
) -> Iterator[Row]:
    """The first `limit` rows that can be made, one at a time; at the end one DataError for all that could not.

    Args:
        attempts: (place, what makes the row there or raises DataError) of each.
        unit: what a place is called.
        limit: number of rows; nothing behind the last of them is read. None takes all.
        empty: the error's text where there are no attempts at all.
    """
    bad = BadRows(unit)
    made, tried = 0, False
    for place, attempt in attempts:
        tried = True
        try:
            row = attempt()
        except DataError as error:
            bad.add(place, error)
            continue
        yield row
        made += 1
        if made == limit:
            break
    bad.raise_if_any()
    if not tried:
        raise DataError(empty)
