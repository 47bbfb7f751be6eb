"""The callbacks that fill the record of a step."""

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_slm.training.cost import ModelFlops, step_flops, student_tokens
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult
from megatron_slm.training.trainer import Callback


class StepMetrics(Callback):
    """Adds the step's losses, selection and update to the record, over all ranks.

    Args:
        sources: names of the blend's entries.
        selective: True to add the metrics of the selection.
        quantiles: quantiles of the excess loss to add; empty if the run has no reference.
        min_context: see `competing_tokens`; above 0, the share of tokens that do not compete is reported.
    """

    def __init__(self, sources: list[str], selective: bool, quantiles: tuple[float, ...], min_context: int = 0) -> None:
        self._sources = sources
        self._selective = selective
        self._quantiles = quantiles
        self._min_context = min_context
        self._warned = False

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.record is None:
            return
        sums = result.statistics.sums
        state.record |= {
            "step": state.step,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "loss/all": ratio(sums["loss"], sums["valid"]),
            "lr": result.learning_rate,
            "grad_norm": result.update.grad_norm,
            "skipped_updates": state.skipped_updates,
            "failed_saves": state.failed_saves,
        }
        state.record |= {f"loss/{name}": mean for name, mean in result.statistics.mean_terms.items()}
        state.record |= self._by_source("loss/all", sums, "loss", "valid")
        if self._selective:
            state.record |= self._selection(state, result, sums)
            self._warn(result.statistics.num_nan)

    def _selection(self, state: RunState, result: StepResult, sums: dict[str, float]) -> dict[str, float | None]:
        unselected = sums["valid"] - sums["selected"]
        statistics = result.statistics
        quantiles: list[float] | list[None] = [None] * len(self._quantiles)
        if statistics.has_reference:
            quantiles = statistics.excess_quantiles(self._quantiles)
        record = {
            "consumed_selected_tokens": state.consumed_selected_tokens,
            "loss/selected": ratio(sums["selected_loss"], sums["selected"]),
            "loss/unselected": ratio(sums["loss"] - sums["selected_loss"], unselected),
            "loss/reference": ratio(sums["reference_loss"], sums["valid"]) if statistics.has_reference else None,
            "selection/threshold": ratio(sums["threshold"], sums["thresholds"]),
            "selection/ratio": ratio(sums["selected"], sums["valid"]),
            "selection/nan": statistics.num_nan,
        }
        if self._min_context:
            record["selection/short_context"] = ratio(sums["valid"] - sums["competing"], sums["valid"])
        record |= self._by_source("selection/ratio", sums, "selected", "valid")
        if statistics.has_reference:
            record |= self._by_source("loss/reference", sums, "reference_loss", "valid")
        for q, quantile in zip(self._quantiles, quantiles, strict=True):
            record[f"excess/q{q * 100:02.0f}"] = quantile
        return record

    def _by_source(self, key: str, sums: dict[str, float], part: str, whole: str) -> dict[str, float | None]:
        """Return the ratio of two sums of each source, as `key/NAME`."""
        return {
            f"{key}/{name}": ratio(sums[f"{part}/{source}"], sums[f"{whole}/{source}"])
            for source, name in enumerate(self._sources)
        }

    def _warn(self, without_score: int) -> None:
        """Warn once about tokens without a score. A few of them are no error, because they are selected last."""
        if without_score and not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                "selection.score is NaN for %d tokens of this step, which are selected last. Check the score, and "
                "watch selection/nan in the records.",
                without_score,
            )


def ratio(part: float, whole: float) -> float | None:
    """Return `part / whole`; None if `whole` is 0."""
    return part / whole if whole else None


