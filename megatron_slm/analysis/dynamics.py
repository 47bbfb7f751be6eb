"""How the losses of single tokens change over training (Rho-1, section 2.1 and appendix D.1)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLASSES = ("H->H", "L->H", "H->L", "L->L")
"""The loss stays high, rises, falls, stays low."""
PAPER = {"TinyLlama-1.1B": (0.11, 0.12, 0.26, 0.51), "Mistral-7B": (0.08, 0.13, 0.28, 0.51)}
"""Shares of the classes in the paper, in the order of `CLASSES` (Figures 3 and 10)."""
CHANGE = 0.2
"""Nats by which a fitted loss must change to rise or fall; the paper's threshold."""


@dataclass(frozen=True)
class Dynamics:
    """The trends of N tokens over S steps.

    start_N, end_N  fitted loss at the first and at the last step: L_start and L_end of the paper
    spread_N        standard deviation of the losses around the fitted line
    class_N         int8, index in `CLASSES`
    learned_N       step at which the loss has passed half of its drop; NaN for tokens whose loss does not fall
    level           mean loss of all tokens at the last step: L_mean of the paper
    """

    start_N: "NDArray[np.float64]"
    end_N: "NDArray[np.float64]"
    spread_N: "NDArray[np.float64]"
    class_N: "NDArray[np.int8]"
    learned_N: "NDArray[np.float64]"
    level: float

    def shares(self) -> list[float]:
        """Return the share of each class."""
        counts = np.bincount(self.class_N, minlength=len(CLASSES))
        return [float(count) / max(len(self.class_N), 1) for count in counts]


def trends(steps: list[int], loss_SN: "NDArray[np.floating]", change: float = CHANGE) -> Dynamics:
    """Fit a line to the losses of each token, and classify the tokens by it.

    A fitted change of more than `change` is a rise (L->H) or a fall (H->L). All other tokens are L->L if their last
    loss, not the fitted one, is at most the mean loss of the last step, and H->H otherwise (appendix D.1).

    Args:
        steps: two or more, in ascending order. The fit uses their true distances; the paper's are equal.
        loss_SN: losses in nats.
        change: nats.
    """
    loss_SN = np.asarray(loss_SN, dtype=np.float64)
    x_S = (np.array(steps, dtype=np.float64) - steps[0]) / (steps[-1] - steps[0])
    centred_S = x_S - x_S.mean()
    mean_N = loss_SN.mean(0)
    slope_N = centred_S @ (loss_SN - mean_N) / (centred_S**2).sum()
    start_N = mean_N - slope_N * x_S.mean()
    spread_N = (loss_SN - start_N - slope_N * x_S[:, None]).std(0)
    level = float(loss_SN[-1].mean())
    steady_N = np.where(loss_SN[-1] <= level, CLASSES.index("L->L"), CLASSES.index("H->H"))
    moving_N = np.where(slope_N > 0, CLASSES.index("L->H"), CLASSES.index("H->L"))
    class_N = np.where(np.abs(slope_N) > change, moving_N, steady_N).astype(np.int8)
    learned_N = np.where(class_N == CLASSES.index("H->L"), _half_drop(steps, loss_SN), np.nan)
    return Dynamics(start_N, start_N + slope_N, spread_N, class_N, learned_N, level)


def _half_drop(steps: list[int], loss_SN: "NDArray[np.floating]") -> "NDArray[np.float64]":
    """Return the first step at which a loss is half-way from its first to its last value, interpolated; or NaN."""
    half_N = (loss_SN[0] + loss_SN[-1]) / 2
    below_SN = loss_SN <= half_N
    has_N = below_SN.any(0) & (loss_SN[-1] < loss_SN[0])
    after_N = np.maximum(below_SN.argmax(0), 1)
    columns = np.arange(loss_SN.shape[1])
    high_N, low_N = loss_SN[after_N - 1, columns], loss_SN[after_N, columns]
    with np.errstate(divide="ignore", invalid="ignore"):
        part_N = np.clip((high_N - half_N) / (high_N - low_N), 0.0, 1.0)
    step_S = np.array(steps, dtype=np.float64)
    found_N = step_S[after_N - 1] + part_N * (step_S[after_N] - step_S[after_N - 1])
    return np.where(has_N, found_N, np.nan)


def class_curves(dynamics: Dynamics, loss_SN: "NDArray[np.float32]") -> "NDArray[np.float64]":
    """Return the mean loss of each class at each step, `[4, S]`; NaN for an empty class (Figure 3)."""
    curves = np.full((len(CLASSES), len(loss_SN)), np.nan)
    for index in range(len(CLASSES)):
        of_class_N = dynamics.class_N == index
        if of_class_N.any():
            curves[index] = loss_SN[:, of_class_N].mean(1, dtype=np.float64)
    return curves


def most_fluctuating(dynamics: Dynamics, name: str, count: int) -> list[int]:
    """Return the rows of the tokens of a class whose losses spread most around their line, the widest first."""
    rows = np.flatnonzero(dynamics.class_N == CLASSES.index(name))
    return [int(row) for row in rows[np.argsort(-dynamics.spread_N[rows], kind="stable")[:count]]]
