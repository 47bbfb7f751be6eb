from torch import Tensor

from megatron_slm.selection.scoring import score


@score(needs=("uniform",))
def random(signals: dict[str, Tensor]) -> Tensor:
    """A random choice that is the same at any number of ranks: the control for 'fewer tokens'.

    Rises with the token's random number.
    """
    return signals["uniform"]
