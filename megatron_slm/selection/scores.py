"""The scores that tokens are ranked by. A score is a function in this file or in a module of the user."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from megatron_slm.errors import UserError


class Score(Protocol):
    """A function from signals (float32 `[B, T]` columns by name) to float `[B, T]` scores; the highest are selected."""

    needs: tuple[str, ...]

    def __call__(self, signals: dict[str, Tensor]) -> Tensor: ...


def score(*, needs: tuple[str, ...]) -> Callable[[Callable[[dict[str, Tensor]], Tensor]], Score]:
    """Mark a function as a score, with the signals that it reads.

    Args:
        needs: names of signals, such as `student.loss`, `reference.loss`, `student.entropy`, `uniform`.
    """

    def mark(function: Callable[[dict[str, Tensor]], Tensor]) -> Score:
        marked = cast(Score, function)
        marked.needs = needs
        return marked

    return mark


def find_score(name: str, setting: str = "selection.score") -> Score:
    """Return the score with this name: a function in this file, or `package.module:function`.

    Args:
        name: name of the score.
        setting: the setting that names it, for error messages.

    Raises:
        UserError: the score does not exist, cannot be imported, or is not marked as a score.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name:
        if name not in built_in_scores():
            known = ", ".join(built_in_scores())
            raise UserError(setting, name, "there is no such score", f"Use one of {known}, or package.module:function")
        module_name, function_name = __name__, name
    try:
        found = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            setting,
            name,
            f"it cannot be imported ({error})",
            "Put its package on PYTHONPATH and check the spelling",
        ) from error
    if not hasattr(found, "needs"):
        raise UserError(setting, name, "the function is not marked as a score", "Write @score(needs=(...)) above it")
    return cast(Score, found)


def call_score(score: Score, signals: dict[str, Tensor], valid: Tensor, setting: str = "selection.score") -> Tensor:
    """Return the score of each token, from the signals that the score needs.

    Args:
        score: a score.
        signals: columns by name, of the shape of `valid`.
        valid: bool.
        setting: the setting that names the score, for error messages.

    Raises:
        UserError: the score reads a signal that it does not declare, or returns something other than a float tensor in
            the shape of `valid`.
    """
    name = getattr(score, "__name__", "?")
    try:
        found = score({signal: signals[signal] for signal in score.needs})
    except KeyError as error:
        raise UserError(
            setting, name, f"it reads {error}, which its @score(needs=...) does not name", "Add the signal there"
        ) from error
    if isinstance(found, Tensor) and found.shape == valid.shape and found.is_floating_point():
        return found
    returned = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise UserError(
        setting,
        name,
        f"it returned {returned} instead of a score for every token",
        f"Return a float tensor {list(valid.shape)}",
    )


def built_in_scores() -> list[str]:
    """Return the names of the scores that come with this package."""
    return sorted(name for name, value in globals().items() if hasattr(value, "needs"))


@score(needs=("student.loss", "reference.loss"))
def excess(signals: dict[str, Tensor]) -> Tensor:
    """Return the excess loss (Rho-1, section 2.2, equation 3).

    It is high where the student has yet to learn what the reference has learned. It rises with the student's loss and
    falls with the reference's.
    """
    return signals["student.loss"] - signals["reference.loss"]


@score(needs=("student.loss", "reference.loss"))
def loss_drop(signals: dict[str, Tensor]) -> Tensor:
    """Return the retrospective excess loss: the drop of the student's loss so far (ssToken, arXiv 2510.18250).

    The reference is the history model: the student's starting point, or an earlier checkpoint. It rises with the
    reference's loss and falls with the student's, the opposite of `excess`.
    """
    return signals["reference.loss"] - signals["student.loss"]


@score(needs=("uniform",))
def random(signals: dict[str, Tensor]) -> Tensor:
    """Return a random score, the same on any number of ranks: the control for training on fewer tokens.

    It rises with the token's random number.
    """
    return signals["uniform"]


@score(needs=("reference.entropy",))
def reference_entropy(signals: dict[str, Tensor]) -> Tensor:
    """Return a score that is high where the reference is certain (Rho-1, NeurIPS version, section 3.4).

    It falls with the entropy of the reference's prediction.
    """
    return -signals["reference.entropy"]


@score(needs=("reference.loss",))
def reference_loss(signals: dict[str, Tensor]) -> Tensor:
    """Return a score that is high where the reference's loss is low (Rho-1, NeurIPS version, section 3.4).

    It falls with the reference's loss.
    """
    return -signals["reference.loss"]


@score(needs=("student.entropy",))
def student_entropy(signals: dict[str, Tensor]) -> Tensor:
    """Return a score that is high where the student is uncertain (ESLM, arXiv 2505.19893), without a reference.

    It rises with the entropy of the student's prediction.
    """
    return signals["student.entropy"]


@score(needs=("student.loss",))
def student_loss(signals: dict[str, Tensor]) -> Tensor:
    """Return the student's loss, which is high for hard tokens and noise (ESLM, arXiv 2505.19893), without a reference.

    It rises with the student's loss.
    """
    return signals["student.loss"]


def token_uniform(seed: int, sample_index_B: Tensor, length: int) -> Tensor:
    """Return uniform random numbers in (0, 1), hashed from seed, sample index and position.

    Args:
        seed: the run's seed.
        sample_index_B: int64, ordinals of the samples in the run's order.
        length: positions per sample, T.

    Returns:
        float32 `[B, T]`, the same for a sample in any micro-batch on any rank. The numbers have 23 bits, so 0 and 1
        cannot occur.
    """
    position_T = torch.arange(length, device=sample_index_B.device)
    key_B = _mix(sample_index_B.long() + _mix(torch.tensor(seed, device=sample_index_B.device)))
    bits_BT = _mix(key_B[:, None] ^ _mix(position_T + 1)) >> 41
    return ((bits_BT & 0x7FFFFF).double() + 0.5).div(1 << 23).float()


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 (Steele, Lea, Flood 2014), in wrapping int64 arithmetic."""
    x = x + _int64(0x9E3779B97F4A7C15)
    x = (x ^ _logical_shift(x, 30)) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ _logical_shift(x, 27)) * _int64(0x94D049BB133111EB)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _int64(unsigned: int) -> int:
    return unsigned - (1 << 64)
