from dataclasses import dataclass
from typing import Literal


@dataclass
class SelectionSettings:
    """Which tokens count.

    score      excess, student_loss, reference_loss, random, or package.module:function [; the paper, equation 3]
    ratio      share of the valid tokens that is kept; the paper keeps 0.6 to 0.7 [share; the paper's k %]
    scope      ranked together: all ranks, each rank alone, or each sequence alone [; ours]
    pool       ranked together: one micro-step of all ranks, or the whole optimizer step [; ours]
    backward   exact: gradients of the selected loss through every token [; the paper, equation 4]
    quantiles  of the excess loss that are logged [share; ours]
    """

    score: str = "excess"
    ratio: float = 0.6
    scope: Literal["global", "rank", "sequence"] = "global"
    pool: Literal["micro_step", "step"] = "micro_step"
    backward: Literal["exact"] = "exact"
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError("ratio is the share of tokens to keep: give a number above 0 and at most 1")
        if any(not 0 < q < 1 for q in self.quantiles):
            raise ValueError("quantiles must lie between 0 and 1")
