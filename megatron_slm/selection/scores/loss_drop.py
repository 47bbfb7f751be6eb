from torch import Tensor

from megatron_slm.selection.scoring import score


@score(needs=("student.loss", "reference.loss"))
def loss_drop(signals: dict[str, Tensor]) -> Tensor:
    """Retrospective excess loss: what the student has learned since (ssToken, arXiv 2510.18250).

    The reference is the history model: the student's starting point, or an earlier checkpoint.
    Rises with the reference's loss, falls with the student's: the other way round than `excess`.
    """
    return signals["reference.loss"] - signals["student.loss"]
