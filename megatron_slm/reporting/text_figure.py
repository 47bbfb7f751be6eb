"""Text shaded by excess loss with its selected tokens marked, as a picture (Rho-1, Figures 13 and 14)."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_slm.reporting.tokens import SHADES, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 96
"""Characters per line."""
_COLOURS = ("white", "#fff1cf", "#ffdf9e", "#ffc265", "#ff9d3c")
_POINTS, _CHARACTER, _LINE = 8, 0.0669, 0.175
"""Size of the font, and the width of its characters and the height of a line in inches."""


class ShadedToken(NamedTuple):
    """A token of a picture: its text, its excess loss in nats (None if unknown), and whether it is selected."""

    text: str
    excess: float | None
    selected: bool


class _Piece(NamedTuple):
    line: int
    column: int
    text: str
    token: ShadedToken


def draw_text(panes: Sequence[tuple[str, Sequence[ShadedToken]]], *paths: Path) -> None:
    """Draw the same text at several steps, one pane below the other, each with its title."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    laid_out = [(title, _lay_out(tokens)) for title, tokens in panes]
    heights = [pieces[-1].line + 3 if pieces else 3 for _, pieces in laid_out]
    with rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(COLUMNS * _CHARACTER + 0.3, sum(heights) * _LINE))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(-2, COLUMNS + 2), ylim=(sum(heights), 0))
        axis.axis("off")
        top = 1
        for (title, pieces), height in zip(laid_out, heights, strict=True):
            axis.text(0, top, title, va="center", fontsize=_POINTS + 1, weight="bold")
            for piece in pieces:
                _draw_piece(axis, piece._replace(line=piece.line + top + 1))
            top += height
        for path in paths:
            figure.savefig(path, dpi=150, format=path.suffix[1:])


def _lay_out(tokens: Sequence[ShadedToken]) -> list[_Piece]:
    """Return the pieces of tokens on their lines; a token may be cut at the end of a line."""
    pieces = []
    line = column = 0
    for token in tokens:
        for number, part in enumerate(visible(token.text).replace("\t", "⇥").split("\n")):
            if number:
                pieces.append(_Piece(line, column, "⏎", token))
                line, column = line + 1, 0
            while part:
                head, part = part[: COLUMNS - column], part[COLUMNS - column :]
                pieces.append(_Piece(line, column, head, token))
                column += len(head)
                if column == COLUMNS:
                    line, column = line + 1, 0
    return pieces


def _draw_piece(axis: "Axes", piece: _Piece) -> None:
    from matplotlib.patches import Rectangle

    line, column, text, token = piece
    if token.excess is not None:
        shade = _COLOURS[bisect_right(SHADES, token.excess)]
        axis.add_patch(Rectangle((column, line - 0.45), len(text), 0.9, facecolor=shade, linewidth=0))
    weight = "bold" if token.selected else "normal"
    axis.text(column, line, text, va="center", family="monospace", fontsize=_POINTS, weight=weight)
    if token.selected:
        axis.plot([column, column + len(text)], [line + 0.42] * 2, color="black", linewidth=1)
