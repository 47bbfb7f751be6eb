"""An evaluation corpus as one stream of tokens, in consecutive windows."""

import math

import numpy as np
import torch

from megatron_slm.data.corpus import Corpus, open_mask, open_tokens
from megatron_slm.types import Batch


class EvaluationStream:
    """Windows of `seq_length` over a corpus in the order of its `.bin`, the last one padded.

    Every token is a label once, except the stream's first; end-of-document tokens are not
    scored, since they are no text, nor is what a mask leaves out. Windows do not overlap: a
    window's first label is predicted from one token.

    Args:
        corpus: an opened corpus.
        seq_length: tokens a window, T.
        eod: id of the end-of-document token.
        reset_attention: positions restart at each document.
    """

    def __init__(self, corpus: Corpus, seq_length: int, eod: int, reset_attention: bool) -> None:
        self.num_bytes = corpus.num_bytes
        self._seq_length = seq_length
        self._eod = eod
        self._reset_attention = reset_attention
        tokens = open_tokens(corpus)
        self._tokens = np.memmap(f"{corpus.prefix}.bin", dtype=tokens.index.dtype, mode="r")
        self._mask = open_mask(corpus)
        # Of the index, since an end token may also end a turn of a chat.
        self._document_start = np.asarray(tokens.index.sequence_pointers) // tokens.index.dtype_size

    def __len__(self) -> int:
        """Windows; a corpus of one token has one, with nothing to score."""
        return max(1, math.ceil((len(self._tokens) - 1) / self._seq_length))

    def batch(self, windows: list[int]) -> Batch:
        """These windows side by side; one beyond the end is all padding, so that all ranks run equally often."""
        text_BS, offset_BS = (
            torch.from_numpy(np.stack(rows)) for rows in zip(*map(self._window, windows), strict=True)
        )
        labels_BT, offset_BT = text_BS[:, 1:], offset_BS[:, 1:]
        return Batch(
            tokens_BT=text_BS[:, :-1],
            labels_BT=labels_BT,
            valid_BT=self._counts(offset_BT) & (labels_BT != self._eod),
            position_ids_BT=self._positions(np.array(windows)),
            sample_index_B=torch.tensor(windows),
            source_B=torch.zeros(len(windows), dtype=torch.long),
            label_offset_BT=offset_BT,
            continued_B=self._continued(np.array(windows)),
        )

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        start = window * self._seq_length
        text = np.asarray(self._tokens[start : start + self._seq_length + 1], dtype=np.int64)
        missing = self._seq_length + 1 - len(text)
        offset = np.concatenate([start + np.arange(len(text)), np.full(missing, -1)])
        return np.concatenate([text, np.full(missing, self._eod)]), offset

    def _counts(self, offset_BT: torch.Tensor) -> torch.Tensor:
        """False for padding, and for what the mask leaves out."""
        real_BT = offset_BT >= 0
        return real_BT if self._mask is None else real_BT & torch.from_numpy(self._mask[offset_BT.numpy()]).bool()

    def _continued(self, window_B: np.ndarray) -> torch.Tensor:
        """Return the tokens at the beginning of each window whose document began before it, int64 `[B]`."""
        start_B = window_B * self._seq_length
        document_B = np.searchsorted(self._document_start, start_B, side="right") - 1
        end_B = np.append(self._document_start, len(self._tokens))[document_B + 1]
        continued_B = (end_B - start_B).clip(0, self._seq_length + 1)
        return torch.from_numpy(np.where(self._document_start[document_B] < start_B, continued_B, 0))

    def _positions(self, window_B: np.ndarray) -> torch.Tensor:
        start_B1 = window_B[:, None] * self._seq_length
        place_BT = start_B1 + np.arange(self._seq_length)
        if not self._reset_attention:
            return torch.from_numpy(place_BT - start_B1)
        document_BT = np.searchsorted(self._document_start, place_BT, side="right") - 1
        return torch.from_numpy(place_BT - np.maximum(self._document_start[document_BT], start_B1))
