"""Online selection of whole sequences: score many candidates without gradients, and train on the best.

This is RHO-LOSS (Mindermann et al. 2022), applied to sequences. Each rank chooses among its own candidates only, so
that all ranks run the same number of forwards and backwards, as ZeRO-3 requires.
"""

from typing import NamedTuple

from torch import Tensor

from megatron_slm.errors import agreed
from megatron_slm.reference.references import Reference
from megatron_slm.selection.rule import Rule
from megatron_slm.selection.threshold import order_key
from megatron_slm.signals import columns_of, named_signals
from megatron_slm.training.objective import competing_tokens
from megatron_slm.types import Batch, TokenSignals


class MicroBatch(NamedTuple):
    """A micro-batch of this rank to train on, and the reference's columns for it (none without a reference)."""

    batch: Batch
    reference: TokenSignals


class Candidates:
    """Keeps the best sequences of each micro-batch of this rank, by their mean score over competing tokens.

    Args:
        student: scores batches with the student, without gradients.
        rule: its score ranks the sequences.
        micro_batch_size: number of sequences to keep of each micro-batch.
        seed: the run's, for the signal `uniform`.
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
            reference: runs once, on all candidates.

        Raises:
            AgreedError: the score function did not return one score per token.
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
    """Return the rows with the highest scores in ascending order, int64 `[count]`; ties go to the earlier row."""
    # `order_key` ranks NaN below -inf, so a sequence without a score is chosen last.
    order_B = order_key(score_B).argsort(descending=True, stable=True)
    return order_B[:count].sort().values
