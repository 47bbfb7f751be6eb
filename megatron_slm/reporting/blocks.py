"""The blocks of a page: headings, findings, tables, charts and passages of text, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megatron_slm.reporting.charts import Chart
from megatron_slm.reporting.tables import Cell

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TableLike(Protocol):
    """A table: its name as a file, its title, the titles of the columns, and the rows."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def rows(self) -> Sequence[Sequence[Cell]]: ...


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Warnings:
    """A box of sentences that a reader must not miss."""

    title: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class Findings:
    """A list of sentences, each with its level: good, info or warning."""

    title: str
    items: Sequence[tuple[str, str]]
    run: int | None = None


@dataclass(frozen=True)
class Figures:
    """A group of charts under one heading, with a sentence for readers in place of charts that cannot be drawn."""

    title: str
    charts: Sequence[Chart]
    note: str = ""


@dataclass(frozen=True)
class Listing:
    """A table on the page.

    table     the table
    note      how to read it
    run       number of the run that it belongs to; None if it is about several
    row_runs  number of the run of each row, if each row is about one run
    shaded    the cells hold shares from 0 to 1, which also shade them
    folded    the reader opens it; print always shows it
    """

    table: TableLike
    note: str = ""
    run: int | None = None
    row_runs: Sequence[int | None] = ()
    shaded: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Text of a file, folded away."""

    title: str
    text: str
    run: int | None = None


@dataclass(frozen=True)
class PassageLosses:
    """The losses of one run on the passages: a list of P arrays, one per passage, each over the same S steps.

    run         number of the run
    steps       S steps
    loss        float `[S, T]` per passage, in nats
    selected    bool `[S, T]` per passage
    has_mask_S  False for steps without a selection
    reference   float `[T]` per passage; None if no reference is known
    """

    run: int
    steps: Sequence[int]
    loss: "Sequence[NDArray[Any]]"
    selected: "Sequence[NDArray[Any]]"
    has_mask_S: Sequence[bool]
    reference: "Sequence[NDArray[Any]] | None"


@dataclass(frozen=True)
class Passages:
    """Passages of text, and the losses of the runs that observed them: `texts` holds a title and T tokens each."""

    title: str
    texts: Sequence[tuple[str, Sequence[str]]]
    losses: Sequence[PassageLosses]


Block = Heading | Paragraph | Warnings | Findings | Figures | Listing | Fold | Passages


@dataclass(frozen=True)
class Section:
    """A section of the page; `name` is its anchor."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class RunHead:
    """A run, as the page lists it.

    name   short name
    note   what kind of run it is
    clock  values of the horizontal axes by name, all with one value per recorded step; `step` is one of them
    """

    name: str
    note: str
    clock: "Mapping[str, NDArray[Any]]"


@dataclass(frozen=True)
class Page:
    """The whole page; `axes` holds the titles of the horizontal axes by name."""

    title: str
    subtitle: str
    runs: Sequence[RunHead]
    axes: Mapping[str, str]
    sections: Sequence[Section] = field(default_factory=list)

    def charts(self) -> list[Chart]:
        """Return all charts in order."""
        blocks = (block for section in self.sections for block in section.blocks)
        return [chart for block in blocks if isinstance(block, Figures) for chart in block.charts]

    def tables(self) -> list[TableLike]:
        """Return all tables in order."""
        blocks = (block for section in self.sections for block in section.blocks)
        return [block.table for block in blocks if isinstance(block, Listing)]
