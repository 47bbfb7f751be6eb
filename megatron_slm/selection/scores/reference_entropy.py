from torch import Tensor

from megatron_slm.selection.scoring import score


@score(needs=("reference.entropy",))
def reference_entropy(signals: dict[str, Tensor]) -> Tensor:
    """Where the reference is sure of what comes, whatever comes (Rho-1, NeurIPS version, section 3.4: self-reference).

    Falls with the entropy of the reference's prediction.
    """
    return -signals["reference.entropy"]
