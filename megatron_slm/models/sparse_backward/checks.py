"""Checks of a model before its backward leaves rows out.

Information may pass between positions only in its attention, and this attention must be one that is supported.
"""

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
"""Difference of losses, relative to their spread, that round-off can cause: in bf16 it may route to other experts.

It is not relative to the losses: those of a fresh model are nearly equal, whatever its attention computes.
"""


class ZeroAttention:
    """Attention that returns zeros, so that no information passes between positions."""

    def attend(self, call: AttentionCall) -> Attended:
        """Return zeros of the shape of the layer's own output."""
        batch, heads, length, _ = call.query.shape
        return call.value.new_zeros(batch, length, heads, call.value.shape[-1]), None


class AttentionComparison:
    """The layers' own attention, compared with packed attention of selected queries.

    Args:
        rows: the selected positions of the batch.
        packed: the packed attention.

    Attributes:
        same: True if the two were equal up to round-off in every layer so far.
    """

    def __init__(self, rows: Rows, packed: PackedAttention) -> None:
        self._rows = rows
        self._packed = packed
        self.same = True

    def attend(self, call: AttentionCall) -> Attended:
        """Return the layer's own attention, after comparing it."""
        attended, weights = call.run()
        # Both run on the layer's own inputs, so that round-off does not add up over layers.
        expected_RI = self._rows.gather(attended.flatten(2))
        packed_RHD = attend_rows(self._rows, self._packed, call.query, call.key, call.value, call.scale, call.window)
        difference_RI = packed_RHD.flatten(1) - expected_RI
        self.same &= bool(difference_RI.norm() <= 2e-2 * expected_RI.norm())
        return attended, weights


def sequence_losses(module: nn.Module, model: PreTrainedModel, length: int, layer_options: dict[str, Any]) -> Tensor:
    """Return the losses, float32 `[1, T]`, of one sequence as long as those of the run; every rank calls it.

    Windows, chunks and sparse attention have an effect only beyond some length.

    Args:
        module: the `CausalLM`, or its engine.
        model: the model inside.
        length: T.
        layer_options: see `CausalLM.forward`.
    """
    text_BS = some_tokens(model, 1, length + 1)
    with torch.no_grad(), evaluating(model):
        loss_BT: Tensor = module(text_BS[:, :-1], text_BS[:, 1:], straight(text_BS[:, :-1]), (), layer_options)["loss"]
        return loss_BT


def check_opening(model: PreTrainedModel, before_BT: Tensor, after_BT: Tensor) -> None:
    """Raise a UserError if `open_attention` changed the losses of a model, because its code reads the kernel's name.

    Args:
        model: the model.
        before_BT, after_BT: its `sequence_losses` before and after `open_attention`.
    """
    # Written with `not`, so that NaN is refused too.
    if not (after_BT - before_BT).norm() <= TOLERANCE * (before_BT - before_BT.mean()).norm():
        _refuse(model, "its code reads the name of its attention")


def packed_for_rows(module: nn.Module, model: PreTrainedModel, seq_length: int) -> PackedAttention | None:
    """Return the packed attention for the backward of rows, or None for the kernels' own; every rank calls it.

    The kernels' own backward, of all queries, serves models whose attention does more than softmax of scaled products.
    It also serves all models on accelerators, where running the selected queries again has not been measured.
    """
    if next(model.parameters()).device.type != "cpu":  # every rank has the same kind of device
        return None
    return attend_by_sequence if _packs(module, model, attend_by_sequence, seq_length) else None


def check_plain(module: nn.Module, model: PreTrainedModel, packed: PackedAttention, seq_length: int) -> None:
    """Raise a UserError if packed attention differs from a model's attention; every rank calls it.

    It differs if there are soft caps, sinks, chunks, or windows that the kernel's arguments do not name.

    Args:
        module: the `CausalLM`, or its engine.
        model: the model inside, with open attention.
        packed: the packed attention of replay.
        seq_length: tokens per sample.
    """
    if not _packs(module, model, packed, seq_length):
        _refuse(model, "its attention does more than softmax of scaled products in a window that its arguments name")


def _packs(module: nn.Module, model: PreTrainedModel, packed: PackedAttention, seq_length: int) -> bool:
    position_BT = torch.arange(seq_length, device=next(model.parameters()).device)[None]
    rows = Rows(position_BT, packed)
    rows.select(position_BT % 3 != 1)  # with gaps, as between selected tokens
    comparison = AttentionComparison(rows, packed)
    sequence_losses(module, model, seq_length, {"selective": comparison})
    return comparison.same


def check_attention(module: nn.Module, model: PreTrainedModel) -> None:
    """Raise a UserError if information passes between positions outside attention: in convolutions or recurrences.

    With attention that returns zeros, another first token must not change the losses of the tokens after it.

    Args:
        module: the `CausalLM`, or its engine; every rank calls it.
        model: the model inside, with open attention.
    """
    text_BS = some_tokens(model, 2, 10)
    tokens_BT, labels_BT = text_BS[:, :-1], text_BS[:, 1:]
    other_BT = tokens_BT.clone()
    # The labels stay, and the loss of the first position, which reads the changed token itself, is left out below.
    other_BT[:, 0] = (other_BT[:, 0] + 1) % model.config.vocab_size

    def change(layer_options: dict[str, Any]) -> Tensor:
        before_BT = module(tokens_BT, labels_BT, straight(tokens_BT), (), layer_options)["loss"]
        after_BT = module(other_BT, labels_BT, straight(tokens_BT), (), layer_options)["loss"]
        distance: Tensor = (after_BT - before_BT)[:, 1:].norm()
        return distance

    # Relative to the change through attention, so that the check holds for any weights and dtype.
    with torch.no_grad(), evaluating(model):
        leaked = change({"selective": ZeroAttention()})
        attended = change({})
    if leaked > LEAK * attended:
        _refuse(model, "information passes between positions outside of its attention")


def check_replay(student: ReplayStudent, model: PreTrainedModel) -> None:
    """Raise a UserError if replay changes the losses of selected tokens by more than round-off; every rank calls it.

    It does if a model counts positions itself, instead of reading `position_ids`.
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
        _refuse(model, "selected tokens that run alone have other losses than in their batch, with equal position_ids")


def _refuse(model: PreTrainedModel, reason: str) -> None:
    raise UserError(
        "architecture",
        type(model).__name__,
        f"selection.backward is rows or replay, which does not support it: {reason}",
        "Set selection.backward=exact, or use another architecture",
    )