class Throughput(Callback):
    """Adds the speed and utilization, as means over the steps since the last record.

    The time of callbacks, such as evaluation, and of checkpoints is not included.

    Args:
        models: FLOPs per token. The hardware utilization counts forwards of the reference, and those of the student
            that only score; the MFU does not.
        peak_flops: peak of all devices together in FLOP/s; None if unknown, so that MFU and utilization are null.
    """

    def __init__(self, models: ModelFlops, peak_flops: float | None) -> None:
        self._models = models
        self._peak_flops = peak_flops
        self._seconds = self._flops = 0.0
        self._steps = 0

    def on_train_start(self, state: RunState) -> None:
        if self._peak_flops is None:
            return
        logging.getLogger(__name__).info(
            "FLOPs per token: student %.3g, reference %.3g; peak of all devices: %.0f TFLOP/s (dense)",
            self._models.student.training,
            self._models.reference,
            self._peak_flops / 1e12,
        )

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        self._seconds += state.step_seconds
        self._steps += 1
        self._flops += step_flops(self._models, result.tokens)
        if state.record is None:
            return
        seconds = self._seconds / self._steps
        speed = state.plan.tokens_per_step / seconds
        peak = self._peak_flops
        state.record |= {
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "mfu": speed * self._models.student.training / peak if peak else None,
            "hardware_utilization": self._flops / self._seconds / peak if peak else None,
        }
        self._seconds, self._flops, self._steps = 0.0, 0.0, 0


NAME = "accounting"
"""Key of the totals in `RunState.carried`."""


class Accounting(Callback):
    """Adds the totals of the run over all ranks and all models; every rank computes the same.

    Args:
        models: FLOPs per token of each model.
    """

    def __init__(self, models: ModelFlops) -> None:
        self._models = models

    def on_train_start(self, state: RunState) -> None:
        # NaN if the run began with an earlier version, which did not keep these totals.
        before = math.nan if state.step else 0
        state.carried.setdefault(NAME, {"scored_tokens": before, "flops": before})

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        spent = state.carried[NAME]
        spent["scored_tokens"] += student_tokens(result.tokens, self._models.backward).scored
        spent["flops"] += step_flops(self._models, result.tokens)
        if state.record is not None:
            state.record |= {"trained_tokens": state.trained_tokens, **spent}


WARM_UP = 50
"""Number of first steps that are never reported as spikes, because the average is not reliable yet."""
WINDOW = 100
"""Number of steps that the averages span: each new step has a weight of one hundredth."""


@dataclass
class LossAverage:
    """The exponentially weighted mean and variance of the loss so far, and the number of spikes."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0
    spikes: int = 0

    def deviation(self, loss: float) -> float:
        """Return the distance of a loss above the mean, in standard deviations."""
        return (loss - self.mean) / max(math.sqrt(self.variance), 1e-12)

    def add(self, loss: float) -> None:
        """Add one step: with equal weights until the window is full, then with exponential weights."""
        self.steps += 1
        weight = max(1 / self.steps, 1 / WINDOW)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)


class Spikes(Callback):
    """Warns of loss spikes, adds their number to the record, and writes `spikes.jsonl` on rank 0.

    Every rank computes the same. A spike moves the averages only as much as a loss at the limit, so that the next spike
    is still detected, but a loss that stays high is accepted after some steps.

    Args:
        path: file for the spikes; None on ranks that do not write.
        sigma: a loss is a spike if it is more than this many standard deviations above the mean.
    """

    def __init__(self, path: Path | None, sigma: float) -> None:
        self._path = path
        self._sigma = sigma
        self._average = LossAverage()

    def on_train_start(self, state: RunState) -> None:
        self._average = LossAverage(**state.carried.get("spikes", {}))

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        average, loss = self._average, result.loss
        if math.isfinite(loss):
            if average.steps >= WARM_UP and average.deviation(loss) > self._sigma:
                average.spikes += 1
                self._report(state, loss)
                loss = average.mean + self._sigma * math.sqrt(average.variance)
            average.add(loss)
        state.carried["spikes"] = asdict(average)
        if state.record is not None:
            state.record["loss/spikes"] = average.spikes

    def _report(self, state: RunState, loss: float) -> None:
        expected, sigma = self._average.mean, self._average.deviation(loss)
        samples = [state.first_sample, state.next_sample]
        logging.getLogger(__name__).warning(
            "loss spike at step %d: %.4f, expected %.4f, %.1f standard deviations above. To skip its samples, "
            "roll back and set data.skip_samples=[%s]",
            state.step,
            loss,
            expected,
            sigma,
            samples,
        )
        if self._path is not None:
            spike = {"step": state.step, "loss": loss, "expected": expected, "sigma": sigma, "samples": samples}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(spike) + "\n")
