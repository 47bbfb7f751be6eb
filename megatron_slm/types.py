"""The data types that the parts of the package exchange.

Shape suffixes: B sequences, T positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

TokenSignals = dict[str, Tensor]
"""Signals of each token by name: float32 `[B, T]` columns such as `student.loss` and `reference.loss`.

A plain dict, because DeepSpeed's hooks search only tuples, lists and dicts for tensors.
"""

TokenWeights = dict[str, Tensor]
"""Weight of each token in the training loss: float32 `[B, T]` by loss column of the student, such as `loss`."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of this rank.

    tokens_BT        int64, model input
    labels_BT        int64, `labels_BT[b, t]` follows `tokens_BT[b, t]`
    valid_BT         bool, False if the label is padding or not part of an answer: it has no loss and is never selected
    position_ids_BT  int64, restarts at each document under `data.reset_attention`
    sample_index_B   int64, ordinal of the sample in the run's order
    source_B         int64, entry of the blend that the sample comes from
    label_offset_BT  int64, offset of each label in its source's `.bin`, in tokens; -1 for padding
    continued_B      int64, number of first tokens in `tokens_BT` whose document began before the sample
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    valid_BT: Tensor
    position_ids_BT: Tensor
    sample_index_B: Tensor
    source_B: Tensor
    label_offset_BT: Tensor
    continued_B: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def rows(self, start: int, stop: int) -> "Batch":
        """Return the sequences `start` to `stop - 1` as a batch."""
        return Batch(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def pick(self, row_N: Tensor) -> "Batch":
        """Return the sequences with these indices, int64 `[N]`, as a batch."""
        return Batch(*(getattr(self, field.name)[row_N] for field in fields(self)))

    @staticmethod
    def concatenate(batches: list["Batch"]) -> "Batch":
        """Return the sequences of all batches, in order, as one batch."""
        if len(batches) == 1:
            return batches[0]
        return Batch(*(torch.cat([getattr(b, field.name) for b in batches]) for field in fields(Batch)))

    def lacks_context_BT(self, min_context: int) -> Tensor:
        """Return the mask of the labels that lack context, bool `[B, T]`.

        A label lacks context if its document began before the sample and fewer than `min_context` tokens precede it in
        the sample.
        """
        # Label t is token t + 1 of the sample, so t + 1 tokens precede it.
        preceding_T = torch.arange(1, self.tokens_BT.shape[1] + 1, device=self.tokens_BT.device)
        return (preceding_T < self.continued_B[:, None]) & (preceding_T < min_context)

    @property
    def token_position_BT(self) -> Tensor:
        """`sample_index * T + t`, int64 `[B, T]`: unique over the run, and the same on any number of ranks."""
        length = self.tokens_BT.shape[1]
        return self.sample_index_B[:, None] * length + torch.arange(length, device=self.tokens_BT.device)
