"""The signals that scores rank tokens by, and their encoding in a store.

A *column* is a value per token that a model's head computes, such as `loss`. Each column is a signal of the student and
one of the reference, such as `student.loss`. Other signals are functions of the batch alone. To add a signal, declare
it here.

Suffixes: B sequences, T positions, C tokens in one chunk, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_slm.selection.scores import token_uniform
from megatron_slm.types import Batch, TokenSignals


@dataclass(frozen=True)
class Column:
    """A value per token, in nats and never negative, that a model's head computes.

    compute             returns float `[C]` from the log-probabilities `[C, V]` and the labels, int64 `[C, 1]`
    is_log_probability  True for minus the log-probability of the label, so that references can mix probabilities
    stored_if           flag in the group `score` that adds the column to a store; "" for every store, None for no store
    """

    compute: Callable[[Tensor, Tensor], Tensor]
    is_log_probability: bool = False
    stored_if: str | None = None


def _cross_entropy(logprobs_CV: Tensor, labels_C1: Tensor) -> Tensor:
    return -logprobs_CV.gather(-1, labels_C1).squeeze(-1)


def _entropy(logprobs_CV: Tensor, labels_C1: Tensor) -> Tensor:
    return -(logprobs_CV.exp() * logprobs_CV).sum(-1)


COLUMNS = {
    "loss": Column(_cross_entropy, is_log_probability=True, stored_if=""),
    "entropy": Column(_entropy, stored_if="entropy"),
}
"""Columns by name. A head always computes `loss`, the only one with a gradient, and the others on demand."""

MODELS = ("student", "reference")
"""The models whose columns are signals."""

BATCH_SIGNALS: dict[str, Callable[[Batch, int], Tensor]] = {
    "uniform": lambda batch, seed: token_uniform(seed, batch.sample_index_B, batch.tokens_BT.shape[1]),
}
"""Signals that need no model, by name: float32 `[B, T]` from a batch and the run's seed."""

SIGNALS = (*(f"{model}.{column}" for model in MODELS for column in COLUMNS), *BATCH_SIGNALS)
"""Names that a score may list in its `needs`."""


def columns_of(model: str, needs: Iterable[str]) -> tuple[str, ...]:
    """Return the columns beside `loss` that the signals in `needs` require of `student` or `reference`."""
    names = (name.removeprefix(f"{model}.") for name in needs if name.startswith(f"{model}."))
    return tuple(name for name in names if name != "loss")


def named_signals(batch: Batch, student: TokenSignals, reference: TokenSignals, seed: int) -> TokenSignals:
    """Return all signals of a batch by name, from the columns of the student and of the reference."""
    return (
        {f"student.{name}": column for name, column in student.items()}
        | {f"reference.{name}": column for name, column in reference.items()}
        | {name: compute(batch, seed) for name, compute in BATCH_SIGNALS.items()}
    )


def column_flags() -> list[str]:
    """Return the flags in the group `score` that add columns to a store."""
    return [column.stored_if for column in COLUMNS.values() if column.stored_if]


def stored_columns(settings: object) -> list[str]:
    """Return the columns that a store holds, in order.

    Args:
        settings: the group `score`, with the flags in `Column.stored_if`.
    """
    flags = {name: column.stored_if for name, column in COLUMNS.items() if column.stored_if is not None}
    return [name for name, flag in flags.items() if not flag or getattr(settings, flag)]


STEP = 2.0**-11
"""Difference in nats between adjacent codes of `fixed16`."""


@dataclass(frozen=True)
class StoreEncoding:
    """An encoding of the columns of a store.

    dtype      dtype of the codes, little-endian
    largest    largest value in nats; values above it are clipped
    max_error  largest error of a value up to `largest`, in nats
    """

    dtype: str
    largest: float
    max_error: float


ENCODINGS = {
    # Equal steps, because selection ranks differences of losses. float16 is off by up to 0.002 nats at a loss of 5.
    "fixed16": StoreEncoding("<u2", 65535 * STEP, STEP / 2),
    "float32": StoreEncoding("<f4", float(np.finfo(np.float32).max), 0.0),
}
"""Encodings by their name in the manifest of a store. All columns of a store have the same one."""


def encode(values: NDArray[np.float32], encoding: str) -> NDArray[np.generic]:
    """Return the codes of finite values, in nats and of any shape. `fixed16` writes negative round-off as zero."""
    kind = ENCODINGS[encoding]
    if encoding == "float32":
        return values.astype(kind.dtype)
    return np.rint(values.clip(0.0, kind.largest) / STEP).astype(kind.dtype)


def decode(codes: NDArray[np.generic], encoding: str) -> NDArray[np.float32]:
    """Return the values of codes, float32."""
    values = codes.astype(np.float32)
    return values if encoding == "float32" else values * np.float32(STEP)
