"""Replay: score all tokens without a graph, then run forward and backward on the selected tokens alone.

The first pass keeps the keys and values of every layer. The second pass runs the selected tokens, packed in one row,
and attends to the kept keys and values, with its own at the positions of the selected tokens. Hidden states, keys and
values of all other positions are therefore constants, as in rows.py: the gradient is the same, and only the selected
share of the activations is ever held.

Suffixes: B sequences of T positions, R selected positions, packed in one row; H heads in G groups, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_slm.backend import TrainingEngine
from megatron_slm.models.causal_lm import masked_labels, score_batch
from megatron_slm.models.sparse_backward.attention import (
    Attended,
    AttentionCall,
    PackedAttention,
    PackedQueries,
    refuse_compiled,
)
from megatron_slm.models.student import selected_tokens, weighed_columns, weighted_sum
from megatron_slm.types import Batch, TokenSignals, TokenWeights


class KeyValues:
    """The keys and values of every layer, `[B, G, T, D]` as attention reads them, without a graph."""

    def __init__(self) -> None:
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def attend(self, call: AttentionCall) -> Attended:
        """Return the layer's own attention, and keep its keys and values."""
        # By module and not by order, because activation checkpointing runs the layers of the second pass again.
        self._layers[call.module] = (_own_memory(call.key), _own_memory(call.value))
        return call.run()

    def of_layer(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a layer, by its attention module."""
        return self._layers[module]


class ReplayAttention:
    """Attention of selected tokens alone, over the keys and values of all.

    Args:
        known: the keys and values of the first pass.
        queries: the positions of the selected tokens.
        packed: the attention of packed queries.
    """

    def __init__(self, known: KeyValues, queries: PackedQueries, packed: PackedAttention) -> None:
        self._known = known
        self._queries = queries
        self._packed = packed

    def attend(self, call: AttentionCall) -> Attended:
        """Return `[1, R, H, D]` for queries `[1, H, R, D]`, keys and values `[1, G, R, D]` of the selected tokens."""
        # Selected tokens attend to each other with their graph, and to all others without one.
        known_key, known_value = self._known.of_layer(call.module)
        key_GND = self._queries.merge(known_key, call.key)
        value_GND = self._queries.merge(known_value, call.value)
        attended_1HRD = self._packed(self._queries, call.query, key_GND, value_GND, call.scale, call.window)
        # Contiguous, as the kernels return it: some models take a view of it.
        return attended_1HRD.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class ReplayTape:
    """The batch, and the keys and values of its first pass if they were kept."""

    batch: Batch
    known: KeyValues | None


class ReplayStudent:
    """A student whose backward runs the selected tokens again, over the keys and values of all; see `Student`.

    Args:
        engine: the module (a `CausalLM` whose attention is open) with its optimizer.
        packed: the attention of packed queries.
    """

    def __init__(self, engine: TrainingEngine, packed: PackedAttention) -> None:
        refuse_compiled(engine.module, "replay")
        self._engine = engine
        self._packed = packed

    def score(self, batch: Batch, want: tuple[str, ...], *, keep: bool) -> tuple[TokenSignals, ReplayTape]:
        signals, known = self._first_pass(batch, want)
        return signals, ReplayTape(batch, known if keep else None)

    def backward(
        self, tape: ReplayTape, weights: TokenWeights, scale: float, *, last: bool, share: float = 1.0
    ) -> dict[str, Tensor]:
        output, weights_1R = self.replay(tape, weights)
        self._engine.backward(weighted_sum(output, weights_1R) * scale, last=last)
        return {}

    def replay(self, tape: ReplayTape, weights: TokenWeights) -> tuple[TokenSignals, TokenWeights]:
        """Return the columns, with their graph, and the weights of the R selected tokens, `[1, R]` each.

        If none is selected, they are those of the first token, whose weight is 0: under ZeRO-3 no rank may skip the
        forward.
        """
        batch = tape.batch
        known = tape.known or self._first_pass(batch)[1]
        index_R = selected_tokens(weights).flatten().nonzero().squeeze(-1)
        if len(index_R) == 0:
            index_R = index_R.new_zeros(1)  # weight 0: its gradient is zero

        # One sequence of R tokens. Their position ids are those of the batch, so that rotary or learned positions agree
        # with the first pass; causality and documents are in the masks of `PackedQueries`.
        def pack(column_BT: Tensor) -> Tensor:
            return column_BT.flatten()[index_R][None]

        weights_1R = {name: pack(weight_BT) for name, weight_BT in weights.items()}
        queries = PackedQueries(index_R, batch.position_ids_BT)
        brought = {
            "selective": ReplayAttention(known, queries, self._packed),
            # Without a mask, Hugging Face would build one of R x R for what looks like packed documents.
            "attention_mask": torch.zeros(1, 1, 1, 1, device=index_R.device),
        }
        columns = (pack(batch.tokens_BT), pack(masked_labels(batch)), pack(batch.position_ids_BT))
        return self._engine.module(*columns, weighed_columns(weights), brought), weights_1R

    @torch.no_grad()
    def _first_pass(self, batch: Batch, want: tuple[str, ...] = ()) -> tuple[TokenSignals, KeyValues]:
        known = KeyValues()
        return score_batch(self._engine.module, batch, want, {"selective": known}), known


def _own_memory(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph and not as a view: one of queries, keys and values would hold all three."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
