"""Selection and quality: losses on a fixed selection, and how they relate to downstream losses (Figures 6, 7, 9)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_slm.analysis.comparison import configuration_differences
from megatron_slm.analysis.runs import RunFiles
from megatron_slm.analysis.selections import recorded

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 1000
SEED = 0
"""Of the bootstrap."""


class Split(NamedTuple):
    """The mean losses of one run at its S recorded steps, on tokens that a fixed selection holds or leaves out."""

    steps: list[int]
    selected_S: list[float]
    unselected_S: list[float]


def selected_losses(run: RunFiles, mask_N: "NDArray[np.bool_]") -> Split:
    """Return the losses of a run on a fixed selection of the observed tokens (Figure 6, a and c)."""
    assert run.observed is not None
    loss_SN = run.observed.loss_SN
    selected_S, unselected_S = (loss_SN[:, mask].mean(1, dtype=np.float64) for mask in (mask_N, ~mask_N))
    return Split(run.observed.steps, selected_S.tolist(), unselected_S.tolist())


def common_selection(runs: Sequence[RunFiles]) -> tuple[RunFiles, int, "NDArray[np.bool_]"] | None:
    """Return the last selection of the first selective run, with the run and the step; None if there is none."""
    for run in runs:
        if run.observed is not None:
            selections = recorded(run.observed)
            if selections.steps:
                return run, selections.steps[-1], selections.mask_KN[-1]
    return None


@dataclass(frozen=True)
class Fit:
    """A fit of `quality = log(a * loss + c)` (Rho-1, appendix D).

    a, c           coefficients
    a_low, a_high  95 % interval of a, from a bootstrap over the points
    r_squared      share of the variance of `quality` that the fit explains
    """

    a: float
    c: float
    a_low: float
    a_high: float
    r_squared: float

    def curve(self, loss_P: "NDArray[np.float64]") -> "NDArray[np.float64]":
        """Return the fitted quality; NaN where the logarithm is not defined."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.log(self.a * loss_P + self.c))


def fit_quality(loss_P: "NDArray[np.float64]", quality_P: "NDArray[np.float64]") -> Fit | None:
    """Fit the exponential of the quality by least squares, in which the formula is a line; None below four points.

    Args:
        loss_P: mean losses on selected, or on unselected tokens.
        quality_P: downstream results of the same steps.
    """
    if len(loss_P) < 4 or np.ptp(loss_P) == 0:
        return None
    exponential_P = np.exp(quality_P)
    a, c = np.polyfit(loss_P, exponential_P, 1)
    random = np.random.default_rng(SEED)
    slopes = []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, len(loss_P), len(loss_P))
        if np.ptp(loss_P[drawn]) > 0:
            slopes.append(np.polyfit(loss_P[drawn], exponential_P[drawn], 1)[0])
    low, high = np.quantile(slopes, (0.025, 0.975))
    fitted = Fit(float(a), float(c), float(low), float(high), 0.0)
    residual_P = quality_P - fitted.curve(loss_P)
    r_squared = 1 - float(np.nansum(residual_P**2)) / float(((quality_P - quality_P.mean()) ** 2).sum() or 1.0)
    return dataclasses.replace(fitted, r_squared=r_squared)


def ratio_sweeps(runs: Sequence[RunFiles]) -> list[list[RunFiles]]:
    """Return the groups of two or more selective runs that differ in selection.ratio alone, by rising ratio."""
    left = [run for run in runs if run.config.objective == "slm" and not run.config.selection.of]
    groups = []
    while left:
        first = left[0]
        group = [run for run in left if run is first or _differ_in_ratio_alone(first, run)]
        left = [run for run in left if run not in group]
        if len(group) > 1:
            groups.append(sorted(group, key=lambda run: run.config.selection.ratio))
    return groups


def _differ_in_ratio_alone(one: RunFiles, other: RunFiles) -> bool:
    return {name for name, _ in configuration_differences([one, other])} == {"selection.ratio"}
