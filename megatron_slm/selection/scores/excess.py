from torch import Tensor

from megatron_slm.selection.scoring import score


@score(needs=("student.loss", "reference.loss"))
def excess(signals: dict[str, Tensor]) -> Tensor:
    """Excess loss: what the student has yet to learn and the reference shows learnable (Rho-1, section 2.2).

    Rises with the student's loss, falls with the reference's.
    """
    return signals["student.loss"] - signals["reference.loss"]
