"""Losses and selection of a logged step, over all ranks."""

import logging

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


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
