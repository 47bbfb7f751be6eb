"""A score of a user's own that sends its process a signal once, inside an accumulation."""

import os
import signal
from pathlib import Path

from torch import Tensor

from megatron_slm import score


@score(needs=("student.loss", "reference.loss"))
def excess_until_killed(signals: dict[str, Tensor]) -> Tensor:
    """Excess loss; at the call number DEADLY_CALL of this process the signal is sent, unless DEADLY_MARK exists."""
    mark, calls = Path(os.environ["DEADLY_MARK"]), Path(f"{os.environ['DEADLY_MARK']}.calls-{os.getpid()}")
    calls.open("a").write(".")
    is_chosen = os.environ.get("DEADLY_RANK", os.environ["RANK"]) == os.environ["RANK"]
    if is_chosen and not mark.exists() and calls.stat().st_size == int(os.environ["DEADLY_CALL"]):
        mark.touch()
        os.kill(os.getpid(), signal.Signals[os.environ.get("DEADLY_SIGNAL", "SIGKILL")])
    return signals["student.loss"] - signals["reference.loss"]


@score(needs=("reference.entropy",))
def lowest_reference_entropy(signals: dict[str, Tensor]) -> Tensor:
    """Of what the reference is sure, first."""
    return -signals["reference.entropy"]


@score(needs=("student.loss",))
def one_for_all(signals: dict[str, Tensor]) -> Tensor:
    """A score that forgot that it is of each token."""
    return signals["student.loss"].sum()


@score(needs=("student.loss",))
def not_a_number(signals: dict[str, Tensor]) -> Tensor:
    """A score that is none."""
    return signals["student.loss"] * float("nan")


@score(needs=("student.loss",))
def reads_more_than_it_says(signals: dict[str, Tensor]) -> Tensor:
    """A score that forgot to name a signal."""
    return signals["student.loss"] - signals["reference.loss"]
