"""How the excess loss is spread: the picture behind the threshold."""

from typing import TYPE_CHECKING

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class ExcessHistogram(Callback):
    """Counts the excess loss of the step's tokens over all ranks, and shows it in TensorBoard.

    Args:
        interval: steps between histograms.
        writer: of the run's event files; None on the ranks that write nothing.
    """

    def __init__(self, interval: int, writer: "SummaryWriter | None") -> None:
        self._interval = interval
        self._writer = writer

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if not state.is_due(self._interval) or not result.statistics.has_reference:
            return
        histogram = result.statistics.excess_histogram()
        if self._writer is not None and histogram.counts:
            self._writer.add_histogram_raw(
                "excess/distribution",
                min=histogram.edges[0],
                max=histogram.edges[-1],
                num=sum(histogram.counts),
                sum=histogram.total,
                sum_squares=histogram.squares,
                bucket_limits=histogram.edges[1:],
                bucket_counts=histogram.counts,
                global_step=state.step,
            )
