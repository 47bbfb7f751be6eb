"""What finished runs say: held-out losses, when one passes another, what was selected."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_slm.reporting.charts import Curve, draw_curves

Records = list[dict[str, Any]]

SELECTED = "selection/ratio/"


def read_records(runs: Path, name: str) -> Records:
    """What the run `name` logged."""
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def results_table(runs: Path, names: Mapping[str, str], held_out: Mapping[str, str]) -> str:
    """Markdown: held-out losses (nats a token) and bits a byte at the end of each run.

    Args:
        runs: folder of the run folders.
        names: runs, and what they are called in the table.
        held_out: evaluation sets, and what they are called.
    """
    columns = [f"{title}: {unit}" for title in held_out.values() for unit in ("loss", "bits/byte")]
    lines = [f"| run | tokens that count | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, title in names.items():
        last = read_records(runs, name)[-1]
        figures = [last[f"eval/{key}/{unit}"] for key in held_out for unit in ("loss", "bits_per_byte")]
        counted = last.get("consumed_selected_tokens", last["consumed_tokens"])
        lines.append(f"| {title} | {counted:,} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")
    return "\n".join(lines)


def overtaking(runs: Path, held_out: str) -> str:
    """When SLM's held-out loss is first no higher than CLM's final one, and how many tokens CLM took."""
    key = f"eval/{held_out}/loss"
    clm, slm = ([r for r in read_records(runs, name) if key in r] for name in ("clm", "slm"))
    end, total = clm[-1][key], clm[-1]["consumed_tokens"]
    passed = next((record["consumed_tokens"] for record in slm if record[key] <= end), None)
    if passed is None:
        return f"SLM did not reach CLM's final loss of {end:.3f} within {total:,} tokens."
    times = f"{total / passed:.1f} times as many"
    return f"SLM reached CLM's final loss of {end:.3f} by token {passed:,}; CLM took {total:,}, {times}."


def selected_table(runs: Path) -> str:
    """Markdown: the share of the tokens of each source that SLM selected, over all logged steps and at the end."""
    records = read_records(runs, "slm")
    sources = [key.removeprefix(SELECTED) for key in records[-1] if key.startswith(SELECTED)]
    lines = ["| source | selected, whole run | last fifth |", "|---|---|---|"]
    for source in sources:
        shares = [r[SELECTED + source] for r in records if r[SELECTED + source] is not None]
        lines.append(f"| {source} | {fmean(shares):.0%} | {fmean(shares[-max(1, len(shares) // 5) :]):.0%} |")
    return "\n".join(lines)


def draw_held_out(runs: Path, names: Mapping[str, str], held_out: Mapping[str, str], path: Path) -> None:
    """A picture of held-out losses over training tokens; every curve begins at the base's loss."""
    panels = {
        title: [_curve(runs, *run, f"eval/{key}/loss") for run in names.items()] for key, title in held_out.items()
    }
    draw_curves(panels, "training tokens (thousands)", "loss (nats a token)", path)


def _curve(runs: Path, name: str, title: str, key: str) -> Curve:
    points: Sequence[tuple[float, float]] = [
        (0.0, read_records(runs, "base")[-1][key]),
        *((r["consumed_tokens"] / 1e3, r[key]) for r in read_records(runs, name) if key in r),
    ]
    return Curve(title, [tokens for tokens, _ in points], [loss for _, loss in points])
