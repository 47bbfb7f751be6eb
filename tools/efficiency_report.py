"""The report of `efficiency.py`: losses against FLOPs and seconds, as tables and a picture.

FLOPs are those that a run records (training/cost.py). Scoring the corpus is counted by the same convention.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from common import spread
from transformers import AutoModelForCausalLM

from megatron_slm.data.corpus import open_corpus, open_documents
from megatron_slm.demo.chain import SEQ_LENGTH
from megatron_slm.demo.report import run_records
from megatron_slm.reporting.charts import Curve, draw_curves
from megatron_slm.reporting.tables import markdown_table
from megatron_slm.training.cost import token_flops

HELD_OUT = {"math": "Held-out mathematics", "held_out": "Held-out general text"}
LOSS = "eval/math/loss"
"""The loss on the domain of the reference."""
TERA = 1e12


class Arm(NamedTuple):
    """A way to train that is compared.

    backward    as `selection.backward`
    documents   whether it trains on the kept documents only
    candidates  sequences to read per sequence to train on
    scorers     models that score the corpus before training
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
    """An evaluation: its step, the FLOPs spent until then, and the held-out losses."""

    step: int
    flops: float
    losses: dict[str, float]


class Run(NamedTuple):
    """The evaluations of a run in order, beginning with the base; its selected tokens; the median seconds of a step.

    Evaluations and checkpoints are not part of a step.
    """

    points: list[Point]
    selected: int
    step_seconds: float


def read_run(folder: Path, name: str) -> Run:
    """Read a compared run."""
    base, records = run_records(folder, "base")[-1], run_records(folder, name)
    points = [Point(0, 0.0, _losses(base))]
    points += [Point(r["step"], r["flops"], _losses(r)) for r in records if LOSS in r]
    selected = records[-1].get("consumed_selected_tokens", records[-1]["trained_tokens"])
    return Run(points, selected, median(record["step_seconds"] for record in records))


def _losses(record: dict[str, Any]) -> dict[str, float]:
    return {name: record[f"eval/{name}/loss"] for name in HELD_OUT}


def scoring_flops(folder: Path) -> float:
    """Return the FLOPs of scoring the corpus with a model like the base, in overlapping windows (docs/score.md)."""
    length_D = open_documents(open_corpus(str(folder / "general"))).length_D.astype(np.int64)
    stride = SEQ_LENGTH // 2
    more_D = -(-np.maximum(0, length_D - SEQ_LENGTH) // stride)
    # Every window but the last of a document is full; the last one ends with the document.
    tokens_D = np.where(more_D == 0, length_D, SEQ_LENGTH * more_D + length_D - stride * more_D)
    lm = AutoModelForCausalLM.from_pretrained(folder / "hf-base")
    return float(tokens_D.sum()) * token_flops(lm, lm.config, SEQ_LENGTH).forward


def reached(run: Run, loss: float, cost: Callable[[Point], float]) -> float | None:
    """Return the cost at which the loss on mathematics first reached `loss`, interpolated between evaluations."""
    for before, after in zip(run.points, run.points[1:], strict=False):
        high, low = before.losses["math"], after.losses["math"]
        if low <= loss:
            share = (high - loss) / (high - low) if high > low else 1.0
            return cost(before) + max(share, 0.0) * (cost(after) - cost(before))
    return None


def write_report(folder: Path, seeds: list[int]) -> str:
    """Write efficiency.json, efficiency.png and efficiency.md, and return the text of the last."""
    runs = {arm: [read_run(folder, f"{arm}-{seed}") for seed in seeds] for arm in ARMS}
    scoring = scoring_flops(folder)
    plain = {arm: [run._asdict() | {"points": [p._asdict() for p in run.points]} for run in runs[arm]] for arm in runs}
    found = {"scoring": scoring, "seeds": seeds, "runs": plain}
    (folder / "efficiency.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(runs, scoring, folder / "efficiency.png")
    note = f"Scoring the corpus: {scoring / TERA:.2f} TFLOP per model."
    text = "\n\n".join([losses_table(runs), cost_table(runs, scoring), note])
    (folder / "efficiency.md").write_text(text + "\n", encoding="utf-8")
    return text + "\n"


def losses_table(runs: dict[str, list[Run]]) -> str:
    """Return a Markdown table of final losses by arm, and their difference from the exact run of the same seed."""
    rows = []
    for arm, found in runs.items():
        ends = {name: [run.points[-1].losses[name] for run in found] for name in HELD_OUT}
        exact = [run.points[-1].losses["math"] for run in runs["exact"]]
        apart = ", ".join(f"{own - other:+.3f}" for own, other in zip(ends["math"], exact, strict=True))
        rows.append([ARMS[arm].title, spread(ends["math"]), apart, spread(ends["held_out"]), f"{found[0].selected:,}"])
    return markdown_table(["run", "mathematics", "from exact, by seed", "general text", "tokens selected"], rows)


def cost_table(runs: dict[str, list[Run]], scoring: float) -> str:
    """Return a Markdown table of the total cost, and of the cost to reach CLM's last loss and a late loss of exact."""
    late = 2 * len(runs["exact"][0].points) // 3
    targets = {
        "CLM's last loss": [run.points[-1].losses["math"] for run in runs["clm"]],
        f"exact's at step {runs['exact'][0].points[late].step}": [r.points[late].losses["math"] for r in runs["exact"]],
    }
    titles = ["run", "TFLOP", "scoring", "s per step"]
    titles += [f"{unit} to {target}" for target in targets for unit in ("TFLOP", "s")]
    rows = []
    for arm, found in runs.items():
        flops = fmean(run.points[-1].flops for run in found) / TERA
        columns = [ARMS[arm].title, f"{flops:.2f}", f"{scoring * ARMS[arm].scorers / TERA:.2f}"]
        seconds = [run.step_seconds for run in found]
        columns.append(f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})")
        for ends in targets.values():
            pairs = list(zip(found, ends, strict=True))
            columns.append(_mean([reached(*pair, lambda point: point.flops / TERA) for pair in pairs]))
            steps = [reached(*pair, lambda point: point.step) for pair in pairs]
            columns.append(_mean([step and step * median(seconds) for step in steps], digits=0))
        rows.append(columns)
    return markdown_table(titles, rows)


def draw(runs: dict[str, list[Run]], scoring: float, path: Path) -> None:
    """Draw the loss against FLOPs: the mean over the seeds, and a band from the lowest to the highest."""
    panels = {
        "Training": list(_curves(runs, 0.0)),
        "Training, and scoring the corpus once": list(_curves(runs, scoring)),
    }
    draw_curves(panels, "10¹² FLOPs", "loss on held-out mathematics (nats per token)", path)


def _curves(runs: dict[str, list[Run]], scoring: float) -> Iterator[Curve]:
    for arm, found in runs.items():
        columns = list(zip(*(run.points for run in found), strict=True))
        losses = [[point.losses["math"] for point in points] for points in columns]
        flops = [(fmean(p.flops for p in points) + scoring * ARMS[arm].scorers) / TERA for points in columns]
        yield Curve(ARMS[arm].title, flops, [*map(fmean, losses)], [*map(min, losses)], [*map(max, losses)])


def _mean(values: Sequence[float | None], digits: int = 2) -> str:
    """Return the mean over the runs that reached the loss, and the number of these runs if some did not."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{fmean(known):.{digits}f}" + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")
