"""What the runs of `efficiency.py` say: losses against FLOPs and seconds, as tables and a picture.

FLOPs are those that a run records (training/flops.py); scoring the corpus is counted by the same convention.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from transformers import AutoModelForCausalLM

from megatron_slm.data.corpus import open_corpus, open_tokens
from megatron_slm.demo.results import read_records
from megatron_slm.demo.runs import SEQ_LENGTH
from megatron_slm.reporting.charts import Curve, draw_curves
from megatron_slm.training.flops import token_flops

HELD_OUT = {"math": "Held-out mathematics", "held_out": "Held-out general text"}
LOSS = "eval/math/loss"
"""Of what the reference knows: the target."""
TERA = 1e12


class Arm(NamedTuple):
    """A way to train.

    backward    how it is run
    documents   whole ones were left out before
    candidates  sequences that are read for each that is trained on
    scorers     models that scored the corpus before
    """

    title: str
    backward: str = "exact"
    documents: bool = False
    candidates: int = 1
    scorers: int = 1


ARMS = {
    "clm": Arm("CLM", scorers=0),
    "exact": Arm("exact"),
    "rows": Arm("rows", "rows"),
    "replay": Arm("replay", "replay"),
    "documents_rows": Arm("documents + rows", "rows", documents=True, scorers=2),
    "candidates_rows": Arm("candidates + rows", "rows", candidates=2),
}


class Point(NamedTuple):
    """An evaluation: its step, what was spent until then, and the held-out losses."""

    step: int
    flops: float
    seconds: float
    losses: dict[str, float]


class Run(NamedTuple):
    """Evaluations in order, from the base on; tokens that were selected; seconds a step."""

    points: list[Point]
    selected: int
    step_seconds: float


def read_run(folder: Path, name: str) -> Run:
    """One compared run. Seconds are of its steps: evaluations and checkpoints are not counted."""
    base, records = read_records(folder, "base")[-1], read_records(folder, name)
    points = [Point(0, 0.0, 0.0, _losses(base))]
    step, seconds = 0, 0.0
    for record in records:
        seconds += record["step_seconds"] * (record["step"] - step)
        step = record["step"]
        if LOSS in record:
            points.append(Point(step, record["flops"], seconds, _losses(record)))
    return Run(points, records[-1].get("consumed_selected_tokens", records[-1]["trained_tokens"]), seconds / step)


def _losses(record: dict) -> dict[str, float]:
    return {name: record[f"eval/{name}/loss"] for name in HELD_OUT}


def scoring_flops(folder: Path) -> float:
    """Of one model like the base over the compared runs' corpus, in windows that overlap by half (docs/score.md)."""
    index = open_tokens(open_corpus(str(folder / "general"))).index  # held, for it takes its arrays with it
    length_D = index.sequence_lengths.astype(np.int64)
    stride = SEQ_LENGTH // 2
    more_D = -(-np.maximum(0, length_D - SEQ_LENGTH) // stride)
    # Every window but the last of a document is full; the last one ends with the document.
    tokens_D = np.where(more_D == 0, length_D, SEQ_LENGTH * more_D + length_D - stride * more_D)
    lm = AutoModelForCausalLM.from_pretrained(folder / "hf-base")
    return float(tokens_D.sum()) * token_flops(lm, lm.config, SEQ_LENGTH).forward


def reached(run: Run, loss: float, cost: Callable[[Point], float]) -> float | None:
    """The cost at which the target's loss first came down to this, linear between evaluations."""
    for before, after in zip(run.points, run.points[1:], strict=False):
        high, low = before.losses["math"], after.losses["math"]
        if low <= loss:
            share = (high - loss) / (high - low) if high > low else 1.0
            return cost(before) + max(share, 0.0) * (cost(after) - cost(before))
    return None


def write_report(folder: Path, seeds: list[int]) -> str:
    """Write efficiency.json, efficiency.png and efficiency.md, and return the last."""
    runs = {arm: [read_run(folder, f"{arm}-{seed}") for seed in seeds] for arm in ARMS}
    scoring = scoring_flops(folder)
    plain = {arm: [run._asdict() | {"points": [p._asdict() for p in run.points]} for run in runs[arm]] for arm in runs}
    found = {"scoring": scoring, "seeds": seeds, "runs": plain}
    (folder / "efficiency.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(runs, scoring, folder / "efficiency.png")
    said = f"Scoring the corpus: {scoring / TERA:.2f} TFLOP a model."
    text = "\n\n".join([losses_table(runs), cost_table(runs, scoring), said])
    (folder / "efficiency.md").write_text(text + "\n", encoding="utf-8")
    return text + "\n"


def losses_table(runs: dict[str, list[Run]]) -> str:
    """Markdown: final losses by arm, and their difference from the exact run of the same seed."""
    lines = ["| run | mathematics | from exact, by seed | general text | tokens selected |", "|---" * 5 + "|"]
    for arm, found in runs.items():
        ends = {name: [run.points[-1].losses[name] for run in found] for name in HELD_OUT}
        exact = [run.points[-1].losses["math"] for run in runs["exact"]]
        apart = ", ".join(f"{own - other:+.3f}" for own, other in zip(ends["math"], exact, strict=True))
        columns = [ARMS[arm].title, _spread(ends["math"]), apart, _spread(ends["held_out"]), f"{found[0].selected:,}"]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def cost_table(runs: dict[str, list[Run]], scoring: float) -> str:
    """Markdown: what was spent, in all and until the loss was CLM's final one of the same seed."""
    titles = ["run", "TFLOP", "with scoring", "TFLOP to CLM's loss", "with scoring", "s a step", "s to CLM's loss"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm, found in runs.items():
        once = scoring * ARMS[arm].scorers / TERA
        flops = fmean(run.points[-1].flops for run in found) / TERA
        ends = [run.points[-1].losses["math"] for run in runs["clm"]]
        until = [
            [reached(run, end, cost) for run, end in zip(found, ends, strict=True)]
            for cost in (lambda point: point.flops / TERA, lambda point: point.seconds)
        ]
        columns = [f"{flops:.2f}", f"{flops + once:.2f}", _mean(until[0]), _mean(until[0], once)]
        columns += [_spread([run.step_seconds for run in found]), _mean(until[1], digits=0)]
        lines.append(f"| {ARMS[arm].title} | {' | '.join(columns)} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]], scoring: float, path: Path) -> None:
    """Loss against FLOPs, the mean over the seeds, and a band from the lowest to the highest."""
    panels = {
        "Training": list(_curves(runs, 0.0)),
        "Training, and scoring the corpus once": list(_curves(runs, scoring)),
    }
    draw_curves(panels, "10¹² FLOPs", "loss on held-out mathematics (nats a token)", path)


def _curves(runs: dict[str, list[Run]], scoring: float) -> Iterator[Curve]:
    for arm, found in runs.items():
        columns = list(zip(*(run.points for run in found), strict=True))
        losses = [[point.losses["math"] for point in points] for points in columns]
        flops = [(fmean(p.flops for p in points) + scoring * ARMS[arm].scorers) / TERA for points in columns]
        yield Curve(ARMS[arm].title, flops, [*map(fmean, losses)], [*map(min, losses)], [*map(max, losses)])


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def _mean(values: Sequence[float | None], more: float = 0.0, digits: int = 2) -> str:
    """A dash where a run never came so far."""
    known = [value for value in values if value is not None]
    return f"{fmean(known) + more:.{digits}f}" if len(known) == len(values) else "-"
