"""Collects the bad rows of one source, so that one run reports them all and not only the first."""

from collections.abc import Callable, Iterable, Iterator

from dude_peft.data.formats import Row
from dude_peft.errors import DataError

MAX_REPORTED = 20
_FEW = 3


class BadRows:
    """Counts faults: the first is kept in full, of the others only their places (line numbers or indices)."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._first: DataError | None = None
        self._places: list[int] = []
        self._count = 0
        self._alike = True

    def add(self, place: int, error: DataError) -> None:
        """Notes one bad row at `place`."""
        if self._first is None:
            self._first = error
        self._alike = self._alike and _fault(error) == _fault(self._first)
        if len(self._places) < MAX_REPORTED:
            self._places.append(place)
        self._count += 1

    def raise_if_any(self, tried: int) -> None:
        """Raises one DataError for all rows noted; returns where there are none.

        Args:
            tried: how many rows there were, good ones among them. Where all have one fault, no place says more.
        """
        if self._first is None:
            return
        if self._count == 1:
            raise self._first
        if self._alike and self._count == tried > _FEW:
            every = f"all {tried} {self._unit.split()[0]}"
            raise DataError(f"{self._first} ({every} have this fault)") from self._first
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
    made = tried = 0
    for place, attempt in attempts:
        tried += 1
        try:
            row = attempt()
        except DataError as error:
            bad.add(place, error)
            continue
        yield row
        made += 1
        if made == limit:
            break
    bad.raise_if_any(tried)
    if not tried:
        raise DataError(empty)


def _fault(error: DataError) -> str:
    """Without the place that it begins with."""
    return str(error).partition(": ")[2]
