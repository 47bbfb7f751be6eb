"""The reference as a frozen model that scores every micro-batch of the step."""

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.reference.store import ScoreFile
from megatron_slm.types import Batch, TokenSignals


class Reference(Protocol):
    """Where reference signals come from."""

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        """Columns (`loss`, and those wanted) for each of this rank's micro-batches of the step."""


class NoReference:
    """For scores that need none, and for CLM."""

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
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
    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
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


Mix = Literal["mean", "minimum", "log_mixture"]


class MixedReference:
    """One column out of those of several references.

    mean          weighted mean of the losses: the geometric mean of the probabilities (entropies: their mean)
    minimum       the loss of whichever reference knows the token best
    log_mixture   -log of the weighted mean of the probabilities

    Args:
        parts: the references.
        weights: of each, above 0; only their proportions count.
        mix: how.
    """

    def __init__(self, parts: list[Reference], weights: list[float], mix: Mix) -> None:
        self.parts = parts
        self._weights = torch.tensor(weights) / sum(weights)
        self._mix = mix

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        taken = [part.signals(batches, want) for part in self.parts]
        return [
            {name: self._mixed(torch.stack([columns[name] for columns in found])) for name in found[0]}
            for found in zip(*taken, strict=True)
        ]

    def _mixed(self, column_PBT: Tensor) -> Tensor:
        weight_P11 = self._weights.to(column_PBT.device)[:, None, None]
        if self._mix == "minimum":
            return column_PBT.amin(0)
        if self._mix == "log_mixture":
            return -(weight_P11.log() - column_PBT).logsumexp(0)
        return (weight_P11 * column_PBT).sum(0)


class StoredReference:
    """Reads the scores of every micro-batch of the step.

    Args:
        files: of a `document` store one for each entry of the blend; of a `packed` store the one of the order.
        columns: what a row holds, in order.
        packed: rows are addressed by sample and position instead of offsets in the corpora.
    """

    def __init__(self, files: list[ScoreFile], columns: list[str], packed: bool) -> None:
        self._files = files
        self._columns = columns
        self._packed = packed

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        return [self._read(batch, ("loss", *want)) for batch in batches]

    def _read(self, batch: Batch, want: tuple[str, ...]) -> TokenSignals:
        row_BT = batch.token_position_BT if self._packed else batch.label_offset_BT
        rows, valid = row_BT.cpu().numpy(), batch.valid_BT.cpu().numpy()
        value_BTC = np.zeros((*rows.shape, len(self._columns)), dtype=np.float32)
        for index, source in enumerate(batch.source_B.tolist()):
            file, wanted = self._files[0 if self._packed else source], rows[index, valid[index]]
            if wanted.max(initial=-1) >= file.rows:
                raise UserError(f"{file.path} ends after {file.rows} tokens, and the run wants more: score all of it.")
            value_BTC[index, valid[index]] = file.read(wanted)
        device = batch.tokens_BT.device
        return {name: _column(value_BTC, self._columns.index(name), device) for name in want}


def _column(value_BTC: np.ndarray, index: int, device: torch.device) -> Tensor:
    return torch.from_numpy(value_BTC[..., index].copy()).to(device, non_blocking=True)
