"""A score of a user's own that kills its process once, inside an accumulation."""

import os
import signal
from pathlib import Path

from torch import Tensor

from megatron_slm import score


@score(needs=("student.loss", "reference.loss"))
def excess_until_killed(signals: dict[str, Tensor]) -> Tensor:
    """Excess loss; the call number that DEADLY_CALL names is this process's last, unless DEADLY_MARK exists."""
    mark, calls = Path(os.environ["DEADLY_MARK"]), Path(f"{os.environ['DEADLY_MARK']}.calls-{os.getpid()}")
    calls.open("a").write(".")
    if not mark.exists() and calls.stat().st_size == int(os.environ["DEADLY_CALL"]):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return signals["student.loss"] - signals["reference.loss"]
