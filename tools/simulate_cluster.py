"""The selection of tokens on a simulated cluster of 8 to 16,384 GPUs, and a model of its time there.

The simulation runs `select_tokens` itself on every rank, one rank after another in this process, and compares the masks
with one sort of all scores. Ranks differ in their number of tokens, one has none, one has no valid token, and one has
only NaN. `distinct` scores never tie; `tied` scores are rounded, so that many equal the threshold. The all-reduces that
were counted then go through a model of a network (`cluster_latency.py`), and the result is compared with gathering all
scores and with the time of a training step of a 7B model.

    python tools/simulate_cluster.py --plot cluster.png
    python tools/simulate_cluster.py --ranks 8 1024 --network-us 10 --json

The exit status is 1 if a selection differs from the sort. Times on the network are modelled, not measured.
"""

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from cluster_latency import MFU, MFU_SOURCE, PEAK, TARGET, Collective, Estimate, draw, step_seconds
from common import option_parser, show_log_lines
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_slm.io.progress import Meter
from megatron_slm.planning.network import MICRO, Network
from megatron_slm.reporting.tables import markdown_table
from megatron_slm.selection import select, select_tokens
from megatron_slm.selection.threshold import DIGIT_BITS, Ranks

ROUND_BYTES = 8 << DIGIT_BITS
"""Bytes of the counts of one round: int64 for each digit."""
KINDS = ("distinct", "tied")


class ResultUnknown(Exception):  # noqa: N818 - control flow, not an error
    """A rank has reached an all-reduce to which other ranks have not contributed yet."""


class SequentialRanks(Ranks):
    """Ranks that run one after another in this process.

    A rank needs the result of an all-reduce before it can continue, so the ranks run in passes. In pass n, every rank
    runs again from its beginning with the known results of n all-reduces, contributes to the next one and stops. In the
    last pass all ranks end. Only one rank's tensors are in memory at a time.
    """

    def __init__(self) -> None:
        super().__init__(alone=True)
        self.calls: list[Collective] = []
        self._results: list[Tensor] = []
        self._combined: Tensor | None = None
        self._next = 0

    def begin(self, rank: int) -> None:
        """Become another rank."""
        self.rank, self._next = rank, 0

    def end_pass(self) -> bool:
        """End a pass, and return whether the ranks reached a further all-reduce in it."""
        if self._combined is None:
            return False
        self._results.append(self._combined)
        self._combined = None
        return True

    def sum(self, value: Tensor) -> Tensor:
        return self._contribute(value, Collective("sum", value.nbytes))

    def max(self, value: Tensor) -> Tensor:
        return self._contribute(value, Collective("max", value.nbytes))

    def for_group(self, group: object = None, *, alone: bool = False) -> "SequentialRanks":
        """Take the place of the constructor of `Ranks`."""
        return self

    def _contribute(self, value: Tensor, call: Collective) -> Tensor:
        index = self._next
        self._next += 1
        if index == len(self.calls):
            self.calls.append(call)
        # On a cluster, ranks that make different calls would wait for each other forever.
        if self.calls[index] != call:
            raise RuntimeError(f"Rank {self.rank} makes the call {call}, but other ranks make {self.calls[index]}.")
        if index < len(self._results):
            return self._results[index].clone()
        if self._combined is None:
            self._combined = value.clone()
        elif call.operation == "sum":
            self._combined += value
        else:
            torch.maximum(self._combined, value, out=self._combined)
        raise ResultUnknown


