"""A verdict on a run in words. Each sentence follows from a stated rule, which docs/reading-a-run.md lists."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from megatron_slm.analysis.runs import RunFiles
from megatron_slm.reporting.records import Records

NOTABLE = 0.02
"""Nats by which two losses must differ to be called better or worse."""
REBOUND = 0.05
"""Nats by which a loss may be above its lowest value at the end of a run."""
SELDOM = 0.25
"""A source counts as seldom selected if its selected share is below this part of the overall share."""
STRANGE = 1.5
"""A source is strange if its bits per byte are above the median of the sources by this factor."""
GUESSED = 0.95
"""A source is no better than guessed if its loss is above this part of the logarithm of the vocabulary."""
PAPER_RATIOS = (0.4, 1.0)
"""The range of selection.ratio that the paper tried (Figure 9)."""
HELD_OUT_JUMP, TRAINING_JUMP = 0.2, 0.6
"""Nats by which held-out and training losses may rise soon after the start; a training loss is that of one batch."""
FALL = 0.3
"""Nats by which a training loss that jumped falls again."""
RISING_GRADIENT = 2.0
"""Factor by which the gradient norm may rise between the first and the last third of a run."""


@dataclass(frozen=True)
class Finding:
    """A sentence about a run.

    level     good, info or warning
    sentence  what was found, and where to look next
    """

    level: str
    sentence: str


def verdict(run: RunFiles) -> list[Finding]:
    """Return all findings about one run: results, the reference, the selection, the sources, then its health."""
    parts = (_results, _reference, _selection, _sources, _stability, _interruptions)
    return [finding for part in parts for finding in part(run)]


def _results(run: RunFiles) -> list[Finding]:
    found = []
    for name in run.evaluation_sets:
        curve = _with_start(run, name)
        losses = [loss for _, loss in curve]
        if len(losses) < 2:
            continue
        first, last, lowest = losses[0], losses[-1], min(losses)
        change = f"from {first:.3f} to {last:.3f}"
        if last < first - NOTABLE:
            found.append(Finding("good", f"Held-out loss of {name} improved by {first - last:.3f} ({change})."))
        elif last > first + NOTABLE:
            advice = "That is the known price of selection on other text" if run.config.objective == "slm" else ""
            tail = f" {advice}; it is a defect if this is the text that the run is for." if advice else ""
            found.append(Finding("warning", f"Held-out loss of {name} rose by {last - first:.3f} ({change}).{tail}"))
        else:
            found.append(Finding("info", f"Held-out loss of {name} did not change ({change})."))
        if lowest < last - REBOUND and last <= first + NOTABLE:
            step = min(curve, key=lambda point: point[1])[0]
            sentence = (
                f"{name} was lowest at step {step:.0f} ({lowest:.3f}) and rose again to {last:.3f}: look at its curve."
            )
            found.append(Finding("warning", sentence))
    return found


def _with_start(run: RunFiles, name: str) -> list[tuple[float, float]]:
    """Return the held-out loss by step, with the loss before training if the observed tokens hold it."""
    points = [(float(r["step"]), float(r[key])) for r in run.records if r.get(key := f"eval/{name}/loss") is not None]
    observed = run.observed
    if observed is not None and _has_start(run, name) and points:
        of_set_N = observed.columns["corpus"] == observed.corpora.index(name)
        points.insert(0, (0.0, float(observed.loss_SN[0, of_set_N].mean(dtype=np.float64))))
    return points


def _has_start(run: RunFiles, name: str) -> bool:
    """Return whether the observed tokens hold the loss of an evaluation set before training."""
    observed = run.observed
    return observed is not None and observed.steps[0] == 0 and name in observed.corpora


def _reference(run: RunFiles) -> list[Finding]:
    """Compare the reference with the student where it starts, on each observed corpus."""
    observed = run.observed
    if run.config.objective != "slm" or observed is None or observed.reference_N is None or observed.steps[0] != 0:
        return []
    better: list[str] = []
    worse: list[str] = []
    for index, name in enumerate(observed.corpora):
        of_set_N = observed.columns["corpus"] == index
        reference = float(observed.reference_N[of_set_N].mean(dtype=np.float64))
        student = float(observed.loss_SN[0, of_set_N].mean(dtype=np.float64))
        text = f"{name} (reference {reference:.3f}, student before training {student:.3f})"
        (better if reference < student - NOTABLE else worse).append(text)
    if not better:
        sentence = (
            f"The reference is better than the untrained student on nothing that was observed: {', '.join(worse)}. Its "
            "excess loss says little about what is worth learning. Check reference.path, and what it was trained on."
        )
        return [Finding("warning", sentence)]
    found = [Finding("good", f"The reference is better than the student at its start on {', '.join(better)}.")]
    if worse:
        sentence = f"The reference is not better on {', '.join(worse)}: selection does not favour such text."
        found.append(Finding("info", sentence))
    return found


def _selection(run: RunFiles) -> list[Finding]:
    selective = [record for record in run.records if record.get("selection/ratio") is not None]
    if run.config.objective != "slm" or not selective:
        return []
    found = []
    ratio = run.config.selection.ratio
    if not run.config.selection.of and ratio < PAPER_RATIOS[0]:
        sentence = (
            f"selection.ratio is {ratio:g}, below all ratios that the paper tried ({PAPER_RATIOS[0]:g} to "
            f"{PAPER_RATIOS[1]:g}; best about 0.6). Most of the text has no effect on the gradient; try a larger ratio."
        )
        found.append(Finding("warning", sentence))
    thresholds = [r["selection/threshold"] for r in selective if r.get("selection/threshold") is not None]
    if thresholds and run.config.selection.score == "excess" and max(thresholds) < 0:
        sentence = (
            "The threshold was below 0 in the whole run: some selected tokens are those that the reference predicts "
            "worse than the student. Use a lower ratio, or a stronger reference."
        )
        found.append(Finding("info", sentence))
    return found


def _sources(run: RunFiles) -> list[Finding]:
    """Name the sources that are seldom selected, and those whose text looks corrupted."""
    found = []
    late = run.records[-max(1, len(run.records) // 3) :]
    overall = fmean([record["selection/ratio"] for record in late if record.get("selection/ratio")] or [0.0])
    for source, share in _source_means(late, "selection/ratio").items():
        if share < SELDOM * overall:
            sentence = (
                f"The source {source} is seldom selected ({share:.1%} of its tokens, {overall:.1%} of all): it costs "
                "compute and teaches little. Read some of it, and leave it out if it is worth nothing."
            )
            found.append(Finding("warning", sentence))
    loss = _source_means(late, "loss/all")
    guess = math.log(run.vocabulary) if run.vocabulary else math.inf
    # A student from scratch guesses every source at first.
    guessed = {name for name in loss if loss[name] > GUESSED * guess > median(loss.values())}
    for source in sorted(guessed):
        sentence = (
            f"The source {source} is predicted no better than by guessing (loss {loss[source]:.2f}; a random guess has "
            f"{guess:.2f}): its file is corrupted, or of another tokenizer. Prepare it again."
        )
        found.append(Finding("warning", sentence))
    bytes_per_token: dict[str, float] = run.environment.get("bytes_per_token", {})
    bits = {name: loss[name] / math.log(2) / bytes_per_token[name] for name in loss if bytes_per_token.get(name)}
    for source, value in bits.items():
        if source not in guessed and len(bits) > 2 and value > STRANGE * median(bits.values()):
            sentence = (
                f"The source {source} takes {value:.2f} bits per byte, and the median of the sources is "
                f"{median(bits.values()):.2f}: its text is of another kind, or corrupted. Read some of it."
            )
            found.append(Finding("warning", sentence))
    return found


def _source_means(records: Records, metric: str) -> dict[str, float]:
    """Return the mean of `metric/SOURCE` over the records for each source."""
    values: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(f"{metric}/") and value is not None:
                values.setdefault(key.removeprefix(f"{metric}/"), []).append(value)
    return {source: fmean(of_source) for source, of_source in values.items()}


def _stability(run: RunFiles) -> list[Finding]:
    found = []
    before, last = _early_and_late(run, "loss/all")
    if last > before + REBOUND:
        sentence = (
            f"The training loss rose: its median over the last third is {last:.3f}, and was {before:.3f} before. Lower "
            "training.lr, and look at the data of these steps."
        )
        found.append(Finding("warning", sentence))
    if _jumped(run):
        sentence = (
            "The losses jumped after the start, and fell again later: the first updates destroyed a part of what the "
            "model knew. Lower training.lr, or raise training.warmup_tokens."
        )
        found.append(Finding("warning", sentence))
    before, last = _early_and_late(run, "grad_norm")
    if last > RISING_GRADIENT * before:
        sentence = f"The gradient norm rose from {before:.2f} to {last:.2f} in the last third. Lower training.lr."
        found.append(Finding("warning", sentence))
    if run.spikes:
        steps = ", ".join(str(spike["step"]) for spike in run.spikes[:8])
        sentence = f"The loss spiked {len(run.spikes)} times (steps {steps}): spikes.jsonl names the samples."
        found.append(Finding("warning", sentence))
    not_finite = sum(record.get("selection/nan") or 0 for record in run.records)
    if not_finite:
        found.append(Finding("warning", f"The score of {not_finite:,} tokens was NaN: check selection.score."))
    return found


def _jumped(run: RunFiles) -> bool:
    """Return whether the training loss, or every held-out loss, rose soon after the start and fell again later."""
    losses = [record["loss/all"] for record in run.records if record.get("loss/all") is not None]
    soon, late = losses[1 : 1 + len(losses) // 10], losses[-(len(losses) // 3) :]
    if len(soon) > 2 and median(soon) > max(losses[0] + TRAINING_JUMP, median(late) + FALL):
        return True
    curves = [[loss for _, loss in _with_start(run, name)] for name in run.evaluation_sets if _has_start(run, name)]
    return bool(curves) and all(
        len(curve) > 2 and curve[1] > curve[0] + HELD_OUT_JUMP and curve[-1] < curve[1] for curve in curves
    )


def _early_and_late(run: RunFiles, key: str) -> tuple[float, float]:
    """Return the lower median of the first two thirds of a metric, and that of the last; zeros for short runs."""
    values = [record[key] for record in run.records if record.get(key) is not None]
    third = len(values) // 3
    if third < 3:
        return 0.0, 0.0
    return min(median(values[:third]), median(values[third : 2 * third])), median(values[-third:])


def _interruptions(run: RunFiles) -> list[Finding]:
    found = []
    last = run.last
    if last.get("skipped_updates"):
        sentence = f"{last['skipped_updates']} updates were skipped because gradients were not finite."
        found.append(Finding("warning", sentence))
    if last.get("failed_saves"):
        found.append(Finding("warning", f"{last['failed_saves']} checkpoints could not be written: see its log."))
    starts = len(run.environment.get("starts", []))
    if starts > 1:
        found.append(Finding("info", f"The run was started {starts} times."))
    if not run.is_finished:
        planned = run.config.training.train_tokens
        found.append(Finding("info", f"The run is not finished: {last['trained_tokens']:,} of {planned:,} tokens."))
    return found


def comparisons(runs: Sequence[RunFiles], units: dict[str, str | None]) -> list[Finding]:
    """Compare the final held-out results of all runs with those of the first, for sets that may be compared.

    Args:
        runs: two or more; the first is the baseline.
        units: unit of each evaluation set, from `comparable_unit`.
    """
    found = []
    base = runs[0]
    for name, unit in units.items():
        if unit is None or name not in base.evaluation_sets:
            continue
        key, word = f"eval/{name}/{unit}", {"loss": "nats", "bits_per_byte": "bits per byte"}[unit]
        reached = base.curve(key, "tokens")
        if not reached:
            continue
        end, tokens = reached[-1][1], reached[-1][0]
        for run in runs[1:]:
            curve = run.curve(key, "tokens")
            if not curve:
                continue
            difference = curve[-1][1] - end
            sign = "lower than" if difference < 0 else "above"
            sentence = f"{name}: {run.name} ends {abs(difference):.3f} {word} {sign} {base.name}"
            passed = next((x for x, y in curve if y <= end), None)
            if difference < 0 and passed is not None and passed < tokens:
                sentence += f", and was level with its end after {passed / tokens:.0%} of its tokens"
            found.append(Finding("good" if difference < -NOTABLE else "info", sentence + "."))
    return found
