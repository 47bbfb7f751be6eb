from torch import Tensor

from megatron_slm.selection.scoring import score


@score(needs=("student.loss",))
def student_loss(signals: dict[str, Tensor]) -> Tensor:
    """The student's own loss: hard tokens first, noise included. A control without a reference."""
    return signals["student.loss"]
