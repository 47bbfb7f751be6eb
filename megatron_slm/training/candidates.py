"""Online choice of whole sequences: many candidates are scored cheaply, and each rank trains on the best of its own.

That no rank waits for another's candidates keeps ranks equal under ZeRO-3: each runs as many forwards and
backwards as the others (RHO-LOSS, Mindermann et al. 2022, on sequences).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.errors import AgreedError
from megatron_slm.selection.rule import Rule
from megatron_slm.signals.live import Reference
from megatron_slm.training.objective import competing_tokens, named_signals, wanted
from megatron_slm.types import Batch, TokenSignals


class Chosen(NamedTuple):
    """What is left of a step's micro-batches, and what the reference says of it."""

    batches: list[Batch]
    reference: list[TokenSignals]


class Candidates:
    """Keeps the best sequences of each micro-batch of this rank, by their mean score over competing tokens.

    Args:
        student: its scores without gradients.
        rule: whose score ranks them.
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

    def choose(self, batches: list[Batch], reference: Reference) -> Chosen:
        """Score all micro-batches of the step, then keep; every rank calls it with as many.

        Args:
            batches: candidates of this rank, several times the micro-batch size each.
            reference: asked for its signals once.

        Raises:
            AgreedError: a score returned something else than a score for each token.
        """
        columns = reference.take(batches, wanted(self._rule.needs, "reference."))
        scored = self._student.take(batches, wanted(self._rule.needs, "student."))
        rows = [self._best(*of_one) for of_one in zip(batches, scored, columns, strict=True)]
        return Chosen(
            [batch.pick(row_N) for batch, row_N in zip(batches, rows, strict=True)],
            [
                {name: column[row_N] for name, column in of_one.items()}
                for of_one, row_N in zip(columns, rows, strict=True)
            ],
        )

    def _best(self, batch: Batch, student: TokenSignals, reference: TokenSignals) -> Tensor:
        signals = named_signals(batch, student, reference, self._seed)
        try:
            score_B = self._rule.rank_sequences(signals, competing_tokens(batch, self._min_context))
        except ValueError as error:  # a score of the user's, on every rank
            raise AgreedError(str(error)) from error
        return best_rows(score_B, self._micro_batch_size)


def best_rows(score_B: Tensor, count: int) -> Tensor:
    """int64 `[count]`: rows of the highest scores, in their order; ties go to the earlier, and NaN is below all."""
    order_B = score_B.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(descending=True, stable=True).indices
    order_B = order_B[score_B[order_B].isnan().long().sort(stable=True).indices]
    return order_B[:count].sort().values
