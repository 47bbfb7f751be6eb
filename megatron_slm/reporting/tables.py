"""Tables and numbers as text."""

from collections.abc import Iterable, Sequence

from megatron_slm.reporting.tokens import visible

Cell = str | int | float


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table without a newline at its end; each row has one cell per title."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])


def aligned_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for a terminal without a newline at its end; all columns but the first are aligned right."""
    lines = [titles, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def quantity(value: float | int | None) -> str:
    """Return a number with three digits and a suffix: 1234567 as 1.23M."""
    if value is None:
        return "n/a"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def formatted(cell: Cell) -> str:
    """Return a cell as text: numbers with three digits behind the point, text with its invisible characters escaped."""
    if isinstance(cell, str):
        return visible(cell).replace("\n", "⏎").replace("\t", "⇥")
    if isinstance(cell, int):
        return f"{cell:,}"
    if cell != cell:
        return ""
    return f"{cell:.3f}" if cell == 0 or 0.001 <= abs(cell) < 1e6 else f"{cell:.3g}"
