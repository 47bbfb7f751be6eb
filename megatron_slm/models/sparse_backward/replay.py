"""Replay: score all tokens without a graph, then run forward and backward on the selected tokens alone.

The first pass keeps the keys and values of every layer. The second pass runs the selected tokens, packed in one row. It
attends to the kept keys and values, replaced by its own at the positions of the selected tokens. The hidden states,
keys and values of all other positions are constants, as in rows.py. So the gradient is the same as there, but memory
holds the activations of the selected tokens only.

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
    """The keys and values of every layer as attention reads them, `[B, G, T, D]`, without a graph."""

    def __init__(self) -> None:
        # By attention module and not by order: activation checkpointing runs the layers of the second pass again.
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def attend(self, call: AttentionCall) -> Attended:
        """Return the layer's own attention, and keep its keys and values."""
        self.layers[call.module] = (_own_memory(call.key), _own_memory(call.value))
        return call.run()


class ReplayAttention:
    """Attention of selected tokens alone, over the keys and values of all.

    Args:
        known: the keys and values from the first pass.
        queries: the positions of the selected tokens.
        packed: the attention of packed queries.
    """

    def __init__(self, known: KeyValues, queries: PackedQueries, packed: PackedAttention) -> None:
        self._known = known
        self._queries = queries
        self._packed = packed

    def attend(self, call: AttentionCall) -> Attended:
        """Return `[1, R, H, D]` for queries `[1, H, R, D]`, keys and values `[1, G, R, D]` of the selected tokens."""
        # Gradients flow through the keys and values of selected tokens, and not through those of all others.
        known_key, known_value = self._known.layers[call.module]
        key_GND = self._queries.merge(known_key, call.key)
        value_GND = self._queries.merge(known_value, call.value)
        attended_1HRD = self._packed(self._queries, call.query, key_GND, value_GND, call.scale, call.window)
        # Contiguous like the output of the kernels, because some models take a view of it.
        return attended_1HRD.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class ReplayTape:
    """The batch, and the keys and values from its first pass; None if they were not kept."""

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
        """Return the columns, with their graph, and the weights of the R selected tokens: `[1, R]` each.

        If no token is selected, return those of the first token, whose weight is 0: under ZeRO-3, every forward needs
        all ranks.
        """
        batch = tape.batch
        known = tape.known or self._first_pass(batch)[1]
        index_R = selected_tokens(weights).flatten().nonzero().squeeze(-1)
        if len(index_R) == 0:
            index_R = index_R.new_zeros(1)

        # The selected tokens form one sequence. They keep their position ids, so that rotary or learned positions agree
        # with the first pass. The masks of `PackedQueries` enforce causality and the borders of documents.
        def pack(column_BT: Tensor) -> Tensor:
            return column_BT.flatten()[index_R][None]

        weights_1R = {name: pack(weight_BT) for name, weight_BT in weights.items()}
        queries = PackedQueries(index_R, batch.position_ids_BT)
        options = {
            "selective": ReplayAttention(known, queries, self._packed),
            # A dummy. Without it, Hugging Face would take the restarting positions for packed documents, and build a
            # mask of R x R.
            "attention_mask": torch.zeros(1, 1, 1, 1, device=index_R.device),
        }
        inputs = (pack(batch.tokens_BT), pack(masked_labels(batch)), pack(batch.position_ids_BT))
        return self._engine.module(*inputs, weighed_columns(weights), options), weights_1R

    @torch.no_grad()
    def _first_pass(self, batch: Batch, want: tuple[str, ...] = ()) -> tuple[TokenSignals, KeyValues]:
        known = KeyValues()
        return score_batch(self._engine.module, batch, want, {"selective": known}), known


def _own_memory(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph, copied if it is a view: a slice of fused projections would hold all three."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