@dataclass(frozen=True)
class Shards:
    """The scores of all ranks in the order of the ranks, the tokens that are valid, and where each rank begins."""

    scores: Tensor
    valid: Tensor
    starts: list[int]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Yield each rank and its part."""
        for rank, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            yield rank, slice(start, end)


@dataclass(frozen=True)
class Simulated:
    """The result of one simulated selection.

    tokens              tokens of all ranks
    selected            selected tokens of all ranks
    tied_at_threshold   valid scores that equal the threshold
    exact               True if masks, threshold and counts equal those of one sort
    rounds              all-reduces of digit counts: 3 for the threshold, and those for positions if it is tied
    calls               all-reduces of each rank, in order
    operators           PyTorch operators that one rank calls
    rank_ms             mean milliseconds of one rank's own work on this CPU
    seconds             seconds of the simulation, in which ranks run again in every pass
    sort_seconds        seconds of the sort of all scores, and of the comparison
    """

    ranks: int
    scores: str
    tokens: int
    selected: int
    tied_at_threshold: int
    exact: bool
    rounds: int
    calls: list[Collective]
    operators: int
    rank_ms: float
    seconds: float
    sort_seconds: float

    @property
    def size(self) -> int:
        """The bytes that each rank contributes to all all-reduces."""
        return sum(call.size for call in self.calls)


def make_shards(ranks: int, tokens: int, kind: str, seed: int) -> Shards:
    """Return shards of at most `tokens` tokens each."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(tokens // 2, tokens + 1, (ranks,), generator=draw)
    lengths[1] = 0
    starts = [0, *lengths.cumsum(0).tolist()]
    if kind == "distinct":
        # Integers that are in sequence are the bits of floats that are in sequence.
        order = torch.randperm(starts[-1], generator=draw, dtype=torch.int32)
        scores = (order + 0x3C000000).view(torch.float32)
    else:
        scores = torch.randn(starts[-1], generator=draw).mul_(64).round_().div_(64)
        # Zeros of both signs, which are equal, and infinities.
        scores[::101] *= -0.0
        scores[::1009] = torch.inf
        scores[500::1009] = -torch.inf
    scores[7::997] = torch.nan
    valid = torch.rand(starts[-1], generator=draw) < 0.9
    valid[starts[2] : starts[3]] = False
    scores[starts[3] : starts[4]] = torch.nan
    return Shards(scores, valid, starts)


