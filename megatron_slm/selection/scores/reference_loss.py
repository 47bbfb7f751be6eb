from torch import Tensor

from megatron_slm.selection.scoring import score


@score(needs=("reference.loss",))
def reference_loss(signals: dict[str, Tensor]) -> Tensor:
    """Low reference loss is kept (Rho-1, NeurIPS version, section 3.4: self-reference).

    Falls with the reference's loss.
    """
    return -signals["reference.loss"]
