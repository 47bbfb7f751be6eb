from torch import Tensor

from megatron_slm.selection.scoring import score


@score(needs=("student.entropy",))
def student_entropy(signals: dict[str, Tensor]) -> Tensor:
    """Where the student is unsure of what comes (ESLM, arXiv 2505.19893). Needs no reference.

    Rises with the entropy of the student's prediction.
    """
    return signals["student.entropy"]
