"""Losses and selection of a logged step, over all ranks."""

import json
import logging
import math
import time
from pathlib import Path
from typing import IO

from megatron_slm.training.cost import ModelFlops, step_flops, student_tokens
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult
from megatron_slm.training.trainer import Callback


class StepMetrics(Callback):
    """Fills the record with what the step's sums say.

    Args:
        sources: names of the blend's entries.
        selective: report what exists only where tokens are selected.
        quantiles: of the excess loss; none where there never is a reference.
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
        sums = result.statistics.reduce()
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
        if result.statistics.has_router:
            state.record["loss/router"] = result.statistics.router_loss()
        if self._selective:
            state.record |= self._selection(state, result, sums)
            self._warn(result.statistics.num_nan)

    def _selection(self, state: RunState, result: StepResult, sums: dict[str, float]) -> dict[str, float | None]:
        unselected = sums["valid"] - sums["selected"]
        statistics = result.statistics
        quantiles: list[float] | list[None] = [None] * len(self._quantiles)
        if statistics.has_reference:
            quantiles = statistics.excess_quantiles(self._quantiles, round(sums["competing"]))
        return {
            "consumed_selected_tokens": state.consumed_selected_tokens,
            "loss/selected": ratio(sums["selected_loss"], sums["selected"]),
            "loss/unselected": ratio(sums["loss"] - sums["selected_loss"], unselected),
            "loss/reference": ratio(sums["reference_loss"], sums["valid"]) if statistics.has_reference else None,
            "selection/threshold": ratio(sums["threshold"], sums["thresholds"]),
            "selection/ratio": ratio(sums["selected"], sums["valid"]),
            "selection/nan": statistics.num_nan,
            **self._excluded(sums),
            **{
                f"selection/ratio/{name}": ratio(sums[f"selected/{source}"], sums[f"valid/{source}"])
                for source, name in enumerate(self._sources)
            },
            **{f"excess/q{q * 100:02.0f}": v for q, v in zip(self._quantiles, quantiles, strict=True)},
        }

    def _excluded(self, sums: dict[str, float]) -> dict[str, float | None]:
        if not self._min_context:
            return {}
        return {"selection/short_context": ratio(sums["valid"] - sums["competing"], sums["valid"])}

    def _warn(self, without_score: int) -> None:
        """Once: such tokens are kept last, so a run goes on with a few of them."""
        if without_score and not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                "selection.score is NaN for %d tokens of this step, which are kept last: look at the score, and at "
                "selection/nan in the records.",
                without_score,
            )


def ratio(part: float, whole: float) -> float | None:
    """None where it is not defined."""
    return part / whole if whole else None


class Throughput(Callback):
    """Mean over the steps since the last record; evaluation and checkpoints are not counted.

    Args:
        models: FLOPs a token; forwards of the reference, and of the student to score alone, are in the hardware's
            share, not in the MFU.
        peak_flops: of all devices together, FLOP/s; None if not known, then the shares are null.
    """

    def __init__(self, models: ModelFlops, peak_flops: float | None) -> None:
        self._models = models
        self._peak_flops = peak_flops
        self._started = 0.0
        self._seconds = self._flops = 0.0
        self._steps = 0

    def on_train_start(self, state: RunState) -> None:
        if self._peak_flops is None:
            return
        logging.getLogger(__name__).info(
            "FLOPs a token: student %.3g, reference %.3g; peak of all devices: %.0f TFLOP/s (dense)",
            self._models.student.training,
            self._models.reference,
            self._peak_flops / 1e12,
        )

    def on_step_start(self, state: RunState) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        self._seconds += time.perf_counter() - self._started
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
"""Of what is carried through checkpoints."""


class Accounting(Callback):
    """Adds up every step, over all ranks and all models, on every rank alike.

    Args:
        models: FLOPs a token of each.
    """

    def __init__(self, models: ModelFlops) -> None:
        self._models = models

    def on_train_start(self, state: RunState) -> None:
        # What a run from before this was counted has cost, nobody knows.
        before = math.nan if state.step else 0
        state.carried.setdefault(NAME, {"scored_tokens": before, "flops": before})

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        spent = state.carried[NAME]
        spent["scored_tokens"] += student_tokens(result.tokens, self._models.backward).scored
        spent["flops"] += step_flops(self._models, result.tokens)
        if state.record is not None:
            state.record |= {"trained_tokens": state.trained_tokens, **spent}


class JsonLines(Callback):
    """Appends on rank 0; a record has left this process before the next step begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def on_train_start(self, state: RunState) -> None:
        self._file = self._path.open("a", encoding="utf-8")

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.record is not None and self._file is not None:
            self._file.write(json.dumps(finite(state.record)) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def finite(record: dict[str, float | int | None]) -> dict[str, float | int | None]:
    """JSON knows no NaN and no infinity: null."""
    return {key: value if value is None or abs(value) < float("inf") else None for key, value in record.items()}
