"""Online choice of whole sequences: many candidates are scored cheaply, and each rank trains on the best of its own.

Each rank chooses among its own candidates only. So all ranks run the same number of forwards and backwards, as ZeRO-3
requires (RHO-LOSS, Mindermann et al. 2022, applied to sequences).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.errors import agreed
from megatron_slm.reference.references import Reference
from megatron_slm.selection.rule import Rule
from megatron_slm.signals import columns_of, named_signals
from megatron_slm.training.objective import competing_tokens
from megatron_slm.types import Batch, TokenSignals


class MicroBatch(NamedTuple):
    """A micro-batch of this rank to train on, and the reference's columns for it; no columns without a reference."""

    batch: Batch
    reference: TokenSignals


class Candidates:
    """Keeps the best sequences of each micro-batch of this rank, by their mean score over competing tokens.

    Args:
        student: returns the student's columns, without gradients.
        rule: whose score ranks the sequences.
        micro_batch_size: sequences to keep of each micro-batch.
        seed: of the column `uniform`.
        min_context: see `competing_tokens`.
    """

    def __init__(self, student: Reference, rule: Rule, micro_batch_size: int, seed: int, min_context: int = 0) -> None:
        self._student = student
        self._rule = rule
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._min_context = min_context

    def choose(self, batches: list[Batch], reference: Reference) -> list[MicroBatch]:
        """Score all micro-batches of the step and keep the best of each; every rank passes the same number.

        Args:
            batches: candidates of this rank, several times the micro-batch size each.
            reference: runs once on all of them.

        Raises:
            AgreedError: a score returned something other than a score for each token.
        """
        reference_columns = reference.signals(batches, columns_of("reference", self._rule.needs))
        student_columns = self._student.signals(batches, columns_of("student", self._rule.needs))
        chosen = []
        for batch, of_reference, of_student in zip(batches, reference_columns, student_columns, strict=True):
            row_N = self._best(batch, of_student, of_reference)
            kept_columns = {name: column[row_N] for name, column in of_reference.items()}
            chosen.append(MicroBatch(batch.pick(row_N), kept_columns))
        return chosen

    def _best(self, batch: Batch, student: TokenSignals, reference: TokenSignals) -> Tensor:
        signals = named_signals(batch, student, reference, self._seed)
        competing_BT = competing_tokens(batch, self._min_context)
        score_B = agreed(lambda: self._rule.rank_sequences(signals, competing_BT))
        return best_rows(score_B, self._micro_batch_size)


def best_rows(score_B: Tensor, count: int) -> Tensor:
    """Return the rows of the highest scores, in their order; ties go to the earlier row, and NaN ranks last.

    Returns:
        int64 `[count]`.
    """
    order_B = score_B.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(descending=True, stable=True).indices
    # A second stable sort puts NaN behind -inf, which the first one cannot tell apart.
    order_B = order_B[score_B[order_B].isnan().long().sort(stable=True).indices]
    return order_B[:count].sort().values
