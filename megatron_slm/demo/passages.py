"""Held-out text with the loss of each token under base and reference, and what selection would keep of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.data.corpus import load_corpus_tokenizer, open_corpus
from megatron_slm.data.stream import EvaluationStream
from megatron_slm.models.causal_lm import CausalLM, load_pretrained, score_batch
from megatron_slm.reporting.tokens import Token, token_texts
from megatron_slm.selection import select_tokens
from megatron_slm.types import Batch

WINDOWS_AT_ONCE = 16


@dataclass(frozen=True)
class Passages:
    """Of one held-out set: tokens of some windows, and the share of all its tokens that is selected."""

    passages: list[list[Token]]
    share: float


def held_out_passages(
    corpora: dict[str, Path], models: dict[str, Path], ratio: float, seq_length: int, count: int, length: int
) -> dict[str, Passages]:
    """Score held-out corpora and select from all of them together, as if they were one pool.

    Args:
        corpora: prefixes by name, of one tokenizer.
        models: Hugging Face folders of `student` and `reference`.
        ratio: share of the tokens that is selected.
        seq_length: tokens a window, as in training.
        count: passages of each corpus, evenly spread over it.
        length: tokens a passage, at most `seq_length`; it begins where a window does.
    """
    opened = {name: open_corpus(str(prefix)) for name, prefix in corpora.items()}
    tokenizer = load_corpus_tokenizer(next(iter(opened.values())))
    streams = {name: EvaluationStream(c, seq_length, tokenizer.eos_token_id, False) for name, c in opened.items()}
    batches = {name: stream.batch(list(range(len(stream)))) for name, stream in streams.items()}
    whole = Batch.concatenate(list(batches.values()))
    losses = {name: _losses(path, whole) for name, path in models.items()}
    kept_BT = select_tokens(losses["student"] - losses["reference"], whole.valid_BT, ratio).mask
    found, start = {}, 0
    for name, batch in batches.items():
        rows = range(start, start := start + len(batch.tokens_BT))
        kept, valid = (int(mask_BT[rows.start : rows.stop].sum()) for mask_BT in (kept_BT, whole.valid_BT))
        shown = min(count, len(rows))
        chosen = [rows[index * len(rows) // shown] for index in range(shown)]
        found[name] = Passages(
            [_tokens(tokenizer, whole, row, losses, kept_BT, length) for row in chosen], kept / valid
        )
    return found


@torch.no_grad()
def _losses(folder: Path, batch: Batch) -> Tensor:
    """float32 `[B, T]`."""
    module = CausalLM(load_pretrained(str(folder), "model", False, dtype=torch.float32)).eval()
    starts = range(0, len(batch.tokens_BT), WINDOWS_AT_ONCE)
    return torch.cat([score_batch(module, batch.rows(start, start + WINDOWS_AT_ONCE))["loss"] for start in starts])


def _tokens(
    tokenizer: Any, batch: Batch, row: int, losses: dict[str, Tensor], kept_BT: Tensor, length: int
) -> list[Token]:
    """The labels of one window, each with what was scored; ends of documents have no loss."""
    # Padding follows the last label of a stream.
    labels = [int(label) for label in batch.labels_BT[row, :length][batch.label_offset_BT[row, :length] >= 0]]
    texts = token_texts(tokenizer, labels)
    return [
        Token(text, float(losses["student"][row, t]), float(losses["reference"][row, t]), bool(kept_BT[row, t]))
        if batch.valid_BT[row, t]
        else Token(text + "\n")
        for t, text in enumerate(texts)
    ]
