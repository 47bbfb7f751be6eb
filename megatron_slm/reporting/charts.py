"""Line charts that are readable in print and without colour."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS: tuple[tuple[str, Any, str], ...] = (
    ("0.25", "-", "o"),
    ("#0060a0", "--", "^"),
    ("#b05000", ":", "s"),
    ("#307030", "-.", "D"),
    ("#803080", (0, (7, 2)), "v"),
    ("#806000", (0, (4, 1, 1, 1, 1, 1)), "x"),
)
"""The colour, line and marker of each curve."""


class Curve(NamedTuple):
    """A labelled curve; if `y` is a mean of several values, `lowest` and `highest` are their range."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    lowest: Sequence[float] = ()
    highest: Sequence[float] = ()


def draw_curves(panels: Mapping[str, Sequence[Curve]], xlabel: str, ylabel: str, path: Path) -> None:
    """Draw panels side by side, and write the last value of each curve beside its end.

    `panels` holds curves by title. Curves at the same position in their lists look the same in all panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, curves)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(handles), 3 * len(panels)),
        frameon=False,
        handlelength=3.5,
    )
    figure.savefig(path, dpi=150)


def _draw_panel(axis: "Axes", curves: Sequence[Curve]) -> None:
    from matplotlib.patheffects import withStroke

    for (label, x, y, lowest, highest), (colour, line, marker) in zip(curves, _LOOKS, strict=False):
        axis.plot(x, y, linestyle=line, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
        if lowest:
            axis.fill_between(x, lowest, highest, color=colour, alpha=0.15, linewidth=0)
    width, height = _span([x for curve in curves for x in curve.x]), _span([y for curve in curves for y in curve.y])
    placed: list[tuple[float, float]] = []
    for index in sorted(range(len(curves)), key=lambda i: (round(curves[i].y[-1], 2), -curves[i].x[-1])):
        end, last = curves[index].x[-1], curves[index].y[-1]
        # Labels of curves that end close together would overlap.
        near = [below for other, below in placed if abs(other - end) < 0.1 * width]
        place = max([last, *(below + 0.06 * height for below in near)])
        placed.append((end, place))
        axis.annotate(
            f"{last:.2f}",
            (end, last),
            xytext=(end + 0.015 * width, place),
            fontsize=9,
            color=_LOOKS[index][0],
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": _LOOKS[index][0], "linewidth": 0.7} if place > last else None,
        )
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)


def _span(values: Sequence[float]) -> float:
    return (max(values) - min(values)) or 1.0
