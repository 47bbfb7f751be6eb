"""The reference as a store: its scores are read beside the tokens, and no model runs."""

import numpy as np
import torch
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.signals.score_file import ScoreFile
from megatron_slm.types import Batch, TokenSignals


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

    def take(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
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
