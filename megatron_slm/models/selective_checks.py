"""What is asked of a model before its backward leaves rows out: positions meet in its attention alone, and how."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.attention import Attended, AttentionCall
from megatron_slm.models.checks import LEAK, evaluating, some_tokens, straight
from megatron_slm.models.packed_attention import PackedAttention, attend_by_sequence
from megatron_slm.models.replay import ReplayStudent
from megatron_slm.models.rows import Rows, attend_rows
from megatron_slm.types import Batch


class Silent:
    """Attention that says nothing of any position."""

    def attend(self, call: AttentionCall) -> Attended:
        """Zeros, as large as the layer's own output."""
        batch, heads, length, _ = call.query.shape
        return call.value.new_zeros(batch, length, heads, call.value.shape[-1]), None


class Compared:
    """The layers' own attention; and whether packed attention of all queries said the same in each.

    Args:
        rows: all of the batch.
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
        expected_NHD = attended.flatten(0, 1)
        difference_NHD = attend_rows(self._rows, self._packed, *inputs) - expected_NHD
        self.same &= bool(difference_NHD.norm() <= 2e-2 * expected_NHD.norm())
        return attended, weights


def packed_for_rows(module: nn.Module, model: PreTrainedModel) -> PackedAttention | None:
    """By what the backward of rows runs selected queries; every rank calls it.

    None: each layer's own kernel runs the backward, of all queries. So it is where a model's attention does more than
    softmax of scaled products, and on accelerators, where running queries again was never measured.

    Args:
        module: the `CausalLM`, or its engine.
        model: the model inside, with open attention.
    """
    text_BS = some_tokens(model, 2, 10)
    tokens_BT, labels_BT = text_BS[:, :-1], text_BS[:, 1:]
    if tokens_BT.device.type != "cpu":
        return None
    rows = Rows(straight(tokens_BT), attend_by_sequence)
    rows.choose(torch.ones_like(tokens_BT, dtype=torch.bool))
    compared = Compared(rows, attend_by_sequence)
    with torch.no_grad(), evaluating(model):
        module(tokens_BT, labels_BT, straight(tokens_BT), (), {"selective": compared})
    return attend_by_sequence if compared.same else None


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
        return (one - other)[:, 1:].norm()

    with torch.no_grad(), evaluating(model):
        leaked, attended = change({"selective": Silent()}), change({})
    if leaked > LEAK * attended:
        _refuse(model, "positions meet elsewhere than in its attention")


def check_replay(student: ReplayStudent, model: PreTrainedModel) -> None:
    """Refuse a model whose selected tokens, run again alone, have other losses than before; every rank calls it.

    Raises:
        UserError: they have, as under soft caps or sinks in its attention.
    """
    text_BS = some_tokens(model, 2, 10)
    tokens_BT = text_BS[:, :-1]
    whole_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    sample_B = torch.arange(2, device=tokens_BT.device)
    position_BT = straight(tokens_BT)
    batch = Batch(tokens_BT, text_BS[:, 1:], whole_BT, position_BT, sample_B, sample_B, position_BT)
    chosen_BT = (position_BT % 3 != 1).float()
    with torch.no_grad(), evaluating(model):
        signals, tape = student.score(batch, (), keep=True)
        again_1R, _ = student.replay(tape, chosen_BT)
    expected_R = signals["loss"][chosen_BT != 0]
    if not (again_1R[0] - expected_R).norm() <= 2e-2 * expected_R.norm():
        _refuse(model, "its attention does more than softmax of scaled products")


def _refuse(model: PreTrainedModel, why: str) -> None:
    raise UserError(
        f"selection.backward leaves out rows of {type(model).__name__}, which does not allow it: {why}. Set "
        "selection.backward=exact, or use another architecture."
    )
