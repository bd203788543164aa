"""Lines over steps or rates, and maps of layers: the figures that several pages have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dude_peft.reporting.document import Cell, Figure, Number, number, table
from dude_peft.reporting.drawing import COLOURS, MARKERS, legend, name_ticks

Points = Sequence[tuple[float, float]]


def lines_figure(
    title: str, alt: str, lines: Mapping[str, Points], *, x: str, y: str, log_x: bool = False, log_y: bool = False
) -> Figure:
    """Named lines through points."""
    drawn = {name: points for name, points in lines.items() if points}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        handles = []
        for place, points in enumerate(drawn.values()):
            marker = MARKERS[place % len(MARKERS)] if len(points) < 40 else ""
            colour = COLOURS[place % len(COLOURS)]
            handles += axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.5)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log_x:
            axes.set_xscale("log")
        else:
            _whole_ticks(axes, drawn)
        if log_y and all(value > 0 for points in drawn.values() for _, value in points):
            axes.set_yscale("log")
        axes.grid(alpha=0.2)
        if len(drawn) > 1:
            legend(axes, list(drawn), handles)

    rows = [(name, number(at), number(value, ".6g")) for name, points in drawn.items() for at, value in points]
    return Figure(title, alt, draw, table(title, ("line", x, y), rows))


def scatter_figure(
    title: str, alt: str, groups: Mapping[str, Points], *, x: str, y: str, trend: tuple[float, float] | None = None
) -> Figure:
    """Named clouds of points; `trend` is a straight line's slope and height."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        handles = []
        for place, points in enumerate(groups.values()):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            handles.append(axes.scatter(*zip(*points, strict=True), s=22, color=colour, marker=marker, alpha=0.8))
        if trend is not None:
            ends = [min(at for points in groups.values() for at, _ in points)]
            ends.append(max(at for points in groups.values() for at, _ in points))
            axes.plot(ends, [trend[0] * at + trend[1] for at in ends], color="#777777", linestyle="--", linewidth=1)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _whole_ticks(axes, groups)
        axes.grid(alpha=0.2)
        legend(axes, list(groups), handles)

    rows = [(name, number(at), number(value)) for name, points in groups.items() for at, value in points]
    return Figure(title, alt, draw, table(title, ("point", x, y), rows))


def map_figure(
    title: str, alt: str, rows: Sequence[str], columns: Sequence[str], values: Mapping[Any, float]
) -> Figure:
    """A number for each (row, column), as a heat map; what is missing is left out."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        grid = [[values.get((row, column), float("nan")) for column in columns] for row in rows]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
        name_ticks(axes.xaxis, columns)
        axes.tick_params(axis="x", rotation=45)
        step = max(1, len(rows) // 12)
        axes.set_yticks(range(0, len(rows), step), [rows[place] for place in range(0, len(rows), step)])
        axes.set_ylabel("block")
        figure.colorbar(image, ax=axes)

    cells: list[tuple[Cell, ...]] = [(row, *(number(values.get((row, column))) for column in columns)) for row in rows]
    height = min(8.0, 2.4 + 0.13 * len(rows))
    return Figure(title, alt, draw, table(title, ("block", *columns), cells), height=height)


def bars_figure(
    title: str, alt: str, bars: Sequence[tuple[str, float, tuple[float, float] | None]], *, x: str
) -> Figure:
    """A named value with its interval in each line, the first at the top."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, (_, value, ends) in enumerate(bars):
            colour = COLOURS[place % len(COLOURS)]
            if ends is not None:
                axes.plot(ends, (place, place), color=colour, linewidth=2)
            axes.plot([value], [place], marker="o", color=colour)
        name_ticks(axes.yaxis, [name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.margins(y=0.2)
        axes.set_xlabel(x)
        axes.grid(axis="x", alpha=0.2)

    none = Number(None, "-")
    rows = [
        (name, number(value), *((number(ends[0]), number(ends[1])) if ends is not None else (none, none)))
        for name, value, ends in bars
    ]
    header = ("name", x, "interval from", "interval to")
    return Figure(title, alt, draw, table(title, header, rows), height=min(7.0, 1.3 + 0.3 * len(bars)))


def _whole_ticks(axes: Any, lines: Mapping[str, Points]) -> None:
    """No half steps or seeds along the axis."""
    if all(float(at).is_integer() for points in lines.values() for at, _ in points):
        axes.xaxis.get_major_locator().set_params(integer=True)
