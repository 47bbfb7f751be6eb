"""The modelled time of a selection on a cluster of GPUs, and its chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_slm.devices import DENSE_BF16_PEAKS

PEAK = "H100"
MFU = 0.4
"""Model FLOPs utilisation of a 7B model at 4,096 tokens on H100s with full sharding: 40.42 % in MPT's table."""
MFU_SOURCE = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md, 7b at 4,096 tokens on H100"
LAYERS, WIDTH, WEIGHTS = 32, 4096, 6_607_343_616
"""Llama-2-7B: layers, hidden size, and weights that are multiplied (all but the embedding of 32,000 x 4,096)."""
TARGET = 0.005
"""The largest share of a step that the selection may take."""


class Collective(NamedTuple):
    """One all-reduce: `sum` or `max`, and the bytes that each rank contributes."""

    operation: str
    size: int


def step_seconds(tokens: int, mfu: float) -> float:
    """Return the seconds of a plain forward and backward of Llama-2-7B, of `tokens` tokens per GPU in one sequence."""
    # Transformers, which this import loads, is slow to start, and `--help` does not need it.
    from megatron_slm.training.cost import TokenFlops

    flops = TokenFlops(weights=2.0 * WEIGHTS, attention=4.0 * LAYERS * WIDTH * tokens)
    return tokens * flops.training / (mfu * DENSE_BF16_PEAKS[PEAK])


class Estimate(NamedTuple):
    """The modelled times of one selection in seconds, and the bytes that each rank holds or contributes.

    network             all-reduces of the selection
    operators           PyTorch operators of the selection, at an assumed time each
    gather_ring         all-gather of all scores, by a ring
    gather_logarithmic  all-gather of all scores, by recursive doubling
    step                forward and backward of the micro-batch
    size                bytes that a rank contributes to the all-reduces
    gather_size         bytes of the gathered scores on each rank
    """

    ranks: int
    scores: str
    network: float
    operators: float
    gather_ring: float
    gather_logarithmic: float
    step: float
    size: int
    gather_size: int

    @property
    def share(self) -> float:
        """The share of the step that the all-reduces take."""
        return self.network / self.step

    @property
    def whole_share(self) -> float:
        """The share of the step that the all-reduces and the operators take."""
        return (self.network + self.operators) / self.step


def draw(estimates: Sequence[Estimate], tokens: int, path: Path) -> None:
    """Draw times and bytes over the number of GPUs, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tied = [e for e in estimates if e.scores == "tied"]
    distinct = [e for e in estimates if e.scores == "distinct"]
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    times, sizes = figure.subplots(1, 2)
    _line(times, tied, [e.gather_ring for e in tied], RING)
    _line(times, tied, [e.gather_logarithmic for e in tied], LOWER_BOUND)
    _line(times, tied, [e.network for e in tied], TIED)
    _line(times, distinct, [e.network for e in distinct], DISTINCT)
    _line(sizes, tied, [e.gather_size for e in tied], RING)
    _line(sizes, tied, [e.size for e in tied], TIED)
    _line(sizes, distinct, [e.size for e in distinct], DISTINCT)
    limit = TARGET * tied[0].step
    times.axhline(limit, color="0.4", linewidth=1)
    text = f"{100 * TARGET:g} % of a step of a 7B model"
    times.annotate(text, (tied[0].ranks, limit), xytext=(0, 4), textcoords="offset points", fontsize=9)
    times.set(title="Time on the network (modelled)", ylabel="time per selection")
    sizes.set(title="Data of each GPU (counted)", ylabel="size per selection")
    for axis, unit in ((times, "s"), (sizes, "B")):
        axis.set(xscale="log", yscale="log", xlabel=f"GPUs, each with {tokens:,} tokens")
        axis.set_xticks([e.ranks for e in tied], [f"{e.ranks:,}" for e in tied])
        axis.yaxis.set_major_formatter(EngFormatter(unit=unit))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    times.set_ylim(top=2 * max(limit, *(e.gather_ring for e in tied)))
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, handlelength=3.5)
    figure.savefig(path, dpi=110)


class Look(NamedTuple):
    """The label, colour, line and marker of a curve."""

    label: str
    colour: str
    style: str
    marker: str


RING = Look("all scores gathered, by a ring", "#b05000", ":", "s")
LOWER_BOUND = Look("all scores gathered, lower bound", "#803080", "-.", "D")
TIED = Look("this package, ties at the threshold", "0.1", "-", "o")
DISTINCT = Look("this package, no ties", "#0060a0", "--", "^")


def _line(axis: Any, estimates: Sequence[Estimate], values: Sequence[float], look: Look) -> None:
    axis.plot(
        [e.ranks for e in estimates],
        values,
        color=look.colour,
        linestyle=look.style,
        marker=look.marker,
        markersize=5,
        linewidth=1.7,
        label=look.label,
    )