class OperatorCounter(TorchFunctionMode):
    """A count of the calls of PyTorch's operators, without reads of attributes such as `shape`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += getattr(func, "__name__", "") != "__get__"
        return func(*args, **(kwargs or {}))


def simulate(ranks: int, tokens: int, kind: str, ratio: float, seed: int) -> Simulated:
    """Select on all ranks of a simulated cluster, and compare with one sort."""
    start = time.perf_counter()
    shards, cluster = make_shards(ranks, tokens, kind, seed), SequentialRanks()
    mask = torch.zeros_like(shards.valid)
    total = _expected_passes(ranks, tokens, kind) * ranks
    with mock.patch.object(select, "Ranks", cluster.for_group), Meter(total, f"ranks run, {kind} scores") as meter:
        done, more = 0, True
        while more:
            pass_start = time.perf_counter()
            selection = run_pass(shards, cluster, ratio, mask, meter.after(done))
            done, more = done + ranks, cluster.end_pass()
        assert selection is not None
        # The last pass ran every rank from beginning to end.
        rank_ms = 1e3 * (time.perf_counter() - pass_start) / ranks
        cluster.begin(0)
        with OperatorCounter() as operators:
            first = slice(*shards.starts[:2])
            select_tokens(shards.scores[first], shards.valid[first], ratio)
    sort_start = time.perf_counter()
    exact, tied = compare_with_sort(shards, mask, selection, ratio)
    return Simulated(
        ranks=ranks,
        scores=kind,
        tokens=len(mask),
        selected=int(mask.sum()),
        tied_at_threshold=tied,
        exact=exact,
        rounds=sum(call.size == ROUND_BYTES for call in cluster.calls),
        calls=cluster.calls,
        operators=operators.count,
        rank_ms=rank_ms,
        seconds=sort_start - start,
        sort_seconds=time.perf_counter() - sort_start,
    )


def run_pass(
    shards: Shards, cluster: SequentialRanks, ratio: float, mask: Tensor, reach: Callable[[int], None]
) -> select.Selection | None:
    """Run every rank until its next all-reduce whose result is unknown, or to its end, where it writes its mask.

    Returns:
        The selection of the last rank; None if it did not reach its end.
    """
    selection = None
    for rank, part in shards:
        cluster.begin(rank)
        try:
            selection = select_tokens(shards.scores[part], shards.valid[part], ratio)
            mask[part] = selection.mask
        except ResultUnknown:
            pass
        reach(rank + 1)
    return selection


def _expected_passes(ranks: int, tokens: int, kind: str) -> int:
    """Return the number of passes: one more than the all-reduces."""
    rounds_of_positions = -(-(ranks * tokens).bit_length() // DIGIT_BITS)
    return 6 if kind == "distinct" else 8 + rounds_of_positions


def compare_with_sort(shards: Shards, mask: Tensor, selection: select.Selection, ratio: float) -> tuple[bool, int]:
    """Return whether a selection is that of one sort, and how many valid scores equal the threshold.

    NumPy sorts NaN last, and a stable sort leaves ties in the order of ranks and offsets.
    """
    valid = shards.valid.numpy()
    scores_N = shards.scores.numpy()[valid]
    order_N = np.argsort(-scores_N, kind="stable")
    k = int(np.floor(ratio * len(scores_N) + 0.5))
    expected_N = np.zeros(len(scores_N), dtype=bool)
    expected_N[order_N[:k]] = True
    threshold = scores_N[order_N[k - 1]]
    exact = np.array_equal(mask.numpy()[valid], expected_N) and int(mask.sum()) == k
    exact &= np.array_equal(selection.threshold.numpy(), threshold, equal_nan=True)
    counts = [selection.num_selected, selection.num_valid, selection.num_nan]
    exact &= [int(count) for count in counts] == [k, len(scores_N), int(np.isnan(scores_N).sum())]
    num_equal = np.isnan(scores_N).sum() if np.isnan(threshold) else (scores_N == threshold).sum()
    return bool(exact), int(num_equal)


def estimate(result: Simulated, network: Network, options: argparse.Namespace) -> Estimate:
    """Return the modelled times of a simulated selection on a cluster."""
    size = 4 * options.tokens
    return Estimate(
        ranks=result.ranks,
        scores=result.scores,
        network=sum(network.all_reduce(result.ranks, call.size, options.algorithm) for call in result.calls),
        operators=result.operators * options.operator_us * MICRO,
        gather_ring=network.gather_ring(result.ranks, size),
        gather_logarithmic=network.gather_logarithmic(result.ranks, size),
        step=step_seconds(options.tokens, options.mfu),
        size=result.size,
        gather_size=result.ranks * size,
    )


def simulation_table(results: Sequence[Simulated]) -> str:
    """Return a Markdown table of the simulated selections."""
    titles = ["ranks", "scores", "tokens", "at the threshold", "equal to a sort", "all-reduces", "of 16 kB"]
    titles += ["bytes per rank", "ms per rank", "seconds in all"]
    rows = []
    for r in results:
        row = [f"{r.ranks:,}", r.scores, f"{r.tokens:,}", f"{r.tied_at_threshold:,}", "yes" if r.exact else "NO"]
        row += [str(len(r.calls)), str(r.rounds), f"{r.size:,}", f"{r.rank_ms:.2f}", f"{r.seconds:.1f}"]
        rows.append(row)
    return markdown_table(titles, rows)


def model_table(estimates: Sequence[Estimate]) -> str:
    """Return a Markdown table of modelled times."""
    titles = ["GPUs", "scores", "all-reduces, ms", "of the step", "with operators, ms", "of the step"]
    titles += ["links may be slower by", "gather, ring, ms", "gather, lower bound, ms", "gathered per rank"]
    rows = []
    for e in estimates:
        row = [f"{e.ranks:,}", e.scores, f"{1e3 * e.network:.2f}", f"{100 * e.share:.2f} %"]
        row += [f"{1e3 * (e.network + e.operators):.2f}", f"{100 * e.whole_share:.2f} %", f"{TARGET / e.share:.1f}x"]
        row += [f"{1e3 * e.gather_ring:.2f}", f"{1e3 * e.gather_logarithmic:.2f}", f"{e.gather_size / 1e6:,.1f} MB"]
        rows.append(row)
    return markdown_table(titles, rows)


def assumptions(options: argparse.Namespace, network: Network) -> dict[str, str]:
    """Return the assumptions of the model, each with its source."""
    found = {f.name: f"{getattr(network, f.name):g} ({f.metadata['source']})" for f in fields(network)}
    return found | {
        "algorithm": options.algorithm,
        "check": f"{network.all_reduce(256, 16, options.algorithm) / MICRO:.0f} us for 16 bytes on 256 GPUs; "
        "measured on A100s: 62 to 66 us (NVIDIA/nccl#652)",
        "operator_us": f"{options.operator_us:g} (assumed; a CPU's time to launch a kernel, not measured)",
        "mfu": f"{options.mfu:g} of {PEAK}'s dense bf16 peak ({MFU_SOURCE}: 0.404)",
        "step": f"{1e3 * step_seconds(options.tokens, options.mfu):.0f} ms for Llama-2-7B, forward and backward of "
        f"{options.tokens:,} tokens per GPU, without a reference",
    }


def parse_arguments() -> argparse.Namespace:
    parser = option_parser(__doc__)
    ranks = [8, 64, 256, 1024, 4096, 16384]
    parser.add_argument("--ranks", type=int, nargs="+", default=ranks, help=f"default: {' '.join(map(str, ranks))}")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank, at most; default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.6, help="share to keep; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    model = parser.add_argument_group("model")
    for each in fields(Network):
        name, text = f"--{each.name.replace('_', '-')}", f"default: %(default)s; {each.metadata['source']}"
        model.add_argument(name, type=type(each.default), default=each.default, help=text)
    model.add_argument("--algorithm", choices=("best", "tree", "ring"), default="best", help="default: %(default)s")
    model.add_argument("--operator-us", type=float, default=5.0, help="time of an operator; default: %(default)s")
    model.add_argument("--mfu", type=float, default=MFU, help="of the 7B model; default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a chart")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    options = parser.parse_args()
    if min(options.ranks) < 4:
        parser.error(f"--ranks is {min(options.ranks)}, but the first four ranks hold special cases. Use 4 or more.")
    if options.tokens < 4:
        parser.error(f"--tokens is {options.tokens}, which is too few for ties. Use 4 or more.")
    if not 0 < options.ratio <= 1:
        parser.error(f"--ratio is {options.ratio}, but it is a share. Use a number above 0 and at most 1.")
    return options


def main() -> None:
    options = parse_arguments()
    show_log_lines()
    torch.set_num_threads(1)
    network = Network(**{each.name: getattr(options, each.name) for each in fields(Network)})
    sizes = sorted(set(options.ranks))
    # Three quarters of the tokens on average, each with its score, masks, and NumPy's sort with indices and workspace.
    memory = 28 * sizes[-1] * options.tokens * 3 // 4
    print(
        f"Each rank holds {options.tokens // 2:,} to {options.tokens:,} tokens; {sizes[-1]:,} ranks need about "
        f"{memory / 2**20:,.0f} MiB beside the libraries.",
        file=sys.stderr,
    )
    results = [simulate(count, options.tokens, kind, options.ratio, options.seed) for count in sizes for kind in KINDS]
    estimates = [estimate(result, network, options) for result in results]
    report(results, estimates, assumptions(options, network), options)
    if options.plot:
        draw(estimates, options.tokens, options.plot)
    if not all(result.exact for result in results):
        sys.exit(1)


def report(
    results: Sequence[Simulated], estimates: Sequence[Estimate], assumed: dict[str, str], options: argparse.Namespace
) -> None:
    """Print all results."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if options.json:
        simulated = [asdict(r) | {"calls": [c._asdict() for c in r.calls], "bytes_per_rank": r.size} for r in results]
        modelled = [e._asdict() | {"share": e.share, "whole_share": e.whole_share} for e in estimates]
        found: dict[str, Any] = {"simulation": simulated, "model": modelled, "assumptions": assumed}
        print(json.dumps(found | {"versions": versions, "peak_bytes": peak}))
        return
    print(f"\n{simulation_table(results)}\n\nPeak memory {peak / 2**30:.2f} GiB; one thread; {versions}.\n")
    print("Assumptions of the model:")
    print("\n".join(f"  {name:15} {value}" for name, value in assumed.items()))
    print(f"\n{model_table(estimates)}\n")
    worst = max(estimates, key=lambda e: e.share)
    print(
        f"Target: below {100 * TARGET:g} % of a step. The all-reduces take at most {100 * worst.share:.2f} % (at "
        f"{worst.ranks:,} GPUs, {worst.scores} scores), and {100 * worst.whole_share:.2f} % with the operators."
    )


if __name__ == "__main__":
    main()
