"""The references that the step reads: a frozen model, a store of its losses, several of them mixed, or none."""

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.reference.store import ScoreFile
from megatron_slm.types import Batch, TokenSignals


class Reference(Protocol):
    """A source of reference signals."""

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        """Return the reference's columns for this rank's micro-batches of the step.

        Every rank calls it with the same number of sequences, because a sharded model needs all ranks in each forward.

        Args:
            batches: micro-batches of this rank.
            want: columns in addition to `loss`, such as `entropy`.

        Returns:
            For each micro-batch, float32 `[B, T]` columns by name, in nats; 0 where `valid_BT` is False.
        """


class NoReference:
    """The reference of a run that needs none: plain training, or a score that only the student computes."""

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        return [{} for _ in batches]


class LiveReference:
    """A frozen model that scores the micro-batches of the step, in batches of its own size.

    Args:
        engine: a `CausalLM` from `Backend.frozen_engine`, replicated or sharded.
        micro_batch_size: sequences per forward.
    """

    def __init__(self, engine: nn.Module, micro_batch_size: int) -> None:
        self.engine = engine
        self._micro_batch_size = micro_batch_size

    @torch.no_grad()
    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        step = Batch.concatenate(batches)
        total = len(step.tokens_BT)
        parts = [
            score_batch(self.engine, step.rows(start, min(start + self._micro_batch_size, total)), want)
            for start in range(0, total, self._micro_batch_size)
        ]
        sizes = [len(batch.tokens_BT) for batch in batches]
        columns = {name: torch.cat([part[name] for part in parts]).split(sizes) for name in parts[0]}
        return [{name: column[index] for name, column in columns.items()} for index in range(len(batches))]


Mix = Literal["mean", "minimum", "log_mixture"]


class MixedReference:
    """Several references, mixed into one column per signal.

    mean          weighted mean of a column; for losses, this takes the geometric mean of the probabilities
    minimum       lowest loss, that is, the highest probability that any reference gives the token
    log_mixture   -log of the weighted mean of the probabilities

    Args:
        parts: the references.
        weights: one weight above 0 per reference; only their proportions matter.
        mix: the formula.
    """

    def __init__(self, parts: list[Reference], weights: list[float], mix: Mix) -> None:
        self.parts = parts
        self._weights = torch.tensor(weights) / sum(weights)
        self._mix = mix

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        by_part = [part.signals(batches, want) for part in self.parts]
        return [
            {name: self._mixed(torch.stack([columns[name] for columns in of_batch])) for name in of_batch[0]}
            for of_batch in zip(*by_part, strict=True)
        ]

    def _mixed(self, column_PBT: Tensor) -> Tensor:
        """Mix the values of P references, float32 `[P, B, T]`."""
        weight_P11 = self._weights.to(column_PBT.device)[:, None, None]
        if self._mix == "minimum":
            return column_PBT.amin(0)
        if self._mix == "log_mixture":
            # -log sum_p w_p exp(-loss_p), without underflow of the probabilities.
            return -(weight_P11.log() - column_PBT).logsumexp(0)
        return (weight_P11 * column_PBT).sum(0)


def live_modules(reference: Reference) -> list[nn.Module]:
    """Return the engines of the frozen models that a reference runs; none for a store."""
    if isinstance(reference, MixedReference):
        return [module for part in reference.parts for module in live_modules(part)]
    return [reference.engine] if isinstance(reference, LiveReference) else []


class StoredReference:
    """A reference that reads its columns from a store.

    Args:
        files: one file per corpus of the blend for a `document` store; the only file of a `packed` store.
        columns: the store's columns, in their order in a row.
        packed: number rows by sample and position, not by offset in the corpus.
    """

    def __init__(self, files: list[ScoreFile], columns: list[str], packed: bool) -> None:
        self._files = files
        self._columns = columns
        self._packed = packed

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        return [self._read(batch, ("loss", *want)) for batch in batches]

    def _read(self, batch: Batch, names: tuple[str, ...]) -> TokenSignals:
        position_BT = batch.token_position_BT if self._packed else batch.label_offset_BT
        row_BT, valid_BT = position_BT.cpu().numpy(), batch.valid_BT.cpu().numpy()
        value_BTC = np.zeros((*row_BT.shape, len(self._columns)), dtype=np.float32)
        for index, source in enumerate(batch.source_B.tolist()):
            file = self._files[0 if self._packed else source]
            row_N = row_BT[index, valid_BT[index]]
            if row_N.max(initial=-1) >= file.rows:
                reason = f"it ends after {file.rows} tokens, and the run needs more"
                raise UserError("reference.store", file.path.parent, reason, "Score all samples of the run")
            value_BTC[index, valid_BT[index]] = file.read(row_N)
        value = torch.from_numpy(value_BTC).to(batch.tokens_BT.device, non_blocking=True)
        return {name: value[..., self._columns.index(name)].contiguous() for name in names}
