"""Charts that are readable in print and without colour."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS: tuple[tuple[str, tuple[float, ...], str], ...] = (
    ("0.25", (), "o"),
    ("#0060a0", (3.7, 1.6), "^"),
    ("#b05000", (1, 1.65), "s"),
    ("#307030", (6.4, 1.6, 1, 1.6), "D"),
    ("#803080", (7, 2), "v"),
    ("#806000", (4, 1, 1, 1, 1, 1), "x"),
)
"""The colour, dashes and marker of each curve. `page.css` holds the same colours, and others for dark windows."""
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---")
"""The pattern of each series of bars."""
TITLE_WIDTH = 46
"""Characters of a title in a line."""
LABELLED = 6
"""Curves in a panel up to which each one carries its last value."""


class Look(NamedTuple):
    """The look of a curve: number of its colour, dashes in line widths (none if solid), marker of matplotlib."""

    colour: int
    dashes: tuple[float, ...]
    marker: str


def look(index: int) -> Look:
    """Return the look of a curve; the first 216 differ, and so do any six in a row without their colours."""
    count = len(_LOOKS)
    colour, turn = index % count, index // count
    line = (colour + turn) % count
    marker = (line + turn // count) % count
    return Look(colour, _LOOKS[line][1], _LOOKS[marker][2])


class Curve(NamedTuple):
    """A labelled curve.

    label            name in the legend
    x, y             points; NaN in `y` is a gap
    lowest, highest  range of each point, if `y` is a mean of several values
    run              number of the run that it belongs to; None for no run
    look             number for `look`; None for its place in the list
    style            line: a line with markers; plain: a line; points: markers
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    lowest: Sequence[float] = ()
    highest: Sequence[float] = ()
    run: int | None = None
    look: int | None = None
    style: str = "line"


@dataclass(frozen=True)
class Chart:
    """A chart, for the page and as files.

    name        name of its files, and its anchor in the page
    title       what it shows
    caption     where its numbers come from, and how to read them
    ylabel      title and unit of the vertical axis
    curves      curves; in a chart of bars, `y` holds one value per category
    xlabel      title of the horizontal axis; empty if `x` holds steps, which the page can show along several axes
    categories  names of the groups of bars; none for a chart of lines
    run         number of the run that it belongs to; None if its curves are of several runs
    """

    name: str
    title: str
    caption: str
    ylabel: str
    curves: Sequence[Curve]
    xlabel: str = ""
    categories: Sequence[str] = ()
    run: int | None = None


def draw_curves(panels: Mapping[str, Sequence[Curve]], xlabel: str, ylabel: str, *paths: Path) -> None:
    """Draw panels side by side, and write the last value of each curve beside its end.

    `panels` holds curves by title. Curves at the same position in their lists look the same in all panels. The suffix
    of each path is its format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(4.8 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, curves)
        axis.set(title=textwrap.fill(title, TITLE_WIDTH), xlabel=xlabel, ylabel=ylabel)
        if axis.get_xlim()[1] > 10_000:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    _save(figure, axes[0], 3 * len(panels), paths)


def draw_bars(chart: Chart, *paths: Path) -> None:
    """Draw a chart of bars, which differ by their hatches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.8, 0.5 * len(chart.categories)), 3.9), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(chart.curves)
    for index, curve in enumerate(chart.curves):
        places = [category + width * (index - (len(chart.curves) - 1) / 2) for category in range(len(chart.categories))]
        shown = index if curve.look is None else curve.look
        hatch, colour = HATCHES[shown % len(HATCHES)], _LOOKS[look(shown).colour][0]
        axis.bar(places, curve.y, width, label=curve.label, hatch=hatch, color="white", edgecolor=colour)
    axis.set_xticks(range(len(chart.categories)), chart.categories, rotation=30 if len(chart.categories) > 6 else 0)
    axis.set(title=textwrap.fill(chart.title, TITLE_WIDTH), xlabel=chart.xlabel, ylabel=chart.ylabel)
    _save(figure, axis, 3, paths)


