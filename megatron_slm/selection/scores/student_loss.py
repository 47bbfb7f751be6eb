from torch import Tensor

from megatron_slm.selection.scoring import score


@score(needs=("student.loss",))
def student_loss(signals: dict[str, Tensor]) -> Tensor:
    """The student's own loss: hard tokens first, noise included (ESLM, arXiv 2505.19893). Needs no reference.

    Rises with the student's loss.
    """
    return signals["student.loss"]
