"""What is asked of a model before its backward leaves rows out: positions meet in its attention alone, and how."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.checks import LEAK, evaluating, some_tokens, straight
from megatron_slm.models.sparse_backward.attention import Attended, AttentionCall, PackedAttention, attend_by_sequence
from megatron_slm.models.sparse_backward.replay import ReplayStudent
from megatron_slm.models.sparse_backward.rows import Rows, attend_rows
from megatron_slm.types import Batch

TOLERANCE = 0.2
"""Share of the spread of losses that may be round-off: of bf16, and of experts that it chooses anew. The losses
themselves are no measure: those of a fresh model are nearly the same whatever its attention says."""


class Silent:
    """Attention that says nothing of any position."""

    def attend(self, call: AttentionCall) -> Attended:
        """Zeros, as large as the layer's own output."""
        batch, heads, length, _ = call.query.shape
        return call.value.new_zeros(batch, length, heads, call.value.shape[-1]), None


class Compared:
    """The layers' own attention; and whether packed attention of selected queries said the same in each.

    Args:
        rows: the selected positions of the batch.
        packed: what is compared.
    """

    def __init__(self, rows: Rows, packed: PackedAttention) -> None:
        self._rows = rows
        self._packed = packed
        self.same = True

    def attend(self, call: AttentionCall) -> Attended:
        """As without it."""
        attended, weights = call.run()
        inputs = (call.query, call.key, call.value, call.scale, call.window)
        expected_RI = self._rows.take(attended.flatten(2))
        difference_RI = attend_rows(self._rows, self._packed, *inputs).flatten(1) - expected_RI
        self.same &= bool(difference_RI.norm() <= 2e-2 * expected_RI.norm())
        return attended, weights


def sequence_losses(module: nn.Module, model: PreTrainedModel, length: int, brought: dict[str, Any]) -> Tensor:
    """float32 `[1, T]` of one sequence as long as the run's: windows, chunks and sparse attention show at no other.

    Args:
        module: the `CausalLM`, or its engine; every rank calls it.
        model: the model inside.
        length: T.
        brought: see `CausalLM.forward`.
    """
    text_BS = some_tokens(model, 1, length + 1)
    with torch.no_grad(), evaluating(model):
        loss_BT: Tensor = module(text_BS[:, :-1], text_BS[:, 1:], straight(text_BS[:, :-1]), (), brought)["loss"]
        return loss_BT


def check_opening(model: PreTrainedModel, before_BT: Tensor, after_BT: Tensor) -> None:
    """Refuse a model that computes something else once its attention is open: it asks for the kernel by its name.

    Args:
        model: the model.
        before_BT, after_BT: its `sequence_losses`.

    Raises:
        UserError: they differ.
    """
    if not (after_BT - before_BT).norm() <= TOLERANCE * (before_BT - before_BT.mean()).norm():
        _refuse(model, "it does not look up its attention by name alone")


def packed_for_rows(module: nn.Module, model: PreTrainedModel, seq_length: int) -> PackedAttention | None:
    """By what the backward of rows runs selected queries; every rank calls it.

    None: each layer's own kernel runs the backward, of all queries. So it is where a model's attention does more than
    softmax of scaled products, and on accelerators, where running queries again was never measured.
    """
    if next(model.parameters()).device.type != "cpu":
        return None
    return attend_by_sequence if _packs(module, model, attend_by_sequence, seq_length) else None


def check_plain(module: nn.Module, model: PreTrainedModel, packed: PackedAttention, seq_length: int) -> None:
    """Refuse a model whose attention packed attention does not know; every rank calls it.

    Args:
        module: the `CausalLM`, or its engine.
        model: the model inside, with open attention.
        packed: what replay attends by.
        seq_length: tokens a sample.

    Raises:
        UserError: soft caps, sinks, chunks, or windows of which it does not tell.
    """
    if not _packs(module, model, packed, seq_length):
        _refuse(model, "its attention does more than softmax of scaled products in a window that it names")


def _packs(module: nn.Module, model: PreTrainedModel, packed: PackedAttention, seq_length: int) -> bool:
    position_BT = torch.arange(seq_length, device=next(model.parameters()).device)[None]
    rows = Rows(position_BT, packed)
    rows.choose(position_BT % 3 != 1)
    compared = Compared(rows, packed)
    sequence_losses(module, model, seq_length, {"selective": compared})
    return compared.same


def check_attention(module: nn.Module, model: PreTrainedModel) -> None:
    """Refuse a model in which positions meet elsewhere than in its attention: convolutions, recurrences, other calls.

    With an attention that says nothing, another first token must not change the losses of those after it.

    Args:
        module: the `CausalLM`, or its engine; every rank calls it.
        model: the model inside, with open attention.

    Raises:
        UserError: they meet elsewhere.
    """
    text_BS = some_tokens(model, 2, 10)
    tokens_BT, labels_BT = text_BS[:, :-1], text_BS[:, 1:]
    other_BT = tokens_BT.clone()
    other_BT[:, 0] = (other_BT[:, 0] + 1) % model.config.vocab_size

    def change(brought: dict[str, Any]) -> Tensor:
        one, other = (module(text, labels_BT, straight(text), (), brought)["loss"] for text in (tokens_BT, other_BT))
        distance: Tensor = (one - other)[:, 1:].norm()
        return distance

    with torch.no_grad(), evaluating(model):
        leaked, attended = change({"selective": Silent()}), change({})
    if leaked > LEAK * attended:
        _refuse(model, "positions meet elsewhere than in its attention")


def check_replay(student: ReplayStudent, model: PreTrainedModel) -> None:
    """Refuse a model whose selected tokens, run again alone, have other losses than before; every rank calls it.

    Raises:
        UserError: they have, as where positions are counted by the model and not taken from `position_ids`.
    """
    text_BS = some_tokens(model, 2, 10)
    tokens_BT = text_BS[:, :-1]
    whole_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    sample_B = torch.arange(2, device=tokens_BT.device)
    position_BT = straight(tokens_BT)
    batch = Batch(tokens_BT, text_BS[:, 1:], whole_BT, position_BT, sample_B, sample_B, position_BT, sample_B * 0)
    chosen_BT = (position_BT % 3 != 1).float()
    with torch.no_grad(), evaluating(model):
        signals, tape = student.score(batch, (), keep=True)
        again_1R = student.replay(tape, {"loss": chosen_BT})[0]["loss"]
    expected_R = signals["loss"][chosen_BT != 0]
    if not (again_1R[0] - expected_R).norm() <= TOLERANCE * (expected_R - expected_R.mean()).norm():
        _refuse(model, "tokens that run alone have other losses than among all, though given the same position_ids")


def _refuse(model: PreTrainedModel, why: str) -> None:
    raise UserError(
        f"selection.backward leaves out rows of {type(model).__name__}, which does not allow it: {why}. Set "
        "selection.backward=exact, or use another architecture."
    )