def draw_chart(chart: Chart, xlabel: str, *paths: Path) -> None:
    """Draw a chart to files; `xlabel` names the axis of a chart whose `x` holds steps."""
    from matplotlib import rc_context

    # Names of runs and sources may hold dollar signs, which would begin a formula.
    with rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        if chart.categories:
            draw_bars(chart, *paths)
            return
        curves = [
            _without_gaps(curve)._replace(look=index if curve.look is None else curve.look)
            for index, curve in enumerate(chart.curves)
            if any(math.isfinite(value) for value in curve.y)
        ]
        draw_curves({chart.title: curves}, chart.xlabel or xlabel, chart.ylabel, *paths)


def _without_gaps(curve: Curve) -> Curve:
    """Return a curve without the points that are not finite, and without its range if such points had one."""
    kept = [index for index, value in enumerate(curve.y) if math.isfinite(value)]
    if len(kept) == len(curve.y):
        return curve
    x, y = [curve.x[index] for index in kept], [curve.y[index] for index in kept]
    return curve._replace(x=x, y=y, lowest=(), highest=())


def _save(figure: Any, axis: "Axes", columns: int, paths: Sequence[Path]) -> None:
    handles, labels = axis.get_legend_handles_labels()
    # About 11 characters fit into an inch; the line beside a label takes the room of 8.
    fitting = int(11 * figure.get_figwidth() / (max(map(len, labels), default=0) + 8))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=max(1, min(len(handles), columns, fitting)),
        frameon=False,
        handlelength=3.5,
    )
    for path in paths:
        figure.savefig(path, dpi=150, format=path.suffix[1:])


def _draw_panel(axis: "Axes", curves: Sequence[Curve]) -> None:
    looks = [look(index if curve.look is None else curve.look) for index, curve in enumerate(curves)]
    for curve, (colour, dashes, marker) in zip(curves, looks, strict=True):
        axis.plot(
            curve.x,
            curve.y,
            linestyle="" if curve.style == "points" else (0, dashes) if dashes else "-",
            color=_LOOKS[colour][0],
            marker="" if curve.style == "plain" else marker,
            markersize=4,
            markevery=1 if curve.style == "points" else max(1, len(curve.x) // 12),
            linewidth=1.6,
            label=curve.label,
        )
        if len(curve.lowest):
            axis.fill_between(curve.x, curve.lowest, curve.highest, color=_LOOKS[colour][0], alpha=0.15, linewidth=0)
    if len(curves) <= LABELLED:
        pairs = zip(curves, looks, strict=True)
        _label_ends(axis, [(curve, _LOOKS[shown.colour][0]) for curve, shown in pairs if curve.style == "line"])
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)


def _label_ends(axis: "Axes", curves: Sequence[tuple[Curve, str]]) -> None:
    from matplotlib.patheffects import withStroke

    width = _span([x for curve, _ in curves for x in curve.x])
    height = _span([y for curve, _ in curves for y in curve.y])
    placed: list[tuple[float, float]] = []
    for curve, colour in sorted(curves, key=lambda pair: (round(pair[0].y[-1], 2), -pair[0].x[-1])):
        end, last = curve.x[-1], curve.y[-1]
        # Labels of curves that end close together would overlap.
        near = [below for other, below in placed if abs(other - end) < 0.1 * width]
        place = max([last, *(below + 0.06 * height for below in near)])
        placed.append((end, place))
        axis.annotate(
            f"{last:.2f}" if 0.1 <= abs(last) < 1000 or last == 0 else f"{last:.2g}",
            (end, last),
            xytext=(end + 0.015 * width, place),
            fontsize=9,
            color=colour,
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7} if place > last else None,
        )


def _span(values: Sequence[float]) -> float:
    return (max(values) - min(values)) or 1.0 if values else 1.0
