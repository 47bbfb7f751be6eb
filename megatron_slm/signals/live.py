"""The reference as a frozen model that scores every micro-batch of the step."""

from typing import Protocol

import torch
from torch import nn

from megatron_slm.models.causal_lm import score_batch
from megatron_slm.types import Batch, TokenSignals


class Reference(Protocol):
    """Where reference signals come from."""

    def take(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        """Columns (`loss`, and those wanted) for each of this rank's micro-batches of the step."""


class NoReference:
    """For scores that need none, and for CLM."""

    def take(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        return [{} for _ in batches]


class LiveReference:
    """A frozen model, run over all micro-batches of the step in batches of its own size.

    Args:
        engine: a `CausalLM` from `Backend.frozen_engine`, replicated or sharded.
        micro_batch_size: sequences at a time.
    """

    def __init__(self, engine: nn.Module, micro_batch_size: int) -> None:
        self.engine = engine
        self._micro_batch_size = micro_batch_size

    @torch.no_grad()
    def take(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        everything = Batch.concatenate(batches)
        total = len(everything.tokens_BT)
        starts = range(0, total, self._micro_batch_size)
        parts = [
            score_batch(self.engine, everything.rows(start, min(start + self._micro_batch_size, total)), want)
            for start in starts
        ]
        sizes = [len(batch.tokens_BT) for batch in batches]
        columns = {name: torch.cat([part[name] for part in parts]).split(sizes) for name in parts[0]}
        return [{name: column[index] for name, column in columns.items()} for index in range(len(batches))]
