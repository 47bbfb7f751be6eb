"""Scores: what tokens are ranked by. Functions of this file, or of a module of yours."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor


class Score(Protocol):
    """A function from signals (float32 `[B, T]` columns by name) to a float `[B, T]` score; higher is kept."""

    needs: tuple[str, ...]

    def __call__(self, signals: dict[str, Tensor]) -> Tensor: ...


def score(*, needs: tuple[str, ...]) -> Callable[[Callable[[dict[str, Tensor]], Tensor]], Score]:
    """Mark a function as a score and say which signals it reads.

    Args:
        needs: names of columns, such as `student.loss`, `reference.loss`, `student.entropy`, `uniform`.
    """

    def mark(function: Callable[[dict[str, Tensor]], Tensor]) -> Score:
        marked = cast(Score, function)
        marked.needs = needs
        return marked

    return mark


def find_score(name: str) -> Score:
    """The score called `name`: a function of this file, or `package.module:function`.

    Raises:
        ValueError: a sentence with the known names, if there is no such score.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name:
        if name not in built_in_scores():
            known = ", ".join(built_in_scores())
            raise ValueError(f"selection.score is '{name}': use one of {known}, or package.module:function.")
        module_name, function_name = __name__, name
    try:
        found = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"selection.score is '{name}', which cannot be imported ({error}): "
            "put its package on PYTHONPATH and check the spelling."
        ) from error
    if not hasattr(found, "needs"):
        raise ValueError(f"selection.score is '{name}', a function without @score: write @score(needs=(...)) above it.")
    return cast(Score, found)


def call_score(score: Score, signals: dict[str, Tensor], valid: Tensor) -> Tensor:
    """What a score says of each token, from the signals that it needs.

    Raises:
        ValueError: it reads another signal, or does not return a float tensor of the shape of `valid`.
    """
    try:
        found = score({name: signals[name] for name in score.needs})
    except KeyError as error:
        raise ValueError(
            f"The score {getattr(score, '__name__', '?')} (selection.score) reads {error}, which its @score(needs=...) "
            "does not name: add it there."
        ) from error
    if isinstance(found, Tensor) and found.shape == valid.shape and found.is_floating_point():
        return found
    said = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    name = getattr(score, "__name__", "?")
    raise ValueError(
        f"The score {name} (selection.score) returned {said}: return a float tensor {list(valid.shape)}, a score for "
        "every token."
    )


def built_in_scores() -> list[str]:
    """Names of the scores that come with this package."""
    return sorted(name for name, value in globals().items() if hasattr(value, "needs"))


@score(needs=("student.loss", "reference.loss"))
def excess(signals: dict[str, Tensor]) -> Tensor:
    """Excess loss: what the student has yet to learn and the reference shows learnable (Rho-1, section 2.2).

    Rises with the student's loss, falls with the reference's.
    """
    return signals["student.loss"] - signals["reference.loss"]


@score(needs=("student.loss", "reference.loss"))
def loss_drop(signals: dict[str, Tensor]) -> Tensor:
    """Retrospective excess loss: what the student has learned since (ssToken, arXiv 2510.18250).

    The reference is the history model: the student's starting point, or an earlier checkpoint.
    Rises with the reference's loss, falls with the student's: the other way round than `excess`.
    """
    return signals["reference.loss"] - signals["student.loss"]


@score(needs=("uniform",))
def random(signals: dict[str, Tensor]) -> Tensor:
    """A random choice that is the same at any number of ranks: the control for 'fewer tokens'.

    Rises with the token's random number.
    """
    return signals["uniform"]


@score(needs=("reference.entropy",))
def reference_entropy(signals: dict[str, Tensor]) -> Tensor:
    """Where the reference is sure of what comes, whatever comes (Rho-1, NeurIPS version, section 3.4: self-reference).

    Falls with the entropy of the reference's prediction.
    """
    return -signals["reference.entropy"]


@score(needs=("reference.loss",))
def reference_loss(signals: dict[str, Tensor]) -> Tensor:
    """Low reference loss is kept (Rho-1, NeurIPS version, section 3.4: self-reference).

    Falls with the reference's loss.
    """
    return -signals["reference.loss"]


@score(needs=("student.entropy",))
def student_entropy(signals: dict[str, Tensor]) -> Tensor:
    """Where the student is unsure of what comes (ESLM, arXiv 2505.19893). Needs no reference.

    Rises with the entropy of the student's prediction.
    """
    return signals["student.entropy"]


@score(needs=("student.loss",))
def student_loss(signals: dict[str, Tensor]) -> Tensor:
    """The student's own loss: hard tokens first, noise included (ESLM, arXiv 2505.19893). Needs no reference.

    Rises with the student's loss.
    """
    return signals["student.loss"]


def token_uniform(seed: int, sample_index_B: Tensor, length: int) -> Tensor:
    """Uniform numbers in (0, 1) hashed from (seed, sample index, position).

    Args:
        seed: the run's seed.
        sample_index_B: int64, ordinals of the samples in the run's order.
        length: positions a sample, T.

    Returns:
        float32 `[B, T]`, the same whichever rank or micro-batch holds the sample. 23 bits, so
        that neither 0 nor 1 can occur.
    """
    position_T = torch.arange(length, device=sample_index_B.device)
    key_B = _mix(sample_index_B.long() + _mix(torch.tensor(seed, device=sample_index_B.device)))
    bits_BT = _mix(key_B[:, None] ^ _mix(position_T + 1)) >> 41
    return ((bits_BT & 0x7FFFFF).double() + 0.5).div(1 << 23).float()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), in wrapping int64 arithmetic."""
    x = x + _int64(0x9E3779B97F4A7C15)
    x = (x ^ _logical_shift(x, 30)) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ _logical_shift(x, 27)) * _int64(0x94D049BB133111EB)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _int64(unsigned: int) -> int:
    return unsigned - (1 << 64)
